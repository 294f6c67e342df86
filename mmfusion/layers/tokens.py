"""From whatever encoders give to L tokens per modality; the context and the absent tokens."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfusion.functional import presence_attention
from mmfusion.layers.reset import reset_children
from mmfusion.presence import check_table, normalise
from mmfusion.reference import autocasts

__all__ = ["AbsentTokens", "ContextTokens", "ModalityTokens", "per_sample"]


class ModalityTokens(nn.Module):
    """Turn features of any kind and width into ``L`` tokens of width ``D`` per modality.

    A vector, a token sequence with its own padding, or a 2-D/3-D feature map. Absent rows are
    replaced by zeros before any arithmetic and come out as zeros, with exactly zero gradient. So is
    padding; only ``check_values`` refuses NaN there too, since it looks at whole rows.

    Args:
        features: Width of each modality's features, ``F``, in the order of ``present``'s columns.
        dim: Width of a token, ``D``.
        num_tokens: Tokens per modality, ``L``.
        check_values: Look for NaN in observed rows; see ``presence.normalise``.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Shape:
        - a modality: ``(B, F)``, or ``(B,)`` with ``F = 1``; ``(B, T, F)``, alone or as
          ``(tokens, valid)`` with ``valid`` ``(B, T)`` bool; or ``(B, F, *spatial)`` with two or
          three spatial axes
        - ``present``: ``(B, M)``; None infers it from None values and NaN rows
        - result: ``(B, M, L, D)``

    Raises:
        ValueError: If a size is below 1, a modality is unknown or has another width, or on what
            ``normalise`` refuses.

    Example:
        >>> tokens = ModalityTokens({"photo": 8, "table": 3}, dim=4, num_tokens=2)
        >>> out = tokens({"photo": torch.ones(5, 8, 7, 7), "table": None})
        >>> tuple(out.shape), out[:, 1].abs().sum().item()
        ((5, 2, 2, 4), 0.0)

    References:
        Learned queries that resample a sequence: Jaegle et al., "Perceiver", 2021. Projection, norm
        and the per-slot mixing are our design.
    """

    def __init__(
        self,
        features: Mapping[str, int],
        dim: int,
        num_tokens: int,
        *,
        check_values: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_tokens < 1:
            raise ValueError(f"num_tokens={num_tokens}: there is at least one. Use 1 or more.")
        self.check_values = check_values
        self.modalities: Any = nn.ModuleDict()
        for name, width in features.items():
            if width < 1:
                raise ValueError(
                    f"features[{name!r}] is {width}: a modality is at least 1 wide. Pass the width "
                    "of its features."
                )
            plain = isinstance(name, str) and name and "." not in name
            if not plain or hasattr(self.modalities, name):
                raise ValueError(
                    f"modality name {name!r}: it becomes part of a state_dict key and an attribute "
                    "of nn.ModuleDict. Use a name (a string) without dots that is not one of its "
                    "methods."
                )
            tokeniser = _Tokeniser(width, dim, num_tokens, device=device, dtype=dtype)
            self.modalities[name] = tokeniser
        self.num_tokens = num_tokens
        self.dim = dim

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset_children(self)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return f"dim={self.dim}, num_tokens={self.num_tokens}"

    def forward(self, inputs: Mapping[str, Any], present: Tensor | None = None) -> Tensor:
        """Tokenise; a modality that is None for the whole batch gives zeros."""
        names = tuple(self.modalities)
        tensors, present = normalise(inputs, names, present, check_values=self.check_values)
        tokens = []
        for name, tokeniser in self.modalities.items():
            if tensors[name] is None:
                blank = tokeniser.embedding.new_zeros(present.shape[0], self.num_tokens, self.dim)
                tokens.append(blank)
                continue
            tokens.append(tokeniser(*_as_sequence(name, tensors[name], tokeniser.project.weight)))
        return torch.where(present[:, :, None, None], torch.stack(tokens, dim=1), 0)  # (B, M, L, D)


class ContextTokens(nn.Module):
    """Hold the dataset-level semantic prior: ``C`` learned tokens, the same for every sample.

    Args:
        num_context: Context tokens, ``C``.
        dim: Width of a token, ``D``.
        device: Where the parameter lives.
        dtype: Type of the parameter.

    Shape:
        - result: ``(B, C, D)``, a view of the one parameter

    Raises:
        ValueError: If ``num_context`` is below 1.

    Example:
        >>> tuple(ContextTokens(3, dim=4)(2).shape)
        (2, 3, 4)

    References:
        Context tokens as a semantic prior: arXiv 2605.25968. Their initial spread is our design.
    """

    def __init__(
        self,
        num_context: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_context < 1:
            raise ValueError(f"num_context={num_context}: there is at least one. Use 1 or more.")
        self.tokens = nn.Parameter(torch.empty(num_context, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tokens anew."""
        nn.init.normal_(self.tokens)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return "num_context={}, dim={}".format(*self.tokens.shape)

    def forward(self, batch_size: int) -> Tensor:
        """The context, once per sample."""
        return self.tokens.expand(batch_size, -1, -1)


