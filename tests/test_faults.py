"""Every fault of docs/faults.md, brought about: the page shows what is really said."""

import csv
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from recipes import resumable

from mmfusion.recipes import checkpoint
from mmfusion.recipes.custom import Custom
from mmfusion.recipes.custom_synthetic import write_synthetic_custom
from mmfusion.recipes.derm7pt import Derm7pt
from mmfusion.recipes.derm7pt_synthetic import write_synthetic_release
from mmfusion.recipes.men import Men
from mmfusion.recipes.men_synthetic import write_synthetic_men
from mmfusion.recipes.odir import Odir
from mmfusion.recipes.odir_synthetic import write_synthetic_odir

ROOT = Path(__file__).parents[1]
Damage = Callable[[Path, Any, int], tuple[str, str]]

READERS: dict[str, Callable[..., Any]] = {
    "derm7pt": lambda root, **how: Derm7pt(root, "test", image_size=16, **how),
    "odir": lambda root, **how: Odir(root, image_size=16, **how),
    "men": lambda root, **how: Men(root, "test", size=(8, 8, 4), **how),
    "custom": lambda root, **how: Custom(
        root / "layout.toml", "train", image_size=16, volume_size=(8, 8, 4), **how
    ),
}
WRITERS: dict[str, Callable[[Path], Any]] = {
    "derm7pt": lambda root: write_synthetic_release(root, num_cases=60, image_size=(16, 24)),
    "odir": lambda root: write_synthetic_odir(root, num_patients=60, image_size=32),
    "men": lambda root: write_synthetic_men(root, num_patients=36, shape=(16, 16, 12)),
    "custom": lambda root: write_synthetic_custom(root, num_cases=40),
}


def page() -> dict[str, str]:
    """Fault -> the message that docs/faults.md shows for it."""
    lines = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {fault: seen.strip("`") for fault, seen, _ in rows[1:]}


def is_shown(fault: str, error: BaseException | str) -> bool:
    """Whether the page shows this message, but for what it leaves out with an ellipsis."""
    parts = page()[fault].split("…")
    return bool(re.fullmatch(".*".join(map(re.escape, parts)), str(error), re.DOTALL))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def written(data: str) -> Path:
        root = tmp_path_factory.mktemp("faults") / data
        WRITERS[data](root)
        return root

    return written


