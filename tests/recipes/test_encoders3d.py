"""Encoders of volumes: nothing crosses samples, local weights load or are refused by name."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import ResNetFeatures
from safetensors.torch import save_file
from torch import nn

import mmfusion
from mmfusion.recipes.encoders3d import Backbone3D, SmallCNN3D

SIZE = (32, 32, 16)


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    torch.manual_seed(3)
    network = ResNetFeatures("resnet10", pretrained=False, spatial_dims=3, in_channels=1)
    state = network.state_dict()
    for name, value in state.items():
        if name.endswith("running_mean"):
            value.normal_()
    return state


def raises(*parts: str) -> "pytest.RaisesExc[ValueError]":
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


@pytest.mark.parametrize(
    "make", [lambda: SmallCNN3D(16, size=SIZE), lambda: Backbone3D("resnet10", size=SIZE)]
)
def test_no_sample_touches_another_and_every_parameter_learns(make: Any) -> None:
    encoder = make()
    volumes = torch.randn(3, 1, *SIZE)
    torch.testing.assert_close(encoder(volumes)[:1], encoder(volumes[:1]))
    assert not [m for m in encoder.modules() if isinstance(m, nn.BatchNorm3d)]
    encoder(volumes).pow(2).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize(
    ("size", "shape"), [((128, 128, 24), (8, 8, 6)), ((16, 16, 16), (1, 1, 1))]
)
def test_flat_volumes_end_as_cubes(size: Any, shape: Any) -> None:
    encoder = SmallCNN3D(8, size=size)
    assert encoder.in_shape == (1, *size)
    with torch.no_grad():
        assert encoder(torch.zeros(1, 1, *size)).shape == (1, 8, *shape)


@pytest.mark.parametrize("kind", ["medicalnet", "plain", "safetensors"])
def test_local_weights_are_loaded(weights: dict[str, Any], tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "medicalnet":
        state = {f"module.{name}": value for name, value in weights.items()}
        state["module.conv_seg.0.weight"] = torch.zeros(2)
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif kind == "plain":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    encoder = Backbone3D("ResNet10", size=SIZE, weights=path).train()
    for name, value in encoder.network.state_dict().items():
        assert torch.equal(value, weights[name])
    volumes = torch.randn(3, 1, *SIZE)
    torch.testing.assert_close(encoder(volumes)[:1], encoder(volumes[:1]))
    mean = encoder.network.bn1.running_mean
    assert torch.equal(mean, weights["bn1.running_mean"])  # training moves no statistics


def test_weights_of_another_network(weights: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(weights, path)
    with raises(f"weights='{path}' do not fit resnet18 in 66 places (layer2.0", "Pass the file"):
        Backbone3D("resnet18", size=SIZE, weights=path)
    torch.save(
        weights | {"conv1.weight": torch.zeros(64, 3, 7, 7, 7), "more": torch.zeros(1)}, path
    )
    with raises("in 2 places (more; conv1.weight of (64, 3, 7, 7, 7) for (64, 1, 7, 7, 7))"):
        Backbone3D("resnet10", size=SIZE, weights=path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_that_are_no_weights(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    for write in (
        lambda: None,
        lambda: path.write_bytes(b""),
        lambda: path.write_text("no weights"),
    ):
        write()
        with raises(f"weights='{path}' cannot be read (", "state dict", "Pass the file"):
            Backbone3D("resnet10", size=SIZE, weights=path)


def test_a_pickle_of_code_is_not_run(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "w.pth")
    with raises("w.pth' cannot be read (", "Pass the file"):
        Backbone3D("resnet10", size=SIZE, weights=tmp_path / "w.pth")


def test_unknown_networks_and_sizes_that_do_not_fit() -> None:
    with raises("name='unet'", "resnet18", "DenseNet121", "Pass one of them"):
        Backbone3D("unet", size=SIZE)
    with raises("size=(32, 32, 16): densenet121 does not run on it", "Pass more voxels"):
        Backbone3D("densenet121", size=SIZE)
    with raises("size=(8, 8, 4)", "halving the longest side", "at least 16 voxels"):
        SmallCNN3D(8, size=(8, 8, 4))


def test_what_lies_under_an_absent_volume_changes_no_bit() -> None:
    encoders = {"t1": SmallCNN3D(8, size=SIZE), "adc": SmallCNN3D(8, size=SIZE)}
    model = mmfusion.CMML({name: (e, 8) for name, e in encoders.items()}, num_classes=3, dim=16)
    model.eval()
    inputs = {name: torch.randn(3, 1, *SIZE) for name in encoders}
    present = torch.tensor([[True, False], [False, True], [True, True]])
    expected = model(inputs, present).logits
    inputs["adc"][0] = float("nan")
    inputs["t1"][1] = 1e4
    assert torch.equal(model(inputs, present).logits, expected)
