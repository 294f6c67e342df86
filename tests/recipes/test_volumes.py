"""NIfTI as it comes: one content in every encoding reads alike, and what is broken is named."""

import gzip
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from mmfusion.recipes.volumes import (
    Volume,
    centre_box,
    read_centre_box,
    read_volume,
    tumour_box,
)

SHAPE = (5, 6, 7)
AFFINE = np.array([[2.0, 0, 0, -3], [0, 1.5, 0, 10], [0, 0, 4, -20], [0, 0, 0, 1]])
# Halves, so that integers with a slope of one half hold them; some are negative.
CONTENT = (np.arange(210).reshape(SHAPE) * 13 % 97 - 20) / 2


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE, **kind: Any) -> Path:
    make = nib.Nifti2Image if kind.get("version") == 2 else nib.Nifti1Image
    header = make.header_class(endianness=kind.get("endian", "<"))
    header.set_data_dtype(data.dtype)
    image = make(data, affine, header)
    if "slope" in kind:
        image.header.set_slope_inter(kind["slope"], kind["inter"])
    nib.save(image, path)
    return path


def turn(image: Any, axes: str) -> Any:
    now, wanted = nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes)
    return image.as_reoriented(nib.orientations.ornt_transform(now, wanted))


def turned(axes: str) -> tuple[np.ndarray, np.ndarray]:
    """The content with its axes along ``axes``, and the affine that says so."""
    image = turn(nib.Nifti1Image(CONTENT, AFFINE), axes)
    assert "".join(nib.aff2axcodes(image.affine)) == axes
    return np.asarray(image.dataobj), image.affine


def raises(*parts: str) -> "pytest.RaisesExc[ValueError]":
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


def check(path: Path, content: np.ndarray = CONTENT) -> None:
    volume = read_volume(path)
    assert volume.data.dtype == torch.float32
    assert volume.data.is_contiguous()
    assert torch.equal(volume.data, torch.from_numpy(content).float()[None])
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "LIA", "PSR", "IRP"])
def test_orientation_comes_from_the_affine(tmp_path: Path, axes: str) -> None:
    data, affine = turned(axes)
    check(save(tmp_path / "a.nii.gz", data, affine))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats(tmp_path: Path, suffix: str, version: int, endian: str, dtype: Any) -> None:
    data = CONTENT.astype(np.dtype(dtype).newbyteorder(endian))
    check(save(tmp_path / f"a{suffix}", data, version=version, endian=endian))


@pytest.mark.parametrize("endian", ["<", ">"])
def test_integers_with_negatives_are_scaled(tmp_path: Path, endian: str) -> None:
    stored = (2 * CONTENT - 60).astype(np.int16)
    assert stored.min() < 0 < CONTENT.max()
    check(save(tmp_path / "a.nii.gz", stored, slope=0.5, inter=30, endian=endian))


@pytest.mark.parametrize("slope", [0.0, float("nan")])
def test_a_slope_of_zero_or_nan_means_unscaled(tmp_path: Path, slope: float) -> None:
    path = save(tmp_path / "a.nii", (2 * CONTENT).astype(np.int16))
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([slope, 5.0], dtype="<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(raw)
    check(path, 2 * CONTENT)


@pytest.mark.parametrize("tail", [(1,), (1, 1)])
def test_trailing_axes_of_length_one_are_dropped(tmp_path: Path, tail: tuple[int, ...]) -> None:
    check(save(tmp_path / "a.nii.gz", CONTENT.reshape(*SHAPE, *tail)))


def test_a_4d_file_needs_an_index(tmp_path: Path) -> None:
    path = save(tmp_path / "dwi.nii.gz", np.stack([CONTENT + 1, CONTENT + 2], axis=-1))
    with raises(str(path), "shape (5, 6, 7, 2)", "holds 2 volumes, and one is meant", "index="):
        read_volume(path)
    expected = torch.from_numpy(CONTENT + 2).float()
    assert torch.equal(read_volume(path, index=1).data[0], expected)
    with raises("index=2 of", str(path), "Pass 0 to 1"):
        read_volume(path, index=2)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7, 1, 3), (5, 0, 7)])
def test_other_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = save(tmp_path / "a.nii", np.ones(shape, dtype=np.float32))
    with raises(str(path), "a volume has three axes", "Convert it"):
        read_volume(path)


def test_colours_and_complex_numbers(tmp_path: Path) -> None:
    colours = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    for data in (colours, CONTENT.astype(np.complex64)):
        path = save(tmp_path / "a.nii", data)
        with raises(str(path), "holds voxels of type", "real numbers"):
            read_volume(path)


