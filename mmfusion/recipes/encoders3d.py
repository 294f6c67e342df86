"""Encoders for volumes: no batch statistics, so that absent volumes cannot touch present ones."""

import importlib
import itertools
import math
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmfusion.recipes.encoders import use_group_norm
from mmfusion.recipes.volume_inputs import Size

DENSE = ("DenseNet121", "DenseNet169", "DenseNet201", "DenseNet264")
RESIDUAL = tuple(f"resnet{depth}" for depth in (10, 18, 34, 50, 101, 152, 200))

# What a file that is no state dict raises.
UNREADABLE: tuple[type[Exception], ...] = (OSError, EOFError, RuntimeError, ValueError, KeyError)
UNREADABLE += (AttributeError, UnpicklingError, SafetensorError)


class SmallCNN3D(nn.Module):
    """A small convolutional network that trains from scratch on a few hundred volumes.

    Every stage halves the sides that are still long, so that flat volumes end as cubes; GroupNorm,
    because absent volumes must not enter batch statistics.

    Args:
        width: Channels of the map it returns, ``F``; a multiple of 8.
        size: Voxels along x, y and z.
        num_stages: Halvings of the longest side; the first two have a quarter and half of the
            channels.

    Attributes:
        in_shape: ``(1, X, Y, Z)``.

    Shape:
        - volumes: ``(B, 1, X, Y, Z)``, z-scored; returned map: ``(B, F, x, y, z)``

    Raises:
        ValueError: If ``width`` is not a multiple of 8, or a volume is too small for the stages.

    Example:
        >>> SmallCNN3D(16, size=(64, 64, 12))(torch.rand(2, 1, 64, 64, 12)).shape
        torch.Size([2, 16, 4, 4, 3])
    """

    def __init__(self, width: int, *, size: Size, num_stages: int = 4) -> None:
        super().__init__()
        if width % 8 or max(size) < 2**num_stages or min(size) < 1 or num_stages < 2:
            raise ValueError(
                f"width={width}, size={size}, num_stages={num_stages}: channels come in eights and "
                "there are two stages or more, each halving the longest side. Pass a multiple of 8 "
                f"and volumes of at least {2**num_stages} voxels along one axis."
            )
        self.in_shape = (1, *size)
        channels = [1, width // 4, width // 2, *[width] * (num_stages - 2)]
        sides = list(size)
        self.stages = nn.Sequential()
        for before, after in itertools.pairwise(channels):
            stride: Any = tuple(2 if 2 * side > max(sides) else 1 for side in sides)
            sides = [-(-side // step) for side, step in zip(sides, stride, strict=True)]
            self.stages.append(nn.Conv3d(before, after, 3, stride=stride, padding=1, bias=False))
            self.stages.append(nn.GroupNorm(math.gcd(8, after // 2), after))
            self.stages.append(nn.GELU())

    def forward(self, volumes: Tensor) -> Tensor:
        """The map of the last stage."""
        return self.stages(volumes)


class Backbone3D(nn.Module):
    """A 3-D network of MONAI, read as a map of its last stage.

    With ``weights`` its BatchNorm keeps the statistics it came with, in training too; without them
    GroupNorm takes its place.

    Args:
        name: ``"resnet10"`` to ``"resnet200"``, or ``"DenseNet121"`` to ``"DenseNet264"``, in any
            case.
        size: Voxels along x, y and z. A DenseNet needs 32 of them along each axis.
        weights: A local file, ``.safetensors`` or of ``torch.save``: weights of MedicalNet for a
            resnet (prefixes ``module.`` and segmentation heads are dropped), or of the network
            itself. Nothing is downloaded.

    Attributes:
        width: Channels of the map, ``F``.
        in_shape: ``(1, X, Y, Z)``.

    Shape:
        - volumes: ``(B, 1, X, Y, Z)``, z-scored; returned map: ``(B, F, x, y, z)``

    Raises:
        ValueError: If there is no such network, it does not run on that size, or the file cannot be
            read or holds the weights of another network.

    Example:
        >>> encoder = Backbone3D("resnet10", size=(32, 32, 16))
        >>> encoder.width, encoder(torch.rand(2, 1, 32, 32, 16)).shape
        (512, torch.Size([2, 512, 1, 1, 1]))

    References:
        Chen, Ma, Zheng, "Med3D: Transfer Learning for 3D Medical Image Analysis", arXiv 1904.00625.
    """

    def __init__(self, name: str, *, size: Size, weights: str | Path | None = None) -> None:
        super().__init__()
        self.in_shape = (1, *size)
        self.network = _monai(name)
        if weights is None:
            use_group_norm(self.network)
        else:
            _load(self.network, Path(weights), name)
        self.eval()  # a try-out counts no statistics
        try:
            with torch.no_grad():
                self.width = self(torch.zeros(1, *self.in_shape)).shape[1]
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"size={size}: {name} does not run on it ({error}). Pass more voxels along the "
                "shortest axis, or another network."
            ) from None
        self.train()

    def train(self, mode: bool = True) -> "Backbone3D":
        """As in ``nn.Module``, but batch statistics stay as they are."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, volumes: Tensor) -> Tensor:
        """The map of the last stage."""
        features = self.network(volumes)
        return features[-1] if isinstance(features, list) else features


def _monai(name: str) -> nn.Module:
    nets: Any = importlib.import_module("monai.networks.nets")
    kinds = {known.lower(): known for known in (*RESIDUAL, *DENSE)}
    known = kinds.get(name.lower())
    if known in RESIDUAL:
        return nets.ResNetFeatures(known, pretrained=False, spatial_dims=3, in_channels=1)
    if known in DENSE:
        made = getattr(nets, known)(spatial_dims=3, in_channels=1, out_channels=1)
        return nn.Sequential(made.features, nn.ReLU())
    raise ValueError(
        f"name={name!r}: 3-D networks are {', '.join(kinds.values())}. Pass one of them, or any "
        "module of your own to the model."
    )


def _load(network: nn.Module, path: Path, name: str) -> None:
    cure = "Pass the file of this network, such as resnet_18_23dataset.pth of MedicalNet."
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        found = {
            key.removeprefix("module."): value
            for key, value in content.get("state_dict", content).items()
        }
    except UNREADABLE as error:
        raise ValueError(
            f"weights={str(path)!r} cannot be read ({' '.join(str(error).split())[:200]}): it is a "
            f"state dict, of safetensors or torch.save. {cure}"
        ) from None
    wanted = network.state_dict()
    heads = ("fc.", "conv_seg.")
    found = {key: value for key, value in found.items() if not key.startswith(heads)}
    odd = [key for key in found if key not in wanted]
    odd += [f"no {key}" for key in wanted if key not in found]
    odd += [
        f"{key} of {tuple(found[key].shape)} for {tuple(wanted[key].shape)}"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    if odd:
        raise ValueError(
            f"weights={str(path)!r} do not fit {name} in {len(odd)} places ({'; '.join(odd[:3])}): "
            f"every weight has its name and shape. {cure}"
        )
    network.load_state_dict(found)
