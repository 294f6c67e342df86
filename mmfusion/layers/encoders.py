"""The edge every model shares: raw inputs, through the caller's encoders, to tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfusion.layers.reset import reset_children
from mmfusion.layers.tokens import ModalityTokens
from mmfusion.presence import normalise
from mmfusion.ranks import world_size

__all__ = ["ModalityEncoders"]


class ModalityEncoders(nn.Module):
    """Normalise inputs once, encode each modality, and tokenise: ``(tokens, present)``.

    An encoder sees zeros under absent rows, and what it returns there is dropped, so that it gets
    no gradient from them. It may return a vector, tokens, ``(tokens, valid)`` or a map. Two
    attributes of an encoder are read: ``accepts_nan = True`` lets NaN cells of observed rows
    through to it, and ``in_shape`` (a per-sample shape) lets a batch without that modality run
    through the same graph. Encoders with batch statistics count the zero rows too: prefer GroupNorm
    or LayerNorm.

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
            ``normalise`` and ``ModalityTokens`` refuse; in training over several ranks also if a
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
            if isinstance(value, int):
                widths[name] = value
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
        for name in lacking:
            if tensors[name] is not None:
                tensors[name] = tensors[name].to(self._type_of(name))
        for name, encoder in self.encoders.items():
            if tensors[name] is not None:
                tensors[name] = encoder(tensors[name])
            elif self.training and world_size() > 1:
                raise ValueError(
                    f"inputs[{name!r}] is None for the whole batch, and its encoder's input shape "
                    "is unknown: over several ranks every parameter takes part in every step. Set "
                    "in_shape on the encoder, or collate with shapes=."
                )
        return self.tokens(tensors, present), present

    def _type_of(self, name: str) -> torch.dtype:
        """The type of the parameters that read a modality."""
        reader = self.encoders[name] if name in self.encoders else self.tokens
        parameter = next(reader.parameters(), None)
        return torch.get_default_dtype() if parameter is None else parameter.dtype

    def _in_shape(self, name: str) -> tuple[int, ...] | None:
        """What to fill a wholly absent modality with; None where that is unknown."""
        if name not in self.encoders:
            return (self._widths[name],)
        shape = getattr(self.encoders[name], "in_shape", None)
        return None if shape is None else tuple(shape)