def test_other_formats(tmp_path: Path) -> None:
    path = tmp_path / "a.mgz"
    nib.save(nib.MGHImage(CONTENT.astype(np.float32), AFFINE), path)
    with raises(str(path), "is a MGHImage", "NIfTI files", "Convert it"):
        read_volume(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with raises(str(tmp_path / "a.nii"), "is not there", "Restore it"):
        read_volume(tmp_path / "a.nii")


def broken_header(raw: bytes) -> bytes:
    return raw[:40] + b"\xff\x7f" + raw[42:]  # 32767 axes


def unknown_type(raw: bytes) -> bytes:
    return raw[:70] + b"\x63\x00" + raw[72:]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-100],
        lambda raw: raw[:100],
        lambda raw: b"",
        lambda raw: b"no volume at all",
        broken_header,
        unknown_type,
    ],
    ids=["cut off", "cut in the header", "empty", "text", "header", "data type"],
)
def test_damage_is_named_by_path(tmp_path: Path, suffix: str, damage: Any) -> None:
    path = save(tmp_path / f"a{suffix}", CONTENT)
    raw = path.read_bytes()
    if suffix == ".nii.gz" and damage in (broken_header, unknown_type):
        path.write_bytes(gzip.compress(damage(gzip.decompress(raw))))
    else:
        path.write_bytes(damage(raw))
    with raises(f"{path} cannot be read (", "a whole NIfTI file", "Restore it"):
        read_volume(path)


def test_flipped_bits_in_a_compressed_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.random.default_rng(0).normal(size=(20, 20, 20)))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 :] = bytes(255 - byte for byte in raw[len(raw) // 2 :])
    path.write_bytes(raw)
    with raises(f"{path} cannot be read (", "Restore it"):
        read_volume(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_voxels_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    data = CONTENT.copy()
    data[1, 2, 3:5] = value
    path = save(tmp_path / "a.nii.gz", data)
    with raises(str(path), "2 voxels of 210 that are NaN or infinite", "holds numbers", "Repair"):
        read_volume(path)


def test_a_volume_of_zeros(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.zeros(SHAPE, dtype=np.int16))
    with raises(str(path), "zero throughout", "left out, not zero", "Remove"):
        read_volume(path)


def test_a_file_without_orientation(tmp_path: Path) -> None:
    image = nib.Nifti1Image(CONTENT, None)
    image.header["qform_code"] = image.header["sform_code"] = 0
    nib.save(image, tmp_path / "a.nii")
    with raises(
        str(tmp_path / "a.nii"), "neither a qform nor an sform", "never guessed", "Set one"
    ):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize("entry", [0.0, np.nan])
def test_an_affine_that_maps_to_a_plane(tmp_path: Path, entry: float) -> None:
    path = save(tmp_path / "a.nii", CONTENT)
    raw = bytearray(path.read_bytes())
    raw[280:284] = np.array([entry], dtype="<f4").tobytes()  # srow_x[0]
    path.write_bytes(raw)
    with raises(str(path), "has the affine", "three axes", "Repair the header"):
        read_volume(path)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LIA"])
def test_the_box_of_a_tumour_is_the_same_in_every_orientation(tmp_path: Path, axes: str) -> None:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[1:3, 4, 2:6] = 3
    labels[0, 0, 0] = 2
    nib.save(turn(nib.Nifti1Image(labels, AFFINE), axes), tmp_path / "a.nii.gz")
    # Voxels 1..2, 4 and 2..5 with half a voxel around them, in mm, and 1 mm of margin.
    low = AFFINE[:3, :3] @ [0.5, 3.5, 1.5] + AFFINE[:3, 3] - 1
    high = AFFINE[:3, :3] @ [2.5, 4.5, 5.5] + AFFINE[:3, 3] + 1
    box = tumour_box(tmp_path / "a.nii.gz", labels=(1, 3), margin=1.0)
    np.testing.assert_allclose(box, [low, high], atol=1e-5)
    whole = tumour_box(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(whole[0], AFFINE[:3, :3] @ [-0.5, -0.5, -0.5] + AFFINE[:3, 3])


def test_a_map_without_the_labels(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[1, 1, 1] = 2
    path = save(tmp_path / "a.nii.gz", labels)
    with raises(str(path), "no voxel of labels (1, 3)", "marks the tumour", "Pass the labels"):
        tumour_box(path, labels=(1, 3))


def test_the_box_in_the_middle_is_no_larger_than_the_scan() -> None:
    volume = Volume(torch.ones(1, 100, 100, 10), np.diag([2.0, 2.0, 3.0, 1.0]))
    box = centre_box(volume)
    assert (box[1] - box[0]).tolist() == [160.0, 190.0, 30.0]
    np.testing.assert_allclose(box.mean(0), [99.0, 99.0, 13.5])


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LIA"])
def test_the_box_in_the_middle_takes_no_voxel(tmp_path: Path, axes: str) -> None:
    data, affine = turned(axes)
    path = save(tmp_path / "a.nii", data, affine)
    np.testing.assert_allclose(read_centre_box(path), centre_box(read_volume(path)), atol=1e-4)
    whole = path.read_bytes()
    path.write_bytes(whole[:352])  # the header alone
    assert read_centre_box(path).shape == (2, 3)
    path.write_bytes(whole[:200])
    with raises(f"{path} cannot be read (", "Restore it"):
        read_centre_box(path)
