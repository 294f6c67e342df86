"""Synthetic releases: marked as such, there whole or not at all, never over somebody's data."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MARKER = "SYNTHETIC.txt"


def write_release(
    root: str | Path, name: str, about: Mapping[str, Any], write: Callable[[Path], object]
) -> Path:
    """Let ``write`` fill a folder, mark it and move it to ``root``, or reuse its twin.

    A ``root`` that already holds the release of the same arguments is left as it is; one that holds
    anything else is refused, never overwritten.

    Args:
        root: The folder to make; its parents are made too.
        name: Of the data set in whose format it is.
        about: Everything the content depends on, a version of the writer included.
        write: Called with an empty folder.

    Returns:
        ``root``.

    Raises:
        ValueError: If ``root`` holds something else.

    Example:
        >>> def write(folder):
        ...     _ = (folder / "table.csv").write_text("ID")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_release(Path(folder, "data"), "nobody", {"seed": 0}, write)
        ...     sorted(path.name for path in root.iterdir())
        ['SYNTHETIC.txt', 'table.csv']
    """
    root = Path(root).expanduser()
    marker = f"SYNTHETIC: drawn by mmfusion in the format of {name}. No patient, no clinical"
    marker += " meaning.\n" + "".join(f"{key}={value}\n" for key, value in about.items())
    if _holds(root, marker, about):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as scratch:
        release = Path(scratch) / "release"
        release.mkdir()
        (release / MARKER).write_text(marker, encoding="utf-8", newline="\n")
        write(release)
        try:
            if root.exists():
                root.rmdir()  # an empty folder gives way; Windows would not rename onto it
            os.rename(release, root)
        except OSError:  # another process was faster
            if not _holds(root, marker, about):
                raise
    return root


def _holds(root: Path, marker: str, about: Mapping[str, Any]) -> bool:
    """Whether ``root`` is the release of this marker; a free or empty ``root`` is not."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    found = root / MARKER
    text = found.read_text(encoding="utf-8") if found.is_file() else "no " + MARKER
    if text != marker:
        wanted = " ".join(f"{key}={value}" for key, value in about.items())
        raise ValueError(
            f"root={str(root)!r} holds {' '.join(text.split())!r}: an existing folder is reused "
            f"only if it is the same release ({wanted}) and is never overwritten. Pass another "
            "root, or remove that folder yourself."
        )
    return True
