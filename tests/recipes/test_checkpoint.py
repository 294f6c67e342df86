"""Files that are whole or not there, and what is said when the disk does not take them."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from mmfusion.recipes import checkpoint


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    checkpoint.save(path, {"weight": torch.ones(2)}, {})

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_whole(path, fail)
    assert checkpoint.load(path)[0]["weight"].tolist() == [1, 1]
    assert os.listdir(tmp_path) == ["weights.safetensors"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_told_and_the_old_file_kept(small_disk: Path) -> None:
    path = small_disk / "last.safetensors"
    checkpoint.save(path, {"weight": torch.ones(2)}, {"epoch": 1})
    said = r"last.safetensors could not be written .* takes 2\.0 MB, and 1\.\d MB are free.*resume"
    with pytest.raises(OSError, match=said):
        checkpoint.save(path, {"weight": torch.ones(500_000)}, {"epoch": 2})
    assert checkpoint.load(path)[1] == {"epoch": 1}
    assert os.listdir(small_disk) == ["last.safetensors"]


def test_a_failed_write_is_told_whatever_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"written \(No space left on device\).*Free some space"):
        checkpoint.save(tmp_path / "last.safetensors", {"weight": torch.ones(2)}, {})
    assert os.listdir(tmp_path) == []


def test_a_folder_that_takes_no_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"folder=.*takes no files.*writable"):
        checkpoint.check_folder(tmp_path / "file" / "run")


def test_a_folder_that_is_read_only(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ValueError, match=r"takes no files \(Read-only file system\).*Pass another"):
        checkpoint.check_folder(small_disk)
