"""Photos: cut, scaled, refused with a reason; read many at a time."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmfusion.recipes.images import random_flips, read_photo, read_photos


def raises(*parts: str) -> "pytest.RaisesExc[ValueError]":
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


def test_photos_are_read_into_their_places_and_the_unreadable_ones_noted(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), (4, 5, 6)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("no photo", encoding="utf-8")
    files = [["a.png", None], ["c.png", "b.png"], [None, "d.png"]]
    photos, reasons = read_photos(tmp_path, files, (2, 2))
    assert photos.shape == (3, 2, 3, 2, 2)
    assert photos[:, :, :, 0, 0].tolist() == [
        [[1, 2, 3], [0, 0, 0]],
        [[0, 0, 0], [4, 5, 6]],
        [[0, 0, 0], [0, 0, 0]],
    ]
    assert list(reasons) == [(1, 0), (2, 1)]
    assert reasons[1, 0].startswith("cannot be decoded")
    assert reasons[2, 1] == "is not there"


def test_a_photo_is_cut_in_the_middle_before_it_is_scaled(tmp_path: Path) -> None:
    wide = np.zeros((40, 80, 3), dtype=np.uint8)
    wide[:, 10:70] = 255  # more than the centred square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert read_photo(tmp_path, "wide.png", (8, 8)).tolist() == np.full((3, 8, 8), 255).tolist()
    assert read_photo(tmp_path, "wide.png", (8, 16))[0, 4, [0, 8, 15]].tolist() == [0, 255, 0]


def test_a_photo_of_a_turned_camera_is_upright(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    for file, kept in (("turned.png", exif.tobytes()), ("damaged.png", b"Exif\0\0MM\0*half")):
        Image.fromarray(pixels).save(tmp_path / file, exif=kept)
    turned = read_photo(tmp_path, "turned.png", (6, 4))
    assert torch.equal(turned[0], torch.tensor(pixels[::-1, :, 0].T.copy()))
    damaged = read_photo(tmp_path, "damaged.png", (4, 6))
    assert torch.equal(damaged[0], torch.tensor(pixels[..., 0]))


def test_a_grey_photo_gets_three_channels(tmp_path: Path) -> None:
    Image.new("L", (3, 2), 77).save(tmp_path / "grey.png")
    assert read_photo(tmp_path, "grey.png", (2, 3)).tolist() == [[[77] * 3] * 2] * 3


def test_a_photo_in_another_case_of_letters_is_named(tmp_path: Path) -> None:
    (tmp_path / "Nel").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "Nel" / "Nel026.JPG")
    if (tmp_path / "NEL" / "nel026.jpg").is_file():
        pytest.skip("this file system takes upper and lower case for the same")
    with raises("is not there, though 'Nel/Nel026.JPG' is (upper and lower case count)"):
        read_photo(tmp_path, "NEL/nel026.jpg", (4, 6))
    with pytest.raises(ValueError, match=r"^is not there$"):
        read_photo(tmp_path, "NEL/nel027.jpg", (4, 6))


@pytest.mark.parametrize("kept", [0, 200, 600], ids=["empty", "header", "half"])
def test_a_truncated_photo_is_refused(tmp_path: Path, kept: int) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    path = tmp_path / "cut.jpg"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with raises("cannot be decoded (", ")"):
        read_photo(tmp_path, "cut.jpg", (4, 6))


@pytest.mark.parametrize(
    ("dtype", "mode"), [(np.uint16, "I;16"), (np.int32, "I"), (np.float32, "F")]
)
def test_pixels_that_pillow_would_clip_are_refused(tmp_path: Path, dtype: type, mode: str) -> None:
    grey = np.linspace(0, 4000, 64).reshape(8, 8).astype(dtype)
    Image.fromarray(grey).save(tmp_path / "deep.tif")
    with raises(f"has pixels of mode '{mode}', not of 8 bits a channel"):
        read_photo(tmp_path, "deep.tif", (4, 4))


def test_a_size_that_is_no_photos_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.bmp")
    raw = bytearray((tmp_path / "a.bmp").read_bytes())
    raw[18:26] = (100_000).to_bytes(4, "little") * 2  # width and height
    (tmp_path / "a.bmp").write_bytes(raw)
    with raises("cannot be decoded (Image size (10000000000 pixels) exceeds limit"):
        read_photo(tmp_path, "a.bmp", (4, 4))


def test_random_flips_turn_both_photos_alike_and_reach_every_turn() -> None:
    photo = torch.arange(12.0).reshape(3, 2, 2)
    turns = set()
    for _ in range(64):
        flipped = random_flips({"clinic": photo, "derm": photo + 1})
        assert torch.equal(flipped["clinic"] + 1, flipped["derm"])
        turns.add(tuple(flipped["clinic"][0].flatten().tolist()))
    assert turns == {(0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0)}
