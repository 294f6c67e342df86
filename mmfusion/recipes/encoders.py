"""Encoders for photos and tables: none of them lets one sample, or an absent one, touch another."""

import importlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmfusion.layers.reset import reset_children

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SmallCNN(nn.Module):
    """A small convolutional network that trains from scratch on a few hundred photos.

    Every stage halves the sides; GroupNorm, because absent photos must not enter batch statistics.

    Args:
        width: Channels of the map it returns, ``F``; a multiple of 8.
        image_size: Height and width of the photos.
        num_stages: Halvings; the first two have a quarter and half of the channels.

    Shape:
        - photos: ``(B, 3, H, W)``, 0..1; returned map: ``(B, F, H / 2^stages, W / 2^stages)``

    Raises:
        ValueError: If ``width`` is not a multiple of 8, or a photo is too small for the stages.

    Example:
        >>> SmallCNN(16, image_size=(64, 96))(torch.rand(2, 3, 64, 96)).shape
        torch.Size([2, 16, 4, 6])
    """

    def __init__(self, width: int, *, image_size: tuple[int, int], num_stages: int = 4) -> None:
        super().__init__()
        if width % 8 or min(image_size) < 2**num_stages or num_stages < 2:
            raise ValueError(
                f"width={width}, image_size={image_size}, num_stages={num_stages}: channels come "
                "in eights and there are two stages or more, each halving the sides. Pass a "
                f"multiple of 8 and photos of at least {2**num_stages} pixels each way."
            )
        self.in_shape = (3, *image_size)
        channels = [3, width // 4, width // 2, *[width] * (num_stages - 2)]
        self.stages = nn.Sequential()
        for before, after in itertools.pairwise(channels):
            self.stages.append(nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False))
            self.stages.append(nn.GroupNorm(math.gcd(8, after // 2), after))
            self.stages.append(nn.GELU())

    def forward(self, photos: Tensor) -> Tensor:
        """The map of the last stage."""
        return self.stages((photos - 0.5) / 0.25)


class Backbone(nn.Module):
    """A 2-D network of transformers or MONAI, read as tokens or a map; ``backbone`` makes one.

    Batch statistics never change: in a pretrained network BatchNorm keeps the statistics it came
    with, in training too; in one that starts from scratch it is replaced by GroupNorm. Parameters
    that the features do not depend on (a pooler, a mask token) are frozen, so that training over
    several ranks finds no unused ones.

    Args:
        network: Takes ``(B, 3, H, W)``; returns a tensor, a list of maps (the last is taken), or an
            output with ``last_hidden_state``.
        image_size: Height and width of the photos.
        pretrained: Whether the weights, and so the statistics, mean something.
        mean: Of each channel, subtracted from the photos.
        std: Of each channel, by which they are divided.

    Attributes:
        width: Of the features, ``F``.
        in_shape: ``(3, H, W)``.

    Shape:
        - photos: ``(B, 3, H, W)``, 0..1; returned: ``(B, T, F)`` or ``(B, F, h, w)``

    Raises:
        ValueError: If the network does not run on photos of that size.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8))
        >>> encoder = Backbone(network, image_size=(32, 48))
        >>> encoder(torch.rand(1, 3, 32, 48)).shape, type(encoder.network[1]).__name__
        (torch.Size([1, 8, 8, 12]), 'GroupNorm')
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        image_size: tuple[int, int],
        pretrained: bool = False,
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
    ) -> None:
        super().__init__()
        self.network = network
        self.in_shape = (3, *image_size)
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(3, 1, 1), persistent=False)
        if not pretrained:
            use_group_norm(network)
        self.eval()  # a try-out draws no dropout
        try:
            features = self(torch.full((1, *self.in_shape), 0.5))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ValueError(
                f"image_size={image_size}: {type(network).__name__} does not run on it ({error}). "
                "Pass the size the network was made for."
            ) from error
        self.width = features.shape[-1] if features.ndim == 3 else features.shape[1]
        parameters = [p for p in network.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
        self.train()

    def train(self, mode: bool = True) -> "Backbone":
        """As in ``nn.Module``, but batch statistics stay as they are."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, photos: Tensor) -> Tensor:
        """Tokens or a map, whatever the network gives."""
        features: Any = self.network((photos - self.mean) / self.std)
        if isinstance(features, list | tuple):
            features = features[-1]
        return getattr(features, "last_hidden_state", features)


def backbone(name: str, *, image_size: tuple[int, int], pretrained: bool = True) -> Backbone:
    """Load a 2-D network by name: from transformers, or from MONAI with ``monai:`` before it.

    A transformers name is a model on the Hugging Face hub or a folder written by
    ``save_pretrained``; photos are normalised as its preprocessor file says, else as for ImageNet.

    Args:
        name: ``"microsoft/resnet-18"``, a folder, ``"monai:DenseNet121"``, ``"monai:resnet18"``.
        image_size: Height and width of the photos.
        pretrained: Load weights; False draws them anew and needs the configuration only.

    Raises:
        ValueError: If MONAI has no such network, or no weights for it, or the size does not fit.

    Example:
        >>> encoder = backbone("monai:resnet10", image_size=(64, 64), pretrained=False)
        >>> encoder.width, encoder(torch.rand(2, 3, 64, 64)).shape
        (512, torch.Size([2, 512, 2, 2]))
    """
    kind: dict[str, Any] = {"image_size": image_size, "pretrained": pretrained}
    if name.startswith("monai:"):
        return Backbone(_monai(name.removeprefix("monai:"), pretrained), **kind)
    from transformers import AutoConfig, AutoModel
    from transformers.image_processing_base import ImageProcessingMixin

    if not pretrained:
        return Backbone(AutoModel.from_config(AutoConfig.from_pretrained(name)), **kind)
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:  # weights without a preprocessor file
        found = {}
    mean, std = found.get("image_mean", IMAGENET[0]), found.get("image_std", IMAGENET[1])
    return Backbone(AutoModel.from_pretrained(name), **kind, mean=mean, std=std)


class TableEncoder(nn.Module):
    """Turn a table row into one token per cell; a missing cell has a learned token of its own.

    A cell is one number or a one-hot block. NaN anywhere in it makes the whole cell missing, and
    nothing of it is used. Numbers should come standardised.

    Args:
        cells: For each feature the cell it belongs to, e.g. ``("age", "sex", "sex")``.
        dim: Width of a token, ``F``.
        dropout: Probability, in training, that a cell is taken for missing: small tables are soon
            known by heart, and the tokens of missing cells are trained where no cell is missing.

    Shape:
        - rows: ``(B, F_in)``, NaN where missing; returned: ``(B, T, F)``, ``T`` distinct cells

    Raises:
        ValueError: If there is no cell.

    Example:
        Whatever else its block holds, a missing cell gives the same token.

        >>> encoder = TableEncoder(("age", "sex", "sex"), dim=4).eval()
        >>> nan = float("nan")
        >>> tokens = encoder(torch.tensor([[0.3, nan, nan], [0.3, 1.0, nan]]))
        >>> tokens.shape, bool((tokens[0] == tokens[1]).all())
        (torch.Size([2, 2, 4]), True)
    """

    accepts_nan = True
    block: Tensor

    def __init__(self, cells: Sequence[str], dim: int, *, dropout: float = 0.3) -> None:
        super().__init__()
        if not cells:
            raise ValueError("cells is empty: a table has a cell. Name the cell of each feature.")
        order = list(dict.fromkeys(cells))
        self.in_shape = (len(cells),)
        self.dropout = dropout
        block = torch.tensor([[cell == name for cell in cells] for name in order])  # (T, F_in)
        self.register_buffer("block", block, persistent=False)
        self.weight = nn.Parameter(torch.empty(len(cells), dim))
        self.bias = nn.Parameter(torch.empty(len(order), dim))
        self.missing = nn.Parameter(torch.empty(len(order), dim))
        self.mix = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for table in (self.weight, self.bias, self.missing):
            nn.init.normal_(table)
        reset_children(self)

    def forward(self, rows: Tensor) -> Tensor:
        """One token per cell."""
        nan = rows.isnan()
        rows = torch.where(nan, 0, rows)
        lacking = (nan[:, None] & self.block).any(2)  # (B, T)
        if self.training:
            lacking = lacking | (torch.rand_like(lacking, dtype=torch.float32) < self.dropout)
        weight = self.block.to(rows.dtype)[..., None] * self.weight  # (T, F_in, F)
        tokens = torch.einsum("bf,tfd->btd", rows, weight) + self.bias
        return self.mix(torch.where(lacking[..., None], self.missing, tokens))


def use_group_norm(network: nn.Module) -> None:
    """Replace every BatchNorm in place, because absent samples must not enter its statistics.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12))
        >>> use_group_norm(network)
        >>> network[1]
        GroupNorm(4, 12, ...)
    """
    for name, child in network.named_children():
        if isinstance(child, _BatchNorm):
            size = child.num_features
            setattr(network, name, nn.GroupNorm(math.gcd(8, size), size))
        else:
            use_group_norm(child)


def _monai(name: str, pretrained: bool) -> nn.Module:
    nets: Any = importlib.import_module("monai.networks.nets")
    known = ("DenseNet121", "DenseNet169", "DenseNet201")
    residual = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
    if name in residual and not pretrained:
        return nets.ResNetFeatures(name, pretrained=False, spatial_dims=2, in_channels=3)
    if name in known:
        made = getattr(nets, name)(
            spatial_dims=2, in_channels=3, out_channels=1, pretrained=pretrained
        )
        return nn.Sequential(made.features, nn.ReLU())
    raise ValueError(
        f"name='monai:{name}' with pretrained={pretrained}: 2-D networks of MONAI are "
        f"{', '.join(known)}, with ImageNet weights, and {', '.join(residual)}, without. Pass one "
        "of them, pretrained=False for a resnet, or the name of a transformers model."
    )
