"""What this machine offers, and the backend each op would take: ``python -m mmfusion.info``."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from mmfusion.functional import why_not_triton

__all__ = ["backends", "main", "report"]

_PACKAGES = ("torch", "triton", "numpy", "einops", "faiss-cpu", "accelerate", "safetensors")
_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def backends(device: torch.device | str | None = None) -> dict[str, dict[str, str]]:
    """What ``backend="auto"`` takes for each op and type, with the reason where not Triton.

    Args:
        device: The first GPU if there is one, else the CPU.

    Raises:
        ValueError: If it is a CUDA device and there is none.

    Example:
        >>> backends("cpu")["retrieve"]["float16"]
        'torch (the tensors are on cpu)'
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device='{device}': no CUDA device is here. Pass 'cpu', or None for what is here."
        )
    ops = {
        "retrieve": ((4, 64), {"k": 8}),
        "retrieve, k=None": ((4, 64), {"k": None}),
        "presence_attention": ((1, 20, 4, 32), {}),
        "class_contrastive": ((4, 64), {}),
    }
    found: dict[str, dict[str, str]] = {}
    for op, (shape, sizes) in ops.items():
        found[op] = {}
        for dtype in _TYPES:
            example = torch.empty(shape, device=device, dtype=dtype)
            reason = why_not_triton(op.split(",")[0], example, **sizes)  # type: ignore[arg-type]
            name = str(dtype).removeprefix("torch.")
            found[op][name] = "triton" if reason is None else f"torch ({reason})"
    return found


def report() -> str:
    """Versions, devices and backends as text.

    Example:
        >>> report().splitlines()[0].startswith("mmfusion")
        True
    """
    lines = [f"{'mmfusion':<20}{sys.modules['mmfusion'].__version__}"]
    lines.append(f"{'python':<20}{sys.version.split()[0]} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            lines.append(f"{package:<20}{version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package:<20}not installed")
    lines.append(f"{'cpu threads':<20}{torch.get_num_threads()}")
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        major, minor = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        lines.append(f"{f'cuda:{index}':<20}{name}, capability {major}.{minor}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        lines.append(f"{'cuda':<20}no device")
    lines += ["", "backend='auto' takes"]
    for op, choices in backends().items():
        kinds: dict[str, list[str]] = {}
        for dtype, choice in choices.items():
            kinds.setdefault(choice, []).append(dtype)
        for choice, dtypes in kinds.items():
            lines.append(f"  {op:<20}{choice} for {', '.join(dtypes)}")
    return "\n".join(lines)


def main() -> None:
    """Print the report.

    Example:
        >>> main()  # doctest: +ELLIPSIS
        mmfusion...
    """
    print(report())


if __name__ == "__main__":
    main()
