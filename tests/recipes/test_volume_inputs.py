"""What a network gets: the same box whatever the grid, normalised, kept in files, transformed."""

import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose, RandFlipd, RandGaussianNoised
from torch import Tensor

from mmfusion.recipes.volume_inputs import (
    MonaiTransform,
    cached,
    check_settings,
    crop,
    normalise,
    prepare,
    random_mirror,
)
from mmfusion.recipes.volumes import Volume

BOX = np.array([[-20.0, -12.0, -8.0], [12.0, 20.0, 8.0]])
SIZE = (16, 16, 4)


def raises(*parts: str) -> "pytest.RaisesExc[ValueError]":
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


def scan(step: float, turn: float = 0.0) -> Volume:
    """Smooth content in a room of 80 mm, on a grid of ``step`` mm turned about z."""
    count = round(80 / step)
    affine = np.diag([step, step, step, 1.0])
    affine[:2, :2] = step * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    affine[:3, 3] = -affine[:3, :3] @ np.full(3, (count - 1) / 2)
    index = np.indices((count,) * 3).reshape(3, -1)
    x, y, z = affine[:3, :3] @ index + affine[:3, 3:]
    content = 100 + 3 * x - 2 * y + z + 20 * np.sin(y / 10)
    return Volume(torch.from_numpy(content.reshape(1, count, count, count)).float(), affine)


def truth() -> Tensor:
    """The same content at the middles of the voxels of the result."""
    axes = [
        low + (np.arange(n) + 0.5) * (high - low) / n
        for low, high, n in zip(*BOX, SIZE, strict=True)
    ]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return torch.from_numpy(100 + 3 * x - 2 * y + z + 20 * np.sin(y / 10)).float()


@pytest.mark.parametrize("turn", [0.0, 0.3])
@pytest.mark.parametrize("step", [0.5, 1.0, 2.5])
def test_a_box_holds_the_same_content_on_every_grid(step: float, turn: float) -> None:
    found = crop(scan(step, turn), BOX, SIZE)
    assert found.shape == (1, *SIZE)
    torch.testing.assert_close(found[0], truth(), atol=0.4, rtol=0)


def test_small_voxels_are_averaged_not_skipped() -> None:
    noise = Volume(100 + 10 * torch.randn(1, 64, 64, 64), np.eye(4))
    box = np.array([[-0.5] * 3, [63.5] * 3])
    found = crop(noise, box, (16, 16, 8))
    torch.testing.assert_close(found[0, 0, 0, 0], noise.data[0, :4, :4, :8].mean())
    assert found.std() < 2


def test_outside_the_scan_there_is_nothing() -> None:
    volume = Volume(torch.ones(1, 4, 4, 1), np.eye(4))
    box = np.array([[-4.5, -0.5, -0.5], [3.5, 3.5, 0.5]])
    assert crop(volume, box, (8, 4, 1))[0, :, 0, 0].tolist() == [0.0] * 4 + [1.0] * 4


@pytest.mark.parametrize("size", [(8, 8), (8, 0, 8)])
def test_wrong_sizes(size: Any) -> None:
    volume = Volume(torch.ones(1, 4, 4, 4), np.eye(4))
    with raises(f"size={size}", "counts voxels along x, y and z", "Pass three counts"):
        crop(volume, BOX, size)


def test_a_box_upside_down() -> None:
    volume = Volume(torch.ones(1, 4, 4, 4), np.eye(4))
    with raises("box=[[12.0", "has an extent along x, y and z", "Pass its lowest"):
        crop(volume, BOX[::-1], (4, 4, 4))


def test_only_what_is_not_zero_is_normalised() -> None:
    data = torch.zeros(1, 10, 10, 10)
    data[0, :5] = 300 + 40 * torch.randn(5, 10, 10)
    found = normalise(data)
    inside = found[0, :5]
    assert inside.mean().abs() < 1e-5
    assert inside.std(correction=0) == pytest.approx(1, abs=1e-5)
    assert not found[0, 5:].any()