def per_sample(context: Tensor, batch_size: int, dim: int) -> Tensor:
    """Context once per sample: ``(C, D)`` or ``(B, C, D)`` -> ``(B, C, D)``.

    Raises:
        ValueError: If it has another shape.

    Example:
        >>> tuple(per_sample(torch.ones(3, 4), batch_size=2, dim=4).shape)
        (2, 3, 4)
    """
    fits = context.ndim == 2 or (context.ndim == 3 and context.shape[0] == batch_size)
    if not fits or context.shape[-1] != dim:
        raise ValueError(
            f"context is {tuple(context.shape)} for {batch_size} samples of width {dim}: it is "
            f"(C, D), the same for all, or (B, C, D), with D = {dim}. Drop or expand its first "
            "axis, or build it with that width."
        )
    return context.expand(batch_size, -1, -1)


class AbsentTokens(nn.Module):
    """Put a learned token where a modality is absent, whatever lay there.

    Args:
        num_modalities: How many modalities, ``M``.
        num_tokens: Tokens per modality, ``L``.
        dim: Width of a token, ``D``.
        device: Where the parameter lives.
        dtype: Type of the parameter.

    Shape:
        - ``tokens``, result: ``(B, M, L, D)``; ``present``: ``(B, M)``

    Raises:
        ValueError: If ``tokens`` or ``present`` has other sizes than declared.

    Example:
        >>> absent = AbsentTokens(2, num_tokens=1, dim=3)
        >>> tokens = torch.full((1, 2, 1, 3), float("nan"))
        >>> out = absent(tokens, torch.tensor([[False, False]]))
        >>> bool((out[0] == absent.tokens).all())
        True

    References:
        The mask token of Devlin et al., "BERT", 2019; one per modality and slot: our design.
    """

    def __init__(
        self,
        num_modalities: int,
        num_tokens: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (num_modalities, num_tokens, dim)
        self.tokens = nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tokens anew."""
        nn.init.normal_(self.tokens, std=0.02)  # near the mean of normalised tokens

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return "num_modalities={}, num_tokens={}, dim={}".format(*self.tokens.shape)

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Observed tokens, and learned ones elsewhere."""
        if tokens.shape[1:] != self.tokens.shape:
            raise ValueError(
                f"tokens is {tuple(tokens.shape)}: this layer was built for (M, L, D) = "
                f"{tuple(self.tokens.shape)}, so they are (B, M, L, D). Rebuild it, or reshape "
                "them."
            )
        check_table("present", present, tokens.shape[:2])
        return torch.where(present[:, :, None, None], tokens, self.tokens)


class _Tokeniser(nn.Module):
    """One modality: project, resample T -> L with learned queries, mix each slot, add identity."""

    def __init__(
        self,
        features: int,
        dim: int,
        num_tokens: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.project = nn.Linear(features, dim, **kind)
        self.norm = nn.LayerNorm(dim, **kind)
        self.norm_out = nn.LayerNorm(dim, **kind)
        self.queries = nn.Parameter(torch.empty(num_tokens, dim, **kind))
        self.mix = nn.Parameter(torch.empty(num_tokens, dim, dim, **kind))
        self.embedding = nn.Parameter(torch.empty(num_tokens, dim, **kind))
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.normal_(self.queries, std=0.02)
        nn.init.normal_(self.mix, std=self.mix.shape[-1] ** -0.5)
        nn.init.normal_(self.embedding, std=0.02)

    def reset_parameters(self) -> None:
        reset_children(self)
        self._reset_own()

    def forward(self, sequence: Tensor, valid: Tensor | None) -> Tensor:
        hidden = F.gelu(self.norm(self.project(sequence))).unsqueeze(2)  # (B, T, 1, D)
        if valid is None:  # a vector: each query reads all of it, and the mixing tells slots apart
            pooled = hidden.squeeze(1) + 0 * self.queries.to(hidden.dtype)  # their gradient is zero
        else:
            queries = self.queries.to(hidden.dtype).expand(hidden.shape[0], -1, -1).unsqueeze(2)
            pooled = presence_attention(queries, hidden, hidden, valid).squeeze(2)
        mixed = torch.einsum("bld,lde->ble", pooled, self.mix.to(pooled.dtype))
        return self.norm_out(mixed) + self.embedding


def _as_sequence(name: str, value: Any, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """A vector, sequence or map -> (B, T, F), and which steps are real; None for a vector."""
    valid, width = None, weight.shape[1]
    if isinstance(value, tuple | list):  # default_collate makes lists of tuples
        if len(value) != 2 or not all(isinstance(part, Tensor) for part in value):
            raise ValueError(
                f"features of {name!r} are a {type(value).__name__} of {len(value)}: a sequence is "
                "a tensor, or a pair (tokens, valid). Pass one of the two."
            )
        value, valid = value
    if value.ndim == width == 1:  # what collate makes of bare numbers
        value = value.unsqueeze(1)
    # autocast leaves float64 as it is
    mixed = value.is_floating_point() and torch.float64 not in (value.dtype, weight.dtype)
    mixed = mixed and autocasts(value.device)
    if value.dtype != weight.dtype and not mixed:
        raise ValueError(
            f"features of {name!r} are {value.dtype}: they are multiplied with {weight.dtype} "
            "weights. Convert the input, with .float() for example, or build the model with dtype=."
        )
    kinds = {2: -1, 3: -1, 4: 1, 5: 1}  # number of axes -> where the width is
    if value.ndim not in kinds or value.shape[kinds[value.ndim]] != width:
        raise ValueError(
            f"features of {name!r} are {tuple(value.shape)}: declared with width {width}, they are "
            f"(B, {width}), (B, T, {width}) or (B, {width}, *spatial) with 2 or 3 spatial axes. "
            "Declare the width they have, or move the axis."
        )
    if value.ndim == 2 and valid is None:
        return value.unsqueeze(1), None
    if value.ndim == 2:
        value = value.unsqueeze(1)
    elif value.ndim > 3:
        value = value.flatten(2).mT
    if valid is None:
        valid = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
    elif valid.dtype != torch.bool or valid.shape != value.shape[:2]:
        raise ValueError(
            f"valid of {name!r} is {tuple(valid.shape)} {valid.dtype}: it is bool (B, T) = "
            f"{tuple(value.shape[:2])}, True for real steps. Convert it."
        )
    # Padding may hold anything: it is replaced before the projection, as absent rows are.
    return torch.where(valid.unsqueeze(-1), value, 0), valid
