"""Joining the processes that a launcher started: gloo between CPUs, nccl between GPUs."""

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def join_processes() -> PartialState:
    """The processes that ``torchrun`` or ``accelerate launch`` started, or this one alone.

    Call it before anything else that asks Accelerate: who asks first decides for good, and on a
    machine without GPU ``PartialState()`` alone leaves every process in a world of its own. Many
    processes on CPUs start with ``torchrun``; ``accelerate launch --cpu`` starts one, whatever its
    ``--num_processes``, unless it is given an MPI host file.

    Example:
        >>> join_processes().num_processes
        1
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu)
