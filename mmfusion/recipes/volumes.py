"""Read a NIfTI file as it is meant, and find the box of a tumour in a label map.

Positions are in millimetres of the scanner frame (RAS+: x to the right, y to the front, z up), the
one thing that sequences of different orientation and resolution share.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from torch import Tensor

Box = NDArray[np.float64]  # (2, 3): lowest and highest corner, mm

CENTRE_MM = (160.0, 190.0, 140.0)  # a box around a brain, for volumes without a tumour box


class Volume(NamedTuple):
    """Voxels, and where they are.

    Attributes:
        data: ``(1, X, Y, Z)``, float32; axes run to the right, to the front and up.
        affine: ``(4, 4)``, float64, from voxel indices to millimetres.
    """

    data: Tensor
    affine: NDArray[np.float64]


def read_volume(path: str | Path, *, index: int | None = None) -> Volume:
    """Read one NIfTI file, in canonical orientation and in the units that its header states.

    NIfTI-1 and NIfTI-2, compressed or not, of either byte order; integers are scaled by
    ``scl_slope`` and ``scl_inter``; trailing axes of length 1 are dropped. Axes are permuted and
    flipped as the affine says, never interpolated.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        index: Which volume of a 4-D file; such a file is refused without it.

    Raises:
        ValueError: If the file is not there or not readable, is no volume of real numbers, has no
            orientation, or holds NaN, infinite or only zero voxels; the message names the file.

    Example:
        >>> import tempfile
        >>> data = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
        >>> image = nib.Nifti1Image(data, np.diag([-1.0, -1.0, 3.0, 1.0]))  # x to the left
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     nib.save(image, Path(folder, "t1.nii.gz"))
        ...     volume = read_volume(Path(folder, "t1.nii.gz"))
        >>> volume.data.shape, volume.data[0, -1, -1].tolist()
        (torch.Size([1, 2, 3, 4]), [0.0, 1.0, 2.0, 3.0])
        >>> volume.affine.diagonal().tolist()
        [1.0, 1.0, 3.0, 1.0]
    """
    path = Path(path)
    with _opened(path, index) as image:
        if image.ndim > 3:
            image = image.slicer[(..., *([index or 0] + [0] * (image.ndim - 4)))]
        with np.errstate(over="ignore"):  # what overflows is infinite, and refused below
            data = image.get_fdata(dtype=np.float32, caching="unchanged")
    orientation = nib.io_orientation(image.affine)
    affine = image.affine @ nib.orientations.inv_ornt_aff(orientation, data.shape)
    data = np.ascontiguousarray(nib.apply_orientation(data, orientation))
    _check_voxels(path, data)
    return Volume(torch.from_numpy(data)[None], affine)


def tumour_box(path: str | Path, *, labels: Sequence[int] = (), margin: float = 0.0) -> Box:
    """The smallest box around the tumour of a label map, in millimetres.

    It comes from the voxels of the map itself: no label is ever interpolated, and the map may have
    another resolution or orientation than the volumes.

    Args:
        path: A NIfTI label map.
        labels: Which labels are tumour; empty takes every label but 0.
        margin: Added on every side, mm.

    Returns:
        ``(2, 3)``: the lowest and the highest corner.

    Raises:
        ValueError: As ``read_volume``, or if no voxel has such a label.

    Example:
        >>> import tempfile
        >>> data = np.zeros((8, 8, 4), dtype=np.uint8)
        >>> data[2:4, 5, 1] = 1
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "tumour.nii.gz")
        ...     nib.save(nib.Nifti1Image(data, np.diag([1.0, 1.0, 2.0, 1.0])), path)
        ...     tumour_box(path).tolist()
        [[1.5, 4.5, 1.0], [3.5, 5.5, 3.0]]
    """
    data, affine = read_volume(path)
    kept = torch.isin(data[0], torch.tensor(labels, dtype=data.dtype)) if labels else data[0] != 0
    found = kept.nonzero().numpy()
    if not len(found):
        raise ValueError(
            f"{path} has no voxel of labels {tuple(labels)}: a label map marks the tumour. Pass "
            "the labels it uses, or leave the map out."
        )
    box = _bounds(affine, found.min(0) - 0.5, found.max(0) + 0.5)
    return box + np.array([[-margin], [margin]])


def centre_box(volume: Volume, extent: Sequence[float] = CENTRE_MM) -> Box:
    """A box in the middle of what was scanned, for volumes without a tumour box.

    Args:
        volume: Sets the middle.
        extent: Sides of the box, mm; a side longer than the scan is cut to it.

    Example:
        >>> centre_box(Volume(torch.ones(1, 10, 10, 10), np.eye(4)), (4.0, 4.0, 99.0)).tolist()
        [[2.5, 2.5, -0.5], [6.5, 6.5, 9.5]]
    """
    return _centre(volume.affine, volume.data.shape[1:], extent)


def read_centre_box(path: str | Path) -> Box:
    """``centre_box`` of a file, of which the header alone is read.

    Args:
        path: As for ``read_volume``.

    Raises:
        ValueError: As ``read_volume``, but for what the voxels hold.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "t1.nii.gz")
        ...     nib.save(nib.Nifti1Image(np.ones((10, 10, 10)), np.eye(4)), path)
        ...     read_centre_box(path).tolist()
        [[-0.5, -0.5, -0.5], [9.5, 9.5, 9.5]]
    """
    with _opened(Path(path), None) as image:
        return _centre(image.affine, image.shape[:3], CENTRE_MM)


@contextmanager
def _opened(path: Path, index: int | None) -> Iterator[Any]:
    """The image, its header checked; what cannot be read of it within names the file."""
    if not path.is_file():
        raise ValueError(f"{path} is not there: a volume is a NIfTI file. Restore it.")
    try:
        image: Any = nib.load(path)
        _check_header(path, image, index)
        yield image
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read ({' '.join(str(error).split())}): a volume is a whole NIfTI "
            "file. Restore it, or convert it anew."
        ) from None


def _centre(affine: NDArray[np.float64], shape: Sequence[int], extent: Sequence[float]) -> Box:
    low, high = _bounds(affine, -0.5, np.array(shape) - 0.5)
    half = np.minimum(np.array(extent), high - low) / 2
    return np.stack([(low + high) / 2 - half, (low + high) / 2 + half])


def _bounds(affine: NDArray[np.float64], low: Any, high: Any) -> Box:
    """The box in mm around a box of voxel indices."""
    corners = np.stack(np.meshgrid(*np.stack(np.broadcast_arrays(low, high), -1)))
    points = affine[:3, :3] @ corners.reshape(3, -1) + affine[:3, 3:]
    return np.stack([points.min(1), points.max(1)])


def _check_header(path: Path, image: Any, index: int | None) -> None:
    if not isinstance(image, nib.Nifti1Pair):
        raise ValueError(
            f"{path} is a {type(image).__name__}: volumes are NIfTI files. Convert it to .nii.gz."
        )
    shape, kind = image.shape, image.get_data_dtype()
    if kind.kind not in "iuf":
        raise ValueError(
            f"{path} holds voxels of type {kind}: a volume holds real numbers. Convert it."
        )
    real = image.affine[:3, :3]
    if not (image.header["qform_code"] or image.header["sform_code"]):
        raise ValueError(
            f"{path} has neither a qform nor an sform: orientation comes from the affine and is "
            "never guessed. Set one, or convert the file anew from DICOM."
        )
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(real)) < 1e-9:
        raise ValueError(
            f"{path} has the affine {real.tolist()}: it must be finite and map to a space of three "
            "axes. Repair the header, or convert the file anew."
        )
    depth = shape[3] if len(shape) > 3 else 1
    if len(shape) < 3 or 0 in shape or any(n != 1 for n in shape[4:]):
        raise ValueError(
            f"{path} has shape {shape}: a volume has three axes, or a fourth to index. Convert it."
        )
    if depth > 1 and index is None:
        raise ValueError(
            f"{path} has shape {shape}: it holds {depth} volumes, and one is meant. Pass index=, "
            "or save the one that is meant to a file of its own."
        )
    if index is not None and not 0 <= index < depth:
        raise ValueError(
            f"index={index} of {path}, shape {shape}: it holds {depth} volumes. Pass 0 to "
            f"{depth - 1}."
        )


def _check_voxels(path: Path, data: NDArray[np.float32]) -> None:
    bad = data.size - int(np.isfinite(data).sum())
    if bad:
        raise ValueError(
            f"{path} has {bad} voxels of {data.size} that are NaN or infinite: an observed volume "
            "holds numbers. Repair it (0 is background), or leave it out."
        )
    if not data.any():
        raise ValueError(
            f"{path} is zero throughout: a volume that was not taken is left out, not zero. Remove "
            "it, or restore the true one."
        )
