"""Draw who lacks what: seeded patterns of missing modalities, each rate with a name of its own.

A drawing function returns ``present``, ``(B, M)`` bool, and keeps one modality of every sample. It
draws on the device of ``generator`` and returns there; None is torch's default generator.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

__all__ = [
    "Rates",
    "all_patterns",
    "check_present",
    "curriculum",
    "hide",
    "not_at_random",
    "per_modality",
    "plain_rates",
    "sample_rate",
    "slot_rate",
]

Rates = float | Sequence[float] | Sequence[Sequence[float]] | Tensor


def sample_rate(
    batch_size: int, num_modalities: int, rate: float, generator: Generator | None = None
) -> Tensor:
    """Let exactly ``round(rate * B)`` samples lose at least one modality.

    Which samples is uniform. Each draws independently, all equally likely, one of the ``2^M - 2``
    patterns that are neither complete nor empty.

    Args:
        batch_size: Number of samples, ``B``.
        num_modalities: Number of modalities, ``M``.
        rate: Share of the samples that become incomplete.
        generator: Source of the draw.

    Shape:
        - returned: ``(B, M)`` bool

    Raises:
        ValueError: If a size is below 1, ``rate`` is no share, or a sole modality would have to go.

    Example:
        >>> present = sample_rate(10, 3, rate=0.7, generator=torch.Generator().manual_seed(0))
        >>> int((~present.all(1)).sum()), bool(present.any(1).all())
        (7, True)
    """
    _check_sizes(batch_size, num_modalities)
    _check_rate("rate", rate)
    if num_modalities == 1 and rate > 0:
        raise ValueError(
            f"rate={rate} with num_modalities=1: an incomplete sample still keeps one modality. "
            "Pass rate=0, or at least two modalities."
        )
    device = _device(generator)
    order = torch.randperm(batch_size, generator=generator, device=device)
    losing = order[: round(rate * batch_size)]
    rows = torch.ones(len(losing), num_modalities, dtype=torch.bool, device=device)
    while (redo := rows.all(1) | ~rows.any(1)).any():  # rejection: uniform for every M
        size = (int(redo.sum()), num_modalities)
        rows[redo] = torch.randint(2, size, generator=generator, device=device).bool()
    present = torch.ones(batch_size, num_modalities, dtype=torch.bool, device=device)
    present[losing] = rows
    return present


def slot_rate(
    batch_size: int, num_modalities: int, rate: float, generator: Generator | None = None
) -> Tensor:
    """Let exactly ``round(rate * B * M)`` of the ``B * M`` slots go.

    Uniform over all arrangements of that many gone slots which leave every sample one modality.

    Args:
        batch_size: Number of samples, ``B``.
        num_modalities: Number of modalities, ``M``.
        rate: Share of the slots that go, at most ``(M - 1) / M``.
        generator: Source of the draw.

    Shape:
        - returned: ``(B, M)`` bool

    Raises:
        ValueError: If a size is below 1, or ``rate`` is no share or above ``(M - 1) / M``.

    Example:
        >>> present = slot_rate(10, 3, rate=0.5, generator=torch.Generator().manual_seed(0))
        >>> int((~present).sum()), bool(present.any(1).all())
        (15, True)
    """
    _check_sizes(batch_size, num_modalities)
    _check_rate("rate", rate)
    if rate > (num_modalities - 1) / num_modalities:
        limit = f"{num_modalities - 1}/{num_modalities}"
        raise ValueError(
            f"rate={rate} with num_modalities={num_modalities}: each sample keeps one modality, so "
            f"at most {limit} of the slots can go. Pass a rate of at most {limit}."
        )
    size = (batch_size, num_modalities)
    gone = _gone_per_sample(*size, round(rate * batch_size * num_modalities), generator)
    draw = torch.rand(size, dtype=torch.float64, generator=generator, device=gone.device)
    return draw.argsort(1).argsort(1) >= gone[:, None]


def per_modality(
    batch_size: int, rates: Sequence[float] | Tensor, generator: Generator | None = None
) -> Tensor:
    """Drop each modality independently with a rate of its own, and never all of them.

    Where all would go one returns, chosen in proportion to ``1 - rate``: uniformly for equal rates,
    never a modality of rate 1. This lowers the realised slot rate below the nominal one: modality m
    is absent with probability ``r_m - prod(r) * (1 - r_m) / sum(1 - r)``.

    Args:
        batch_size: Number of samples, ``B``.
        rates: Probability of losing each modality, in declared order.
        generator: Source of the draw.

    Shape:
        - ``rates``: ``(M,)``
        - returned: ``(B, M)`` bool

    Raises:
        ValueError: If ``batch_size`` is below 1, ``rates`` are not one share per modality, or no
            modality could be kept.

    Example:
        >>> per_modality(1000, (0.0, 1.0, 1.0)).sum(0).tolist()
        [1000, 0, 0]
    """
    _check_sizes(batch_size)
    table = _rate_table(rates, ("M",), _device(generator))
    return _drop(table.expand(batch_size, -1), generator)


def not_at_random(
    cause: Tensor, rates: Sequence[Sequence[float]] | Tensor, generator: Generator | None = None
) -> Tensor:
    """Drop modalities at rates that depend on the label or on a feature, and never all of them.

    An integer ``cause`` picks its own row of ``rates``. A floating one picks by quantile: with Q
    rows the lowest 1/Q of *these* samples take row 0 (equal values share a row), so pass a whole
    split. A row works as in ``per_modality``; ``rates.flip(0)`` reverses the dependence at test.

    Args:
        cause: What absence depends on, one number per sample.
        rates: One row of ``per_modality`` rates per class, or per quantile bin.
        generator: Source of the draw; None is torch's default one on the device of ``cause``.

    Shape:
        - ``cause``: ``(B,)``, integer or floating
        - ``rates``: ``(Y, M)`` or ``(Q, M)``
        - returned: ``(B, M)`` bool

    Raises:
        ValueError: If ``cause`` is not ``(B,)``, holds NaN or a class without a row, or a row of
            ``rates`` is one that ``per_modality`` refuses.

    Example:
        Class 0 always lacks the first modality, class 1 the second.

        >>> rates = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> not_at_random(torch.tensor([0, 1, 1]), rates).tolist()
        [[False, True], [True, False], [True, False]]
    """
    table = _rate_table(rates, ("Y", "M"), _device(generator) or cause.device)
    return _drop(table[_rows_by_cause(cause.to(table.device), len(table))], generator)


def all_patterns(num_modalities: int) -> Tensor:
    """List every pattern with at least one modality present.

    Rows count upwards: row i is the number ``i + 1`` in binary, the first modality its highest
    digit. The last row is complete.

    Args:
        num_modalities: Number of modalities, ``M``, at most 16.

    Shape:
        - returned: ``(2^M - 1, M)`` bool

    Raises:
        ValueError: If ``num_modalities`` is not in 1..16.

    Example:
        >>> all_patterns(2).int().tolist()
        [[0, 1], [1, 0], [1, 1]]
    """
    if not 1 <= num_modalities <= 16:
        raise ValueError(
            f"num_modalities={num_modalities}: the 2^M - 1 patterns of 1 to 16 modalities can be "
            "listed. Draw from those of more with sample_rate or slot_rate."
        )
    codes = torch.arange(1, 2**num_modalities)[:, None]
    return (codes >> torch.arange(num_modalities - 1, -1, -1)) % 2 == 1


def hide(present: Tensor, rate: float, generator: Generator | None = None) -> Tensor:
    """Hide observed modalities for training, never the last one of a sample.

    Each observed slot is hidden independently with probability ``rate``; where all would be, one of
    them, uniformly, stays visible. A sample with nothing observed stays so. Static shapes and no
    synchronisation: compiles with ``fullgraph=True``, where torch takes ``generator=None`` only.

    Args:
        present: What was observed.
        rate: Probability of hiding an observed slot.
        generator: Source of the draw, on the device of ``present``.

    Shape:
        - ``present``, returned ``visible``: ``(B, M)`` bool

    Raises:
        ValueError: If ``present`` is not ``(B, M)`` bool, or ``rate`` is no share.

    Example:
        >>> present = torch.tensor([[True, True, False], [False, False, False]])
        >>> hide(present, rate=1.0).sum(1).tolist()
        [1, 0]
    """
    check_present(present)
    _check_rate("rate", rate)
    draw = torch.rand(present.shape, generator=generator, device=present.device)
    # Among draws that all fall below the rate, the largest is at a uniform place.
    largest = draw.masked_fill(~present, -1.0).argmax(1, keepdim=True)  # (B, 1)
    columns = torch.arange(present.shape[1], device=present.device)
    return present & ((draw >= rate) | (columns == largest))


def curriculum(step: int, num_steps: int, start: float = 0.0, end: float = 0.5) -> float:
    """Move the rate of ``hide`` linearly from ``start`` to ``end``, then hold it.

    Args:
        step: Training steps done so far.
        num_steps: Steps until ``end`` is reached.
        start: Rate at step 0.
        end: Rate from ``num_steps`` on; it may lie below ``start``.

    Raises:
        ValueError: If ``step`` is negative, ``num_steps`` is below 1, or a rate is no share.

    Example:
        >>> [curriculum(step, num_steps=4, end=0.6) for step in (0, 2, 4, 9)]
        [0.0, 0.3, 0.6, 0.6]
    """
    _check_rate("start", start)
    _check_rate("end", end)
    if step < 0 or num_steps < 1:
        raise ValueError(
            f"step={step}, num_steps={num_steps}: steps count from 0, over at least one. "
            "Pass step >= 0 and num_steps >= 1."
        )
    done = min(step / num_steps, 1.0)
    return (1 - done) * start + done * end


def _gone_per_sample(
    batch_size: int, num_modalities: int, total: int, generator: Generator | None
) -> Tensor:
    """Draw how many slots each sample loses, ``(B,)``, for a uniform arrangement of ``total`` gone.

    Given their sum, such counts are independent, d having weight ``comb(M, d) * exp(tilt * d)``
    whatever the tilt. So histograms over d are drawn with the tilt that expects ``total`` until one
    has that sum: about ``sqrt(B * M)`` tries.
    """
    lost = np.arange(num_modalities)
    ways = np.array([math.log(math.comb(num_modalities, count)) for count in lost])
    low, high = -60.0, 60.0
    for _ in range(64):
        tilt = (low + high) / 2
        logits = ways + tilt * lost
        weights = np.exp(logits - logits.max())
        shares = weights / weights.sum()
        low, high = (tilt, high) if batch_size * (shares @ lost) < total else (low, tilt)
    device = _device(generator)
    seed = torch.randint(2**62, (1,), generator=generator, device=device)
    histograms_from = np.random.default_rng(int(seed))
    matching = np.zeros((0, num_modalities), dtype=np.int64)
    while not len(matching):
        histograms = histograms_from.multinomial(batch_size, shares, size=4096)
        matching = histograms[histograms @ lost == total]
    counts = torch.from_numpy(np.repeat(lost, matching[0])).to(seed.device)
    return counts[torch.randperm(batch_size, generator=generator, device=device)]


def _drop(rates: Tensor, generator: Generator | None) -> Tensor:
    """Draw ``(B, M)`` independent absences; where all would go, one returns as 1 - rate weighs."""
    present = torch.rand(rates.shape, generator=generator, device=rates.device) >= rates
    returning = torch.multinomial(1 - rates, 1, generator=generator)  # (B, 1)
    columns = torch.arange(rates.shape[1], device=rates.device)
    return present | ((columns == returning) & ~present.any(1, keepdim=True))


def _rows_by_cause(cause: Tensor, num_rows: int) -> Tensor:
    """Turn classes or feature values into row numbers, ``(B,)``."""
    if cause.ndim != 1 or not len(cause):
        raise ValueError(
            f"cause of shape {tuple(cause.shape)}: absence depends on one number per sample. "
            "Pass a tensor of shape (B,)."
        )
    classes = not cause.is_floating_point()
    unusable = (cause < 0) | (cause >= num_rows) if classes else cause.isnan()
    if unusable.any():
        first = int(unusable.int().argmax())
        raise ValueError(
            f"cause[{first}]={cause[first].item()} with {num_rows} rows of rates: a class numbers "
            "its row, a feature can be ranked. Pass a row per class, or leave such samples out."
        )
    if classes:
        return cause.long()
    below = torch.searchsorted(cause.sort().values, cause.contiguous())
    return below * num_rows // len(cause)


def _rate_table(rates: Rates, axes: tuple[str, ...], device: torch.device | None) -> Tensor:
    """Check rates of modalities, by class or not, and put them on ``device``."""
    table = torch.as_tensor(rates, dtype=torch.float64)
    if table.ndim != len(axes) or not table.numel():
        raise ValueError(
            f"rates of shape {tuple(table.shape)}: there is one rate per modality. "
            f"Pass rates of shape ({', '.join(axes)})."
        )
    for place in np.ndindex(*table.shape):
        _check_rate(f"rates[{', '.join(map(str, place))}]", table[place].item())
    table = table.to(device, torch.float32)  # in which 1 - 1e-9 is 1
    if (table == 1).all(-1).any() or (table.shape[-1] == 1 and table.any()):
        raise ValueError(
            f"rates={plain_rates(rates)}: a sample keeps one modality, so not all can have rate 1 "
            "in float32, nor a sole one a rate above 0. Lower a rate."
        )
    return table


def plain_rates(rate: Any) -> Any:
    """Turn a rate or rates, of any type, into floats in nested tuples.

    Example:
        >>> plain_rates(torch.tensor([0.5, 0.25]))
        (0.5, 0.25)
    """
    if isinstance(rate, Tensor | np.ndarray):
        rate = rate.tolist()
    return tuple(plain_rates(one) for one in rate) if isinstance(rate, Sequence) else float(rate)


def _device(generator: Generator | None) -> torch.device | None:
    return None if generator is None else generator.device


def _check_sizes(batch_size: int = 1, num_modalities: int = 1) -> None:
    for name, size in (("batch_size", batch_size), ("num_modalities", num_modalities)):
        if size < 1:
            raise ValueError(f"{name}={size}: patterns need at least one. Pass {name}=1 or more.")


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate <= 1:  # NaN fails too
        raise ValueError(
            f"{name}={rate}: a rate is a share from 0 to 1. Pass {name}=0.3 for 30 per cent."
        )


def check_present(present: Tensor) -> None:
    """Refuse what is not a ``(B, M)`` bool table.

    Raises:
        ValueError: If ``present`` has another type or number of axes, or no column.

    Example:
        >>> check_present(torch.tensor([[True, False]]))
    """
    if present.dtype != torch.bool or present.ndim != 2 or not present.shape[1]:
        raise ValueError(
            f"present is {present.dtype} of shape {tuple(present.shape)}: it is bool, (B, M), True "
            "where observed. Pass present.bool() with one column per modality."
        )
