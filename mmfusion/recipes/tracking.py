"""What a run tells while it goes on: TensorBoard files, and the memory it took."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Tracker:
    """Numbers over steps, in a folder that ``tensorboard --logdir`` shows.

    Args:
        folder: For the event files; None keeps nothing.
        step: The first to come: what an earlier run told from there on is taken back.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, Tracker(Path(folder), step=0) as tracker:
        ...     tracker.tell({"loss": 0.5}, step=0)
        ...     len(list(Path(folder).iterdir()))
        1
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self._writer = SummaryWriter(folder, purge_step=step)

    def tell(self, values: Mapping[str, float | Tensor], step: int) -> None:
        """Add a point to the curve of each name."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()


def peak_memory(device: torch.device) -> float:
    """Most memory this process has had so far, in MB: of its GPU, else of the machine.

    Example:
        >>> peak_memory(torch.device("cpu")) > 1
        True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3  # bytes there, KB elsewhere
