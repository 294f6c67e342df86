"""The edge every model shares: raw inputs, through the caller's encoders, to tokens."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmfusion.layers.memory import check_ids
from mmfusion.layers.reset import reset_children
from mmfusion.layers.tokens import ModalityTokens
from mmfusion.presence import check_visible, may_look, normalise
from mmfusion.ranks import world_size

__all__ = ["ModalityEncoders", "observe"]


class ModalityEncoders(nn.Module):
    """Normalise inputs once, encode each modality, and tokenise: ``(tokens, present)``.

    An encoder sees zeros under absent rows, and what it returns there is dropped. It has to be
    finite at zero, and so do its derivatives: divide by a norm or a spread plus an eps. It may
    return a vector, tokens, ``(tokens, valid)`` or a map. Attributes of an encoder that are read:
    ``accepts_nan = True`` lets NaN cells of observed rows through to it; ``in_shape`` (a per-sample
    shape, where it takes one tensor), with ``in_dtype`` if that is not its parameters', lets a
    batch without that modality run through the same graph. Encoders with batch statistics count the
    zero rows too: prefer GroupNorm or LayerNorm.

    Args:
        modalities: Name to feature width, or to ``(encoder, width of what it returns)``.
        dim: Width of a token, ``D``.
        num_tokens: Tokens per modality, ``L``.
        check_values: Look for contradictions in the values; see ``presence.normalise``.
        device: Where our own parameters live; encoders stay where they are.
        dtype: Type of our own parameters.

    Shape:
        - result: tokens ``(B, M, L, D)``, zeros where absent, and ``present`` ``(B, M)``

    Raises:
        ValueError: If there is no modality, a value is neither width nor pair, or on what
            ``normalise`` and ``ModalityTokens`` refuse; if an encoder returns something else, or
            NaN or Inf; in training over several ranks also if a
            whole batch lacks a modality whose encoder has no ``in_shape``.

    Example:
        >>> from torch import nn
        >>> edge = ModalityEncoders({"photo": (nn.Flatten(), 12), "table": 3}, dim=4, num_tokens=2)
        >>> tokens, present = edge({"photo": torch.ones(5, 3, 2, 2), "table": None})
        >>> tuple(tokens.shape), present[0].tolist()
        ((5, 2, 2, 4), [True, False])
    """

    def __init__(
        self,
        modalities: Mapping[str, int | tuple[nn.Module, int]],
        dim: int,
        num_tokens: int,
        *,
        check_values: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        widths: dict[str, int] = {}
        encoders: dict[str, nn.Module] = {}
        for name, value in modalities.items():
            if isinstance(value, int | np.integer) and not isinstance(value, bool):
                widths[name] = int(value)
            elif isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], nn.Module):
                encoders[name], widths[name] = value
            else:
                raise ValueError(
                    f"modalities[{name!r}] is {value!r}: a modality is a feature width, or a pair "
                    "of an encoder (nn.Module) and the width it returns. Use one of the two."
                )
        if not widths:
            raise ValueError("modalities is empty: there is at least one. Name what you fuse.")
        self.names = tuple(widths)
        self.check_values = check_values
        # The edge has looked at the values already.
        self.tokens = ModalityTokens(
            widths, dim, num_tokens, check_values=False, device=device, dtype=dtype
        )
        self.encoders = nn.ModuleDict(encoders)
        self._widths = widths

    def reset_parameters(self) -> None:
        """Draw all parameters anew, those of the encoders included."""
        reset_children(self)

    def forward(
        self, inputs: Mapping[str, Any], present: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens of every modality, and what was observed."""
        lacking = {name: self._in_shape(name) for name in self.names if inputs.get(name) is None}
        tensors, present = normalise(
            inputs,
            self.names,
            present,
            {name: shape for name, shape in lacking.items() if shape is not None},
            accepts_nan=[n for n, e in self.encoders.items() if getattr(e, "accepts_nan", False)],
            check_values=self.check_values,
        )
        for name, value in tensors.items():
            declared = name in self.encoders and hasattr(self.encoders[name], "in_dtype")
            if isinstance(value, Tensor) and (name in lacking or declared):
                tensors[name] = value.to(self._type_of(name))
        for name, encoder in self.encoders.items():
            if tensors[name] is not None:
                tensors[name] = self._checked(name, encoder(tensors[name]), present)
            elif self.training and world_size() > 1:
                raise ValueError(
                    f"inputs[{name!r}] is None for the whole batch, and its encoder's input shape "
                    "is unknown: over several ranks every parameter takes part in every step. Set "
                    "in_shape on the encoder, or, if it takes a structure, pass one of zeros with "
                    "present False."
                )
        return self.tokens(tensors, present), present

    def _checked(self, name: str, encoded: Any, present: Tensor) -> Any:
        """What an encoder returned, if it can be tokenised."""
        pair = isinstance(encoded, tuple | list) and len(encoded) == 2
        tokens, valid = encoded if pair else (encoded, None)
        fits = isinstance(tokens, Tensor) and tokens.shape[:1] == present.shape[:1]
        if not fits or not (valid is None or getattr(valid, "dtype", None) == torch.bool):
            what = tuple(encoded.shape) if isinstance(encoded, Tensor) else type(encoded).__name__
            raise ValueError(
                f"the encoder of {name!r} returned {what} for {present.shape[0]} rows: it returns "
                "a tensor, or a pair (tokens, valid), with one row per sample. Wrap it so that it "
                "does (a transformers model: return its last_hidden_state)."
            )
        if self.check_values and may_look(tokens):
            real = tokens
            # a valid of another shape is for ModalityTokens to refuse
            if valid is not None and tokens.ndim == 3 and valid.shape == tokens.shape[:2]:
                real = torch.where(valid.unsqueeze(-1), tokens, 0)
            if not tokens.requires_grad:  # then what stands in absent rows is dropped for good
                real = real[present[:, self.names.index(name)]]
            if not bool(real.isfinite().all()):
                raise ValueError(
                    f"the encoder of {name!r} returned NaN or Inf: its output is finite, in "
                    "training for absent rows too, which reach it as zeros. Add an eps where it "
                    "divides."
                )
        return tokens if valid is None else (tokens, valid)

    def _type_of(self, name: str) -> torch.dtype:
        """The type that what reads a modality declares, or has in its parameters."""
        declared = getattr(self.encoders[name], "in_dtype", None) if name in self.encoders else None
        if declared is not None:
            return declared
        reader = self.encoders[name] if name in self.encoders else self.tokens
        parameter = next(reader.parameters(), None)
        return torch.get_default_dtype() if parameter is None else parameter.dtype

    def _in_shape(self, name: str) -> tuple[int, ...] | None:
        """What to fill a wholly absent modality with; None where that is unknown."""
        if name not in self.encoders:
            return (self._widths[name],)
        shape = getattr(self.encoders[name], "in_shape", None)
        return (shape,) if isinstance(shape, int) else None if shape is None else tuple(shape)


def observe(
    edge: ModalityEncoders,
    inputs: Mapping[str, Any],
    present: Tensor | None,
    visible: Tensor | None,
    labels: Tensor | None,
    sample_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, what was observed and what may be looked at, once a model's arguments are in order.

    Raises:
        ValueError: On what ``edge`` and ``check_visible`` refuse, if ``labels`` or ``sample_ids``
            are no tensors, or if there is not one id per sample.

    Example:
        >>> edge = ModalityEncoders({"a": 2, "b": 2}, dim=4, num_tokens=1)
        >>> observed = observe(edge, {"a": torch.ones(1, 2)}, None, None, None, None)
        >>> observed[2].tolist()
        [[True, False]]
    """
    for name, value in (("labels", labels), ("sample_ids", sample_ids)):
        if not (value is None or isinstance(value, Tensor)):
            raise ValueError(
                f"{name} is a {type(value).__name__}: it is a tensor with one row per sample. "
                "Use torch.as_tensor; number samples that have names."
            )
    tokens, present = edge(inputs, present)
    check_ids(sample_ids, tokens.shape[0])
    visible = present if visible is None else visible
    check_visible(visible, present, edge.names, check_values=edge.check_values)
    return tokens, present, visible