def content(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def edit(path: Path, change: Callable[[list[dict[str, str]]], object]) -> None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    change(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# Damage: of a copy, at a case that has everything. What is broken: its column and file or cell.


def lost_image(root: Path, cases: Any, case: int) -> tuple[str, str]:
    with (root / "meta" / "meta.csv").open(newline="") as table:
        file = list(csv.DictReader(table))[cases.sample_ids[case]]["derm"]
    (root / "images" / file).unlink()
    return "derm", file


def cut_jpeg(root: Path, cases: Any, case: int) -> tuple[str, str]:
    path = cases.images / f"{cases.sample_ids[case]}_left.jpg"
    path.write_bytes(path.read_bytes()[:-50])
    return "left", path.name


def deep_image(root: Path, cases: Any, case: int) -> tuple[str, str]:
    path = next((root / "photos").glob(f"{cases.ids[case]}.*"))
    path.unlink()
    path = path.with_suffix(".png")
    Image.fromarray(np.full((16, 16), 4000, dtype=np.uint16)).save(path)
    return "photo", str(path)


def cut_volume(root: Path, cases: Any, case: int) -> tuple[str, str]:
    path = volume(root, cases, case)
    path.write_bytes(path.read_bytes()[:-100])
    return "adc", str(path)


def other_volume(data: np.ndarray) -> Damage:
    def damage(root: Path, cases: Any, case: int) -> tuple[str, str]:
        path = volume(root, cases, case)
        nib.save(nib.Nifti1Image(data, np.eye(4)), path)
        return "adc", str(path)

    return damage


def volume(root: Path, cases: Any, case: int) -> Path:
    return next((root / "volumes" / cases.patient_ids[case]).glob("adc.nii*"))


def unknown_category(root: Path, cases: Any, case: int) -> tuple[str, str]:
    def change(rows: list[dict[str, str]]) -> None:
        rows[cases.sample_ids[case]]["location"] = "orbit"

    edit(root / "table.csv", change)
    return "location", "orbit"


HOLE = np.ones((4, 4, 4))
HOLE[1, 2, 3] = np.nan
FILES: dict[str, tuple[str, Damage]] = {
    "missing image": ("derm7pt", lost_image),
    "truncated JPEG": ("odir", cut_jpeg),
    "image of 16 bits, or of floating point": ("custom", deep_image),
    "unreadable NIfTI": ("men", cut_volume),
    "wrong shape": ("men", other_volume(np.ones((5, 6)))),
    "4-D volume": ("men", other_volume(np.ones((4, 4, 4, 3)))),
    "NaN pixels": ("men", other_volume(HOLE)),
    "unknown category at test time": ("men", unknown_category),
}


@pytest.mark.parametrize("fault", FILES)
def test_what_cannot_be_read_is_named_or_missing(
    release: Callable[[str], Path], tmp_path: Path, fault: str
) -> None:
    data, damage = FILES[fault]
    root = Path(shutil.copytree(release(data), tmp_path / "copy"))
    read = functools.partial(READERS[data], root)
    before = read()
    case = int(before.present.all(1).nonzero()[0])
    column, value = damage(root, before, case)
    on_disk = content(root)
    with pytest.raises(ValueError, match="on_broken='missing'") as told:
        read()
    assert is_shown(fault, told.value), told.value
    assert f"column {column!r}" in str(told.value) or f"{column}=" in str(told.value)
    assert repr(value) in str(told.value)

    after = read(on_broken="missing")
    assert [(one.column, one[2]) for one in after.broken] == [(column, value)]
    changed = (before.present != after.present).nonzero().tolist()
    if column in after.names:
        assert changed == [[case, after.names.index(column)]]
        assert after[case]["inputs"][column] is None
    else:  # a cell
        assert changed == []
        blank = [name.startswith(f"{column}=") for name in after.feature_names]
        assert after[case]["inputs"]["table"].isnan().tolist() == blank
    assert content(root) == on_disk


def repeat(root: Path) -> None:
    edit(root / "table.csv", lambda rows: rows.insert(3, rows[1]))


def empty_class(root: Path) -> None:
    """Nobody in the validation split has grade 2 with invasion: they train instead."""
    with (root / "table.csv").open(newline="") as table:
        labels = {row["patient_id"]: row["label"] for row in csv.DictReader(table)}

    def change(rows: list[dict[str, str]]) -> None:
        for row in rows:
            if row["split"] == "valid" and labels[row["patient_id"]] == "grade2_invasive":
                row["split"] = "train"

    edit(root / "splits" / "0.csv", change)


@pytest.mark.parametrize("on_broken", ["raise", "missing"])
@pytest.mark.parametrize(
    ("fault", "damage"),
    [("duplicate patient ids", repeat), ("empty validation class", empty_class)],
)
def test_a_wrong_table_is_refused_in_any_case(
    release: Callable[[str], Path], tmp_path: Path, fault: str, damage: Any, on_broken: str
) -> None:
    root = Path(shutil.copytree(release("men"), tmp_path / "copy"))
    damage(root)
    with pytest.raises(ValueError) as told:  # noqa: PT011  the page says which
        READERS["men"](root, on_broken=on_broken)
    assert is_shown(fault, told.value), told.value


def test_a_cache_keeps_what_was_read_before_a_fault(
    release: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(release("men"), tmp_path / "copy"))
    cases = READERS["men"](root)
    path = volume(root, cases, int(cases.present.all(1).nonzero()[0]))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    cached = functools.partial(READERS["men"], root, cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="cannot be read"):
        cached()
    kept = content(tmp_path / "cache")
    path.write_bytes(whole)
    cached()
    assert len(content(tmp_path / "cache")) == len(kept) + 1
    assert content(tmp_path / "cache").items() > kept.items()


def test_an_example_stops_before_it_trains(release: Callable[[str], Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(release("men"), tmp_path / "copy"))
    cases = READERS["men"](root)
    cut_volume(root, cases, int(cases.present.all(1).nonzero()[0]))
    command = [sys.executable, str(ROOT / "examples" / "cmml_men.py"), "--data-root", str(root)]
    command += ["--out", str(tmp_path / "run"), "--size", "8", "8", "4"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert is_shown("unreadable NIfTI", last.removeprefix("ValueError: ")), last
    assert not list((tmp_path / "run").iterdir())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_read_only_output_folder(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(ValueError, match="takes no files") as told:
        resumable.run(disk / "run", resumable.Fatal(resumable.samples(), 0, 9))  # trains no step
    assert is_shown("read-only output folder", told.value), told.value


class Filling(resumable.Noisy):
    """Samples of which one, in the second epoch, finds the disk full."""

    def __init__(self, filler: Path) -> None:
        super().__init__(resumable.samples())
        self.filler, self.asked = filler, 0

    def __getitem__(self, index: Any) -> Any:
        self.asked += 1
        if self.asked == resumable.NUM_SAMPLES + 1:
            free = shutil.disk_usage(self.filler.parent).free
            self.filler.write_bytes(bytes(free - 50_000))
        return super().__getitem__(index)


def test_a_full_disk(disk: Path, tmp_path: Path) -> None:
    filler = disk / "filler"
    with pytest.raises(OSError, match="could not be written") as told:
        resumable.run(disk / "run", Filling(filler))
    assert is_shown("full disk", told.value), told.value
    about = checkpoint.load(disk / "run" / "last.safetensors")[1]
    assert len(about["history"]) == 1
    filler.unlink()
    resumed = resumable.run(disk / "run", resume=True)
    assert resumed == resumable.run(tmp_path / "undisturbed")


def test_every_fault_of_the_page_is_brought_about() -> None:
    others = {"duplicate patient ids", "empty validation class"}
    assert set(page()) == {*FILES, *others, "read-only output folder", "full disk"}