def test_clip_is_in_the_units_of_the_file() -> None:
    data = torch.tensor([-500.0, 0.0, 400.0, 800.0, 1200.0, 99999.0])
    found = normalise(data, clip=(0, 1200))
    assert found[:2].tolist() == [0, 0]  # clipped to zero, so it counts as background
    expected = torch.tensor([400.0, 800.0, 1200.0, 1200.0])
    torch.testing.assert_close(found[2:], (expected - 900) / expected.std(correction=0))


def test_one_hot_voxel_does_not_set_the_scale() -> None:
    data = 100 + torch.randn(10000)
    data[7] = 1e9
    assert normalise(data).std() == pytest.approx(1, abs=0.01)
    assert normalise(data)[7] < 5


@pytest.mark.parametrize("value", [0.1, 1200.0, -3e5])
def test_a_constant_volume_becomes_zero(value: float) -> None:
    assert not normalise(torch.full((1, 7, 7, 7), value)).any()
    assert not normalise(torch.zeros(1, 3, 3, 3)).any()


def test_a_clip_that_does_not_rise() -> None:
    with raises("clip=(5, 5)", "lowest and the highest", "Pass (0, 1200)"):
        check_settings((8, 8, 8), (5, 5))


def test_a_box_beside_the_scan(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), dtype=np.float32), np.eye(4)), path)
    with raises(str(path), "zero throughout the box [[100.0", "lies on the scan", "frame of"):
        prepare(path, BOX + 120, SIZE, None)


def test_a_cache_file_is_made_once_and_anew_for_what_changed(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "deep" / "cache"
    source.write_text("1")
    made = []

    def make() -> Tensor:
        made.append(1)
        return torch.full((2,), float(len(made)))

    first = cached(make, folder, source, "a")
    assert cached(make, folder, source, "a") == first
    assert cached(make, folder, source, "b") != first
    source.write_text("22")
    assert np.load(cached(make, folder, source, "a")).tolist() == [3.0, 3.0]
    assert len(made) == 3
    assert len(list(folder.iterdir())) == 3


def test_a_failure_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("1")

    def fail() -> Tensor:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        cached(fail, tmp_path / "cache", source, "a")
    assert list((tmp_path / "cache").iterdir()) == []


def test_monai_draws_once_for_a_patient_and_from_the_generator_of_torch() -> None:
    names = ["t1", "flair", "adc"]
    steps = Compose(
        [
            RandFlipd(names, prob=0.5, spatial_axis=0, allow_missing_keys=True),
            RandGaussianNoised(names[:1], prob=0.5, allow_missing_keys=True),
        ]
    )
    transform = MonaiTransform(steps)
    volume = torch.arange(24.0).reshape(1, 2, 3, 4)
    flips = []
    for seed in range(12):
        torch.manual_seed(seed)
        one = transform({"flair": volume, "adc": volume})
        torch.manual_seed(seed)
        two = transform({"flair": volume, "adc": volume})
        assert type(one["adc"]) is Tensor
        assert list(one) == ["flair", "adc"]
        assert torch.equal(one["flair"], one["adc"])
        assert torch.equal(one["adc"], two["adc"])
        flips.append(bool((one["adc"] != volume).any()))
    assert 0 < sum(flips) < 12


def test_mirroring_swaps_left_and_right_alike() -> None:
    volume = torch.arange(24.0).reshape(1, 2, 3, 4)
    seen = set()
    for _ in range(32):
        found = random_mirror({"t1": volume, "adc": volume + 1})
        assert torch.equal(found["t1"] + 1, found["adc"])
        assert torch.equal(found["t1"], volume) or torch.equal(found["t1"], volume.flip(1))
        seen.add(float(found["t1"][0, 0, 0, 0]))
    assert seen == {0.0, 12.0}
