"""Missing-modality patterns as things to draw, name, save and compare.

Everything of ``patterns.py`` is public here too: ``missingness.hide`` is the name to use.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from mmfusion.patterns import (
    Rates,
    all_patterns,
    check_present,
    curriculum,
    hide,
    not_at_random,
    per_modality,
    plain_rates,
    sample_rate,
    slot_rate,
)

__all__ = [
    "PatternSet",
    "all_patterns",
    "curriculum",
    "hide",
    "not_at_random",
    "per_modality",
    "sample_rate",
    "slot_rate",
]


@dataclass(frozen=True, eq=False)
class PatternSet:
    """Patterns drawn once, with their provenance: print them, hash them, save them.

    ``patterns[i]`` is one pattern or a slice of them, ``len`` the number of samples. ``present`` is
    held as a copy on the CPU. Two sets are the same if their ``hash`` is.

    Args:
        present: The patterns.
        names: The modalities, in the order of the columns.
        kind: Name of the function that drew them; it says what ``rate`` means.
        rate: The nominal rate or rates given to it.
        seed: The seed of the draw.
        split: The split the samples belong to.

    Shape:
        - ``present``: ``(B, M)`` bool

    Raises:
        ValueError: If ``present`` is not ``(B, M)`` bool, is empty, or its columns have no distinct
            names.

    Example:
        >>> patterns = PatternSet.draw("slot_rate", 8, ("derm", "meta"), 0.25, seed=0, split="test")
        >>> print(patterns)
        PatternSet test: 8 samples x 2 modalities (derm, meta), seed 0
        nominal slot_rate 0.25; realised sample_rate 0.5000, slot_rate 0.2500
        sha256 ...
    """

    present: Tensor
    names: Sequence[str]
    kind: str
    rate: Rates
    seed: int
    split: str

    def __post_init__(self) -> None:
        check_present(self.present)
        names = tuple(self.names)
        if not len(self) or self.present.shape[1] != len(names) or len(set(names)) < len(names):
            raise ValueError(
                f"present of shape {tuple(self.present.shape)} with names={names}: a row is a "
                "sample, a column has its own name. Pass some rows, and one distinct name a column."
            )
        plain = {"present": self.present.detach().cpu().clone(), "names": names}
        plain |= {"rate": plain_rates(self.rate), "seed": int(self.seed)}
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @classmethod
    def draw(
        cls,
        kind: str,
        num_samples: int,
        names: Sequence[str],
        rate: Rates,
        *,
        seed: int,
        split: str,
        cause: Tensor | None = None,
    ) -> "PatternSet":
        """Draw with a generator made from ``seed`` and ``split``; the global one is not touched.

        Args:
            kind: ``"sample_rate"``, ``"slot_rate"``, ``"per_modality"`` or ``"not_at_random"``.
            num_samples: Number of samples in the split, ``B``.
            names: The modalities, in declared order.
            rate: The rate, or for the last two kinds the rates, of that function.
            seed: Any integer.
            split: Name of the split; one seed gives every split a draw of its own.
            cause: For ``"not_at_random"`` only: what absence depends on, ``(B,)``.

        Raises:
            ValueError: If ``kind`` is unknown, ``cause`` does not belong to it or is not ``(B,)``,
                or the function refuses its arguments.
        """
        size = (num_samples, len(names))
        draws: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
            "sample_rate": (sample_rate, size),
            "slot_rate": (slot_rate, size),
            "per_modality": (per_modality, size[:1]),
            "not_at_random": (not_at_random, (cause,)),
        }
        if kind not in draws:
            raise ValueError(f"kind={kind!r}: that draws nothing. Pass one of {', '.join(draws)}.")
        entries = None if cause is None else len(cause)
        if entries != (num_samples if kind == "not_at_random" else None):
            raise ValueError(
                f"kind={kind!r}, num_samples={num_samples} with {entries} causes: 'not_at_random', "
                "and it alone, has one cause per sample. Pass cause=labels there, None elsewhere."
            )
        digest = hashlib.sha256(f"{int(seed)}/{split}".encode()).digest()
        generator = Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        function, where = draws[kind]
        return cls(function(*where, rate, generator), names, kind, rate, seed, split)

    def realised(self) -> dict[str, float]:
        """Measure both rates: ``{"sample_rate": ..., "slot_rate": ...}``."""
        absent = ~self.present.numpy()
        return {"sample_rate": float(absent.any(1).mean()), "slot_rate": float(absent.mean())}

    @property
    def hash(self) -> str:
        """Sha256 of the patterns and their provenance, the same on every platform and version."""
        canonical = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``.json`` or ``.npz`` file with the hash in it, whole or not at all.

        Args:
            path: Where to; its suffix is the format.

        Raises:
            ValueError: If the suffix is another one.
        """
        path = _check_suffix(path)
        content = self._content() | {"hash": self.hash}
        buffer = io.BytesIO()
        if path.suffix == ".npz":
            del content["rows"]
            about = np.array(json.dumps(content))
            np.savez_compressed(buffer, present=self.present.numpy(), about=about)
        else:
            buffer.write(json.dumps(content, indent=1).encode() + b"\n")
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_bytes(buffer.getvalue())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PatternSet":
        """Read what ``save`` wrote, and verify its hash.

        Args:
            path: The file; its suffix is the format.

        Raises:
            ValueError: If the suffix is another one, or the content is not what was saved.
        """
        path = _check_suffix(path)
        written = path.read_bytes()
        try:
            if path.suffix == ".npz":
                with np.load(io.BytesIO(written)) as arrays:
                    content, present = json.loads(str(arrays["about"])), arrays["present"]
            else:
                content = json.loads(written)
                digits = np.frombuffer(content.pop("rows").replace(" ", "").encode(), np.uint8)
                present = digits.reshape(-1, len(content["names"])) == ord("1")
            fields = {key: content[key] for key in ("names", "kind", "rate", "seed", "split")}
            patterns = cls(torch.from_numpy(present), **fields)
            intact = patterns.hash == content["hash"]
        except Exception:  # whatever a damaged file upsets in zip, JSON, numpy or the constructor
            intact = False
        if not intact:
            raise ValueError(
                f"{path}: patterns are used as they were saved, and these do not match their hash. "
                "Restore the file, or draw the patterns again."
            )
        return patterns

    def __len__(self) -> int:
        return len(self.present)

    def __getitem__(self, index: Any) -> Tensor:
        return self.present[index]

    def __str__(self) -> str:
        realised = ", ".join(f"{name} {rate:.4f}" for name, rate in self.realised().items())
        return (
            f"PatternSet {self.split}: {len(self)} samples x {len(self.names)} modalities "
            f"({', '.join(self.names)}), seed {self.seed}\n"
            f"nominal {self.kind} {self.rate}; realised {realised}\nsha256 {self.hash}"
        )

    def _content(self) -> dict[str, Any]:
        digits = self.present.numpy().astype(np.uint8) + ord("0")
        rows = np.pad(digits, ((0, 0), (0, 1)), constant_values=ord(" ")).tobytes().decode()
        provenance = {"kind": self.kind, "rate": self.rate, "seed": self.seed, "split": self.split}
        return {"format": 1, "names": self.names, **provenance, "rows": rows.rstrip()}


def _check_suffix(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in (".json", ".npz"):
        raise ValueError(
            f"path={str(path)!r}: its suffix is the format. Give it the suffix .json or .npz."
        )
    return path
