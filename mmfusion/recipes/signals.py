"""Stopping when the machine asks for it, at a moment of our own choosing."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


def ignore_sigterm(worker: int) -> None:
    """Let a ``DataLoader`` worker outlive SIGTERM, as its ``worker_init_fn``.

    Schedulers send the signal to all processes of a job. A worker that died of it would fail the
    step under way; the main process ends its workers when it has saved.

    Args:
        worker: Its number.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # one that waited is ignored


@contextlib.contextmanager
def holding_sigterm() -> Iterator[None]:
    """Let SIGTERM wait while workers start, which inherit that until they ignore it.

    Example:
        >>> with holding_sigterm():
        ...     signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        True
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest:
    """While in use, SIGTERM is noted instead of ending the process at once.

    Schedulers send it some seconds before they take the machine away. Outside the main thread,
    where Python installs no handlers, nothing is noted.

    Attributes:
        noted: Whether the signal has come.

    Example:
        >>> import os
        >>> with StopRequest() as request:
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     request.noted
        True
    """

    exit_code = 128 + signal.SIGTERM  # what a shell reports for a process the signal ended

    def __init__(self) -> None:
        self.noted = False
        self._before: Any = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
