"""The files of a case, whatever their kind, as tensors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfusion.recipes.custom_layout import Case, CustomLayout
from mmfusion.recipes.images import read_photo
from mmfusion.recipes.volume_inputs import crop, normalise
from mmfusion.recipes.volumes import centre_box, read_volume


def read_modality(
    root: Path, file: Path, name: str, layout: CustomLayout, shape: Sequence[int]
) -> Tensor:
    """Read a file of a case: a photo as uint8, a volume resampled and z-scored, a vector as it is.

    Args:
        root: The folder that paths are relative to.
        file: The file below it, or anywhere.
        name: Of the modality.
        layout: Says what kind it is.
        shape: Of the modality.

    Raises:
        ValueError: With the reason alone; the caller knows the case.
    """
    if name in layout.photos:
        return read_photo(root, str(file), (shape[1], shape[2]))
    if name in layout.volumes:
        volume = read_volume(file)
        whole = centre_box(volume, (np.inf,) * 3)
        return normalise(crop(volume, whole, (shape[1], shape[2], shape[3])))
    vector = read_vector(file)
    if vector.shape != tuple(shape):
        raise ValueError(f"has {len(vector)} numbers, and the first one {shape[0]}")
    return vector


def read_vector(path: Path) -> Tensor:
    """Read a ``.npy`` file with one vector of finite numbers.

    Args:
        path: The file.

    Shape:
        - result: ``(F,)``, float32

    Raises:
        ValueError: With the reason alone; the caller knows the case.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(Path(folder, "ecg.npy"), np.arange(3))
        ...     read_vector(Path(folder, "ecg.npy"))
        tensor([0., 1., 2.])
    """
    try:
        array = np.load(path, allow_pickle=False)
        vector = torch.from_numpy(np.asarray(array, np.float32))
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise ValueError(f"cannot be read as numbers ({error})") from None
    if vector.ndim != 1 or not vector.isfinite().all():
        raise ValueError(f"has shape {tuple(vector.shape)} or NaN: one vector of finite numbers")
    return vector


def width_of(name: str, cases: Sequence[Case]) -> int:
    """Numbers in the first vector of a modality that can be read.

    Raises:
        ValueError: If none can.
    """
    reasons = []
    for case in cases:
        if name in case.files:
            try:
                return len(read_vector(case.files[name]))
            except ValueError as error:
                reasons.append(f"{case.files[name]} {error}")
    raise ValueError(
        f"vectors: no file of {name!r} can be read ({reasons[0]}): each holds one vector. Save "
        "them with numpy.save, or leave the modality out of the layout."
    )
