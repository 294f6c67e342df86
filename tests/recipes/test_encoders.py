"""Encoders: nothing crosses samples, absent rows and missing cells do not matter, names load."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, ResNetConfig, SwinConfig, ViTConfig

import mmfusion
from mmfusion.recipes.encoders import Backbone, SmallCNN, TableEncoder, backbone

SIZE = (32, 32)
CONFIGS = {
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "swin": SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
    ),
    "vit": ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        AutoModel.from_config(config).save_pretrained(root / name)
    return root


def batch_statistics(module: nn.Module) -> list[Tensor]:
    found = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    return [m.running_mean.clone() for m in found]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_transformers_model_is_loaded_and_read(saved: Path, name: str) -> None:
    encoder = backbone(str(saved / name), image_size=SIZE)
    source = AutoModel.from_pretrained(saved / name)
    for key, value in source.state_dict().items():
        assert torch.equal(encoder.network.state_dict()[key], value)
    features = encoder.eval()(torch.rand(2, 3, *SIZE))
    assert encoder.width == 16
    assert features.shape == {"resnet": (2, 16, 4, 4), "swin": (2, 16, 16), "vit": (2, 5, 16)}[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_without_pretrained_only_the_configuration_is_needed(saved: Path, name: str) -> None:
    encoder = backbone(str(saved / name), image_size=SIZE, pretrained=False)
    assert not batch_statistics(encoder)
    photos = torch.rand(3, 3, *SIZE)
    encoder.eval()
    torch.testing.assert_close(encoder(photos)[:1], encoder(photos[:1]))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_trainable_parameter_gets_a_gradient(saved: Path, name: str) -> None:
    encoder = backbone(str(saved / name), image_size=SIZE)
    encoder(torch.rand(2, 3, *SIZE)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in encoder.parameters())


def test_pretrained_batch_statistics_never_move(saved: Path) -> None:
    encoder = backbone(str(saved / "resnet"), image_size=SIZE).train()
    before = batch_statistics(encoder)
    photos = torch.rand(3, 3, *SIZE)
    torch.testing.assert_close(encoder(photos)[:1], encoder(photos[:1]))
    assert before
    assert all(map(torch.equal, before, batch_statistics(encoder)))


def test_photos_are_normalised_as_the_preprocessor_file_says(saved: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(saved / "swin").save_pretrained(tmp_path)
    about = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3}
    about["image_std"] = [0.25] * 3
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    encoder = backbone(str(tmp_path), image_size=SIZE)
    assert (encoder.mean == 0.5).all()
    assert (encoder.std == 0.25).all()


def test_monai_networks_run() -> None:
    encoder = backbone("monai:DenseNet121", image_size=SIZE, pretrained=False)
    assert encoder(torch.rand(2, 3, *SIZE)).shape == (2, 1024, 1, 1)
    assert not batch_statistics(encoder)


@pytest.mark.parametrize("name", ["monai:UNet", "monai:resnet18"])
def test_an_unknown_monai_network_or_weights_it_lacks(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*pretrained=True.*DenseNet121.*Pass one"):
        backbone(name, image_size=SIZE)


def test_a_size_the_network_was_not_made_for(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"image_size=\(32, 48\).*ViTModel.*Pass the size"):
        backbone(str(saved / "vit"), image_size=(32, 48))


def test_a_small_cnn_refuses_photos_that_vanish() -> None:
    with pytest.raises(ValueError, match=r"image_size=\(8, 96\).*halving.*at least 16 pixels"):
        SmallCNN(16, image_size=(8, 96))


def test_a_missing_cell_hides_its_whole_block_and_nothing_else() -> None:
    encoder = TableEncoder(("age", "sex", "sex"), dim=4).eval()
    nan = float("nan")
    rows = torch.tensor([[0.3, nan, 7.0], [0.3, nan, nan], [0.3, 1.0, 0.0], [nan, 1.0, 0.0]])
    tokens = encoder(rows)
    assert tokens.isfinite().all()
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[1, 0], tokens[2, 0])
    assert torch.equal(tokens[2, 1], tokens[3, 1])
    assert not torch.equal(tokens[1, 1], tokens[2, 1])
    tokens.pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_cells_are_dropped_in_training_only() -> None:
    encoder = TableEncoder(("age", "sex"), dim=4, dropout=1.0)
    rows = torch.tensor([[0.3, 1.0], [float("nan")] * 2])
    assert torch.equal(*encoder(rows))
    assert not torch.equal(*encoder.eval()(rows))


def test_a_table_without_cells() -> None:
    with pytest.raises(ValueError, match=re.escape("cells is empty: a table has a cell. Name")):
        TableEncoder((), dim=4)


def test_what_lies_under_an_absent_photo_or_table_changes_no_bit() -> None:
    model = mmfusion.CMML(
        {
            "photo": (SmallCNN(16, image_size=SIZE), 16),
            "back": (Backbone(nn.Conv2d(3, 8, 8, 8), image_size=SIZE), 8),
            "table": (TableEncoder(("a", "b", "b"), dim=8), 8),
        },
        num_classes=2,
        dim=16,
    ).eval()
    inputs = {"photo": torch.rand(4, 3, *SIZE), "back": torch.rand(4, 3, *SIZE)}
    inputs["table"] = torch.tensor([[0.1, 0.0, 1.0]] * 4)
    present = torch.tensor([[True, False, True], [False, True, True], [True, True, False]])
    present = torch.cat([present, torch.zeros(1, 3, dtype=torch.bool)])
    expected = model(inputs, present).logits
    for column, value in enumerate(inputs.values()):
        value[~present[:, column]] = float("nan")
        value.requires_grad_()
    found = model(inputs, present).logits
    assert torch.equal(found, expected)
    found.sum().backward()
    for column, value in enumerate(inputs.values()):
        assert not value.grad[~present[:, column]].any()


def test_a_batch_that_lacks_every_photo_and_table_runs() -> None:
    encoders = {"photo": SmallCNN(16, image_size=SIZE), "table": TableEncoder(("a", "b"), dim=8)}
    model = mmfusion.CMML(
        {"photo": (encoders["photo"], 16), "table": (encoders["table"], 8), "third": 4},
        num_classes=2,
        dim=16,
    )
    out = model({"third": torch.rand(3, 4)}, labels=torch.tensor([0, 1, 0]))
    out.loss.backward()
    assert all(p.grad is not None for encoder in encoders.values() for p in encoder.parameters())
