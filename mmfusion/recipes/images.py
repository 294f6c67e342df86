"""Photos that readers share: decoded and scaled once, the unreadable noted, flipped jointly."""

import contextlib
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

Photos = dict[str, Tensor]
# What Pillow raises on damaged EXIF (warnings, where they are errors); a full memory is none of it.
DAMAGED = (SyntaxError, ValueError, KeyError, TypeError, struct.error, UserWarning)


class BrokenPhoto(NamedTuple):
    """A photo that a table names and that cannot be read.

    Attributes:
        row: 0-based position in the table.
        column: The modality: ``"clinic"``, ``"derm"``, ``"left"`` and so on.
        file: The name, as the table spells it.
        reason: Why it cannot be read.
    """

    row: int
    column: str
    file: str
    reason: str


def read_photo(images: Path, file: str, size: tuple[int, int]) -> Tensor:
    """Read a photo as RGB, cut to the largest centred box of the wanted aspect, and scale it.

    It is turned upright first, as its EXIF says.

    Args:
        images: The folder of all photos.
        file: The name below it, in the spelling of the table.
        size: Height and width.

    Shape:
        - result: ``(3, H, W)``, uint8

    Raises:
        ValueError: With the reason alone; the caller knows the row and the column.
    """
    path = images / file
    if not path.is_file():
        other = _other_case(images, file)
        raise ValueError(
            f"is not there, though {other!r} is (upper and lower case count)"
            if other
            else "is not there"
        )
    try:
        with Image.open(path) as photo:
            if photo.mode[0] in "IF":  # which Pillow would clip to 0..255, without a word
                raise ValueError(f"has pixels of mode {photo.mode!r}, not of 8 bits a channel")
            photo.load()
            with contextlib.suppress(*DAMAGED):  # the pixels are as they are
                ImageOps.exif_transpose(photo, in_place=True)
            rgb = photo.convert("RGB")
    # SyntaxError is Pillow's word for a broken header; a damaged size may be one that it refuses.
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be decoded ({error})") from None
    fitted = ImageOps.fit(rgb, (size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def read_photos(
    images: Path, files: Sequence[Sequence[str | None]], size: tuple[int, int]
) -> tuple[Tensor, dict[tuple[int, int], str]]:
    """Read the photos of all cases at once, over all cores.

    Args:
        images: The folder of all photos.
        files: For each case its photos; None where there is none.
        size: Height and width.

    Returns:
        The photos, black where there is none, and the reasons of those that cannot be read, by case
        and photo.

    Shape:
        - photos: ``(B, P, 3, H, W)``, uint8
    """
    slots = [(i, j) for i, case in enumerate(files) for j in range(len(case))]
    num_photos = len(files[0]) if files else 0
    photos = torch.zeros(len(files), num_photos, 3, *size, dtype=torch.uint8)

    def load(slot: tuple[int, int]) -> str:
        file = files[slot[0]][slot[1]]
        try:
            if file is not None:
                photos[slot] = read_photo(images, file, size)
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as pool:  # decoding releases the GIL
        reasons = zip(slots, pool.map(load, slots), strict=True)
        return photos, {slot: reason for slot, reason in reasons if reason}


def transformed(photos: Photos, transform: Callable[[Photos], Photos] | None) -> Photos:
    """The photos of one case after a transform that sees all of them together.

    It gets copies, so that one that works in place changes no volume that a reader keeps in memory.

    Raises:
        ValueError: If the transform returns other photos than it was given.
    """
    if transform is None:
        return photos
    found = transform({name: photo.clone() for name, photo in photos.items()})
    if sorted(found) != sorted(photos):
        raise ValueError(
            f"transform returned {sorted(found)} for {list(photos)}: it returns the photos it was "
            "given, under their names. Hide modalities with mmfusion.missingness instead."
        )
    return found


def random_flips(photos: Photos) -> Photos:
    """Flip the photos of one case, all of them alike: a ``transform`` for the readers.

    Each axis is flipped with probability one half, drawn from torch's own generator.

    Args:
        photos: The photos present, ``(3, H, W)`` each.

    Example:
        >>> photo = torch.rand(3, 2, 2)
        >>> flipped = random_flips({"clinic": photo, "derm": photo})
        >>> bool((flipped["clinic"] == flipped["derm"]).all())
        True
    """
    axes = [axis for axis in (-2, -1) if torch.rand(()) < 0.5]
    return {name: photo.flip(axes) for name, photo in photos.items()}


def check_choice(name: str, value: str, choices: Sequence[str] | Mapping[str, object]) -> None:
    """Refuse a word that is none of ``choices``.

    Raises:
        ValueError: With the words that are.
    """
    if value not in choices:
        raise ValueError(
            f"{name}={value!r}: {name} is one of a few words. Pass one of {', '.join(choices)}."
        )


def check_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width, of a side or of both.

    Raises:
        ValueError: If a side has no pixel.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(
            f"image_size={image_size}: a photo has at least one pixel each way. Pass the side, or "
            "(height, width)."
        )
    return height, width


def _other_case(images: Path, file: str) -> str | None:
    """A file whose name differs in upper and lower case alone."""
    parent, _, name = file.lower().rpartition("/")
    folders = [folder for folder in images.iterdir() if folder.name.lower() == parent]
    for path in (path for folder in folders for path in folder.iterdir()):
        if path.name.lower() == name:
            return path.relative_to(images).as_posix()
    return None
