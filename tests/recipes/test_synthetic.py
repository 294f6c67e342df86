"""Synthetic releases: whole or not at all, marked, never over somebody's data."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mmfusion.recipes.synthetic import MARKER, write_release


def table(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "table.csv").write_text(text, encoding="utf-8")


def test_a_release_is_marked_with_all_it_depends_on(tmp_path: Path) -> None:
    root = write_release(
        tmp_path / "deep" / "er", "Somebody", {"version": 2, "seed": 0}, table("a")
    )
    assert (root / "table.csv").read_text() == "a"
    marker = (root / MARKER).read_text()
    assert marker.startswith("SYNTHETIC: drawn by mmfusion in the format of Somebody. No patient")
    assert marker.endswith("version=2\nseed=0\n")
    assert [path.name for path in root.parent.iterdir()] == ["er"]


def test_a_twin_is_left_alone_and_anything_else_is_refused(tmp_path: Path) -> None:
    root = write_release(tmp_path / "a", "Somebody", {"seed": 0}, table("first"))
    write_release(root, "Somebody", {"seed": 0}, table("second"))
    rule = r"seed=0.*reused only if it is the same release \(seed=1\).*Pass another root"
    with pytest.raises(ValueError, match=rule):
        write_release(root, "Somebody", {"seed": 1}, table("second"))
    assert (root / "table.csv").read_text() == "first"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_somebodys_data_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "release"
    precious = root if kind == "file" else root / "meta.csv"
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("true data", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds 'no SYNTHETIC.txt'.*never overwritten.*Pass"):
        write_release(root, "Somebody", {}, table("drawn"))
    assert precious.read_text(encoding="utf-8") == "true data"


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        table("half")(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_release(tmp_path / "a", "Somebody", {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_gives_way(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert (write_release(tmp_path / "a", "Somebody", {}, table("x")) / MARKER).is_file()
