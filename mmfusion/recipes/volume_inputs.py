"""From a volume to the input of a network: cut a box out, normalise, keep, transform."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfusion.recipes.volumes import Box, Volume, read_volume

Size = tuple[int, int, int]

VERSION = 1  # raised with every change of what is prepared, so that older caches are not read


def crop(volume: Volume, box: Box, size: Size) -> Tensor:
    """Resample a box of a volume to ``size`` voxels, in one interpolation.

    Linear between voxels; where voxels are smaller than those of the result they are averaged.
    What lies outside the scan is zero.

    Args:
        volume: Of any resolution; an oblique one is straightened.
        box: ``(2, 3)``, mm.
        size: Voxels of the result along x, y and z.

    Shape:
        - result: ``(1, *size)``

    Raises:
        ValueError: If the box has no extent, or a size is below 1.

    Example:
        >>> ramp = torch.arange(8.0)[None, :, None, None].expand(1, 8, 4, 4)
        >>> box = np.array([[1.5, -0.5, -0.5], [5.5, 3.5, 3.5]])
        >>> crop(Volume(ramp, np.eye(4)), box, (2, 1, 1)).flatten().tolist()
        [2.5, 4.5]
    """
    check_settings(size, None)
    extent = box[1] - box[0]
    if not (extent > 0).all():
        raise ValueError(
            f"box={box.tolist()}: a box has an extent along x, y and z. Pass its lowest and its "
            "highest corner, in mm."
        )
    to_voxel = np.linalg.inv(volume.affine)
    density = np.linalg.norm(to_voxel[:3, :3], axis=0)  # voxels per mm, along x, y and z
    finer = np.maximum(1, np.round(extent / size * density)).astype(int)
    # From -1..1 across the box to mm, to voxels, to -1..1 across the volume; torch counts z, y, x.
    across = np.eye(4)
    across[:3, :3], across[:3, 3] = np.diag(extent / 2), box.mean(0)
    shape = np.array(volume.data.shape[1:])
    scale = np.eye(4)
    scale[:3, :3], scale[:3, 3] = np.diag(2 / shape), 1 / shape - 1
    theta = torch.from_numpy((scale @ to_voxel @ across)[[2, 1, 0]])  # of what is x, y, z, 1
    # As F.affine_grid, which takes longer than all the rest: a sum of what each axis contributes.
    steps = [(torch.arange(n, dtype=theta.dtype) + 0.5) * 2 / n - 1 for n in np.array(size) * finer]
    x, y, z = [(step[:, None] * theta[:, axis]).float() for axis, step in enumerate(steps)]
    grid = x[:, None, None] + (y[:, None] + (z + theta[:, 3].float()))  # (X, Y, Z, 3)
    fine = F.grid_sample(volume.data[None], grid[None], align_corners=False)
    return F.avg_pool3d(fine, tuple(finer.tolist()))[0]


def normalise(data: Tensor, clip: tuple[float, float] | None = None) -> Tensor:
    """Clip, then bring the non-zero voxels to mean 0 and standard deviation 1; zeros stay zero.

    Args:
        data: Zero where there is nothing, as outside a stripped skull.
        clip: Lowest and highest value, in the units of the file; voxels clipped to zero count as
            zero. None clips to the 0.5 and 99.5 percentiles of the non-zero voxels.

    Example:
        >>> normalise(torch.tensor([0.0, 100.0, 300.0, 9000.0]), clip=(0, 500)).tolist()
        [0.0, -1.2247..., 0.0, 1.2247...]
    """
    inside = data != 0
    if clip is None:
        low, high = np.percentile(data[inside].numpy(), (0.5, 99.5)) if inside.any() else (0, 1)
        clip = float(low), float(high)
    data = data.clamp(*clip)
    inside &= data != 0
    if not inside.any():
        return torch.zeros_like(data)
    values = data[inside].double()
    mean, scale = float(values.mean()), float(values.std(correction=0))
    flat = scale <= 1e-6 * abs(mean)  # a constant volume becomes zero, not amplified rounding
    return torch.where(inside & (not flat), (data - mean) / (scale or 1), 0)


def prepare(path: Path, box: Box, size: Size, clip: tuple[float, float] | None) -> Tensor:
    """Read a file, cut ``box`` out at ``size``, normalise.

    Raises:
        ValueError: As ``read_volume``, or if the box holds nothing of the scan.
    """
    part = crop(read_volume(path), box, size)
    if not part.any():
        raise ValueError(
            f"{path} is zero throughout the box {box.round(1).tolist()} (mm): the box lies on the "
            "scan. Look whether map and scan have one frame of reference."
        )
    return normalise(part, clip)


def check_settings(size: Size, clip: tuple[float, float] | None) -> None:
    """Refuse settings that no volume could be prepared with.

    Raises:
        ValueError: If ``size`` is not three counts, or ``clip`` not two rising numbers.
    """
    if len(size) != 3 or min(size) < 1:
        raise ValueError(
            f"size={size}: it counts voxels along x, y and z. Pass three counts, such as "
            "(128, 128, 24)."
        )
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(
            f"clip={clip}: it is the lowest and the highest value. Pass (0, 1200), say."
        )


def cached(make: Callable[[], Tensor], folder: Path, source: Path, about: Any) -> Path:
    """The ``.npy`` file of a tensor made from a file, made only where it is not there yet.

    Its name holds all that the tensor depends on: path, size and time of the source, and ``about``.
    A changed source gives another file, and several processes may ask at once.

    Args:
        make: Makes the tensor.
        folder: Of the cache; made if need be.
        source: The file that the tensor is made from.
        about: The settings it is made with; what they print as counts.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     source = Path(folder, "source")
        ...     _ = source.write_text("1")
        ...     path = cached(lambda: torch.ones(2), Path(folder), source, "ones")
        ...     again = cached(lambda: 1 / 0, Path(folder), source, "ones")
        ...     again == path, np.load(path).tolist()
        (True, [1.0, 1.0])
    """
    state = source.stat()
    facts = (VERSION, str(source.resolve()), state.st_size, state.st_mtime_ns, about)
    path = folder / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # A folder of its own for each process, so that none renames the unfinished file of another.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as scratch:
            part = Path(scratch, "tensor.npy")
            np.save(part, make().numpy())
            os.replace(part, path)
    return path


def sweep(folder: Path, older: float = 3600) -> None:
    """Remove what killed processes left unfinished in a cache; a volume takes seconds, not an hour.

    Args:
        folder: Of the cache, if it is there.
        older: Seconds since anything was put there.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, ".part-1").mkdir()
        ...     sweep(Path(folder))
        ...     kept = os.listdir(folder)
        ...     sweep(Path(folder), older=-1)
        ...     kept, os.listdir(folder)
        (['.part-1'], [])
    """
    for part in folder.glob(".part-*"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if time.time() - part.stat().st_mtime > older:
                shutil.rmtree(part, ignore_errors=True)


class MonaiTransform:
    """A dictionary transform of MONAI, drawing from torch's own generator: resuming repeats it.

    Give MONAI's transforms the names of all volumes and ``allow_missing_keys=True``; one draw then
    holds for every volume of a patient that is present.

    Args:
        transform: Of MONAI; takes and returns a dict.

    Example:
        >>> from monai.transforms import RandFlipd
        >>> flip = RandFlipd(["t1", "adc"], prob=0.5, spatial_axis=0, allow_missing_keys=True)
        >>> volumes = MonaiTransform(flip)({"adc": torch.rand(1, 4, 4, 2)})
        >>> list(volumes), type(volumes["adc"]).__name__
        (['adc'], 'Tensor')
    """

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, volumes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Transform the volumes of one patient."""
        self.transform.set_random_state(seed=int(torch.randint(2**31, ())))
        done = self.transform(dict(volumes))
        return {name: torch.as_tensor(done[name]).as_subclass(Tensor) for name in volumes}


def random_mirror(volumes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Swap left and right in half of the patients, in all volumes alike: a ``transform``.

    Args:
        volumes: The volumes present, ``(1, X, Y, Z)`` each.

    Example:
        >>> volume = torch.rand(1, 2, 3, 4)
        >>> mirrored = random_mirror({"t1": volume, "adc": volume})
        >>> bool((mirrored["t1"] == mirrored["adc"]).all())
        True
    """
    axes = [-3] if torch.rand(()) < 0.5 else []
    return {name: volume.flip(axes) for name, volume in volumes.items()}
