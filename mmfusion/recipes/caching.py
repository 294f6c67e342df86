"""Frozen encoders: run them once over a data set, then train the rest on what they returned."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mmfusion.recipes.launch import join_processes

Samples = list[dict[str, Any]]


@torch.no_grad()
def encode(
    model: nn.Module,
    data: Dataset[Any],
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    names: Sequence[str],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Samples:
    """The samples of ``data`` with features in place of some inputs, as a list in memory.

    Every sample is taken once, so give a set that does not augment. A whole epoch over the features
    then costs what the fusion costs. Modalities that are not named stay as they are, and so does
    what is absent. Every rank encodes the whole set.

    Args:
        model: Has its encoders in ``edge.encoders``, as CMML does; they are left in eval mode.
        data: Items as ``collate`` takes them.
        collate: Items to a batch of ``inputs`` and ``present``.
        names: Modalities to encode.
        batch_size: Samples at a time.
        num_workers: Processes that load samples.

    Raises:
        ValueError: If a named modality has no encoder, or its encoder returns no tensor.

    Example:
        >>> import functools, mmfusion
        >>> encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
        >>> model = mmfusion.CMML({"photo": (encoder, 5), "table": 2}, num_classes=2, dim=8)
        >>> join = functools.partial(mmfusion.presence.collate, names=model.names)
        >>> data = [{"inputs": {"photo": torch.ones(3, 2, 2), "table": torch.ones(2)}}]
        >>> features = encode(model, data, join, ["photo"])
        >>> {name: tuple(value.shape) for name, value in features[0]["inputs"].items()}
        {'photo': (5,), 'table': (2,)}
    """
    encoders = {name: _encoder_of(model, name) for name in names}
    device = join_processes().device
    for encoder in encoders.values():
        encoder.to(device).eval()
    loader = DataLoader(
        data,
        batch_size=batch_size,
        collate_fn=list,
        num_workers=num_workers,
        generator=Generator(),  # else it would draw from the caller's
    )
    found: Samples = []
    for samples in loader:
        batch = collate(samples)
        columns = dict(zip(batch["inputs"], batch["present"].unbind(1), strict=True))
        rows = [sample | {"inputs": dict(sample["inputs"])} for sample in samples]
        for name, encoder in encoders.items():
            if not columns[name].any():
                continue
            features = encoder(send_to_device(batch["inputs"][name], device))
            if not isinstance(features, Tensor):
                raise ValueError(
                    f"the encoder of {name!r} returned a {type(features).__name__}: what is cached "
                    "is one tensor. Leave it out of names."
                )
            for row, observed, feature in zip(rows, columns[name], features.cpu(), strict=True):
                row["inputs"][name] = feature.clone() if observed else None
        found += rows
    return found


@contextlib.contextmanager
def from_features(model: nn.Module, features: Samples, names: Sequence[str]) -> Iterator[None]:
    """Within it, the named encoders hand on features, and their parameters are frozen.

    Checkpoints that ``fit`` writes within it hold the encoders as they are, so they are those of
    the whole model, which takes raw inputs again afterwards.

    Args:
        model: Has its encoders in ``edge.encoders``, as CMML does.
        features: What ``encode`` made of the training set.
        names: The modalities that were encoded.

    Raises:
        ValueError: If a named modality has no encoder, or is nowhere observed.

    Example:
        >>> import mmfusion
        >>> model = mmfusion.CMML({"a": (nn.Linear(7, 5), 5), "b": 2}, num_classes=2, dim=8)
        >>> features = [{"inputs": {"a": torch.ones(5)}}]
        >>> with from_features(model, features, ["a"]):
        ...     len(model({"a": torch.ones(3, 5)}).logits)
        3
        >>> len(model({"a": torch.ones(3, 7)}).logits)
        3
    """
    encoders = {name: _encoder_of(model, name) for name in names}
    trained = [p for encoder in encoders.values() for p in encoder.parameters() if p.requires_grad]
    stages: Any = model.edge
    try:
        for name, encoder in encoders.items():
            observed = (row["inputs"].get(name) for row in features)
            feature = next((value for value in observed if value is not None), None)
            if feature is None:
                raise ValueError(
                    f"names holds {name!r}, which none of {len(features)} samples has: there is "
                    "nothing to train on. Leave it out of names."
                )
            stages.encoders[name] = _HandOn(encoder, feature)
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        stages.encoders.update(encoders)
        for parameter in trained:
            parameter.requires_grad_(True)


class _HandOn(nn.Module):
    """Stands in for an encoder, with the same parameters under the same names."""

    def __init__(self, encoder: nn.Module, feature: Tensor) -> None:
        super().__init__()
        self._parameters, self._buffers = encoder._parameters, encoder._buffers
        self._modules = encoder._modules
        self._non_persistent_buffers_set = encoder._non_persistent_buffers_set
        self.in_shape, self.in_dtype = tuple(feature.shape), feature.dtype
        self.pretrained = getattr(encoder, "pretrained", False)

    def forward(self, features: Tensor) -> Tensor:
        return features


def _encoder_of(model: nn.Module, name: str) -> nn.Module:
    encoders: Any = model.edge.encoders  # type: ignore[union-attr]
    if name not in encoders:
        raise ValueError(
            f"names holds {name!r}: the model has an encoder for {', '.join(encoders) or 'none'}. "
            "Name some of those."
        )
    return encoders[name]
