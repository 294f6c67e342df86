"""Frozen encoders run once; the rest trains on their features as if they had run each time."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfusion
from mmfusion.presence import collate
from mmfusion.recipes import checkpoint
from mmfusion.recipes.caching import encode, from_features
from mmfusion.recipes.plan import Plan
from mmfusion.recipes.training import fit

JOIN = functools.partial(collate, names=("photo", "table"))


class Counting(nn.Module):
    """An encoder that counts the rows it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 5, 2), nn.BatchNorm2d(5), nn.Dropout())
        self.in_shape, self.rows, self.pretrained = (3, 4, 4), 0, True

    def forward(self, photos: Tensor) -> Tensor:
        self.rows += len(photos)
        return self.net(photos)


def model() -> Any:
    torch.manual_seed(0)
    return mmfusion.CMML({"photo": (Counting(), 5), "table": 2}, num_classes=2, dim=8, num_blocks=1)


def samples(num_samples: int = 12) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    photos = torch.rand(num_samples, 3, 4, 4, generator=generator)
    inputs = [{"photo": p if i % 3 else None, "table": p[0, 0, :2]} for i, p in enumerate(photos)]
    return [{"inputs": x, "labels": i % 2, "sample_ids": i} for i, x in enumerate(inputs)]


@torch.no_grad()
def logits(net: Any, rows: Any) -> torch.Tensor:
    batch = JOIN([rows[i] for i in range(len(rows))])
    return net.eval()(batch["inputs"], present=batch["present"]).logits


def test_features_give_the_answers_of_the_photos() -> None:
    net, rows = model(), samples()
    features = encode(net, rows, JOIN, ["photo"], batch_size=5)
    assert features[0]["inputs"]["photo"] is None
    assert features[1]["inputs"]["photo"].shape == (5, 3, 3)
    assert rows[1]["inputs"]["photo"].shape == (3, 4, 4)
    wanted = logits(net, rows)
    with from_features(net, features, ["photo"]):
        torch.testing.assert_close(logits(net, features), wanted)
        one = logits(net, features[:1])  # a batch without a photo
    torch.testing.assert_close(one, wanted[:1])


def test_training_on_features_leaves_the_encoder_and_writes_the_whole_model(tmp_path: Path) -> None:
    net, rows = model(), samples()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    features = encode(net, rows, JOIN, ["photo"])
    encoder = net.edge.encoders["photo"]
    rows_encoded = encoder.rows
    with from_features(net, features, ["photo"]):
        plan = Plan(epochs=2, batch_size=4, ema=0.5, backbone_rate=0.1)
        fit(net, features, lambda _: 0.5, plan, tmp_path, collate=JOIN, progress=False)
    assert encoder.rows == rows_encoded == len(rows)
    assert net.edge.encoders["photo"] is encoder
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    after = net.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "head.classify.weight" in changed
    assert not [name for name in changed if name.startswith("edge.encoders")]
    kept = checkpoint.load(tmp_path / "best.safetensors")[0]
    assert kept.keys() == after.keys()
    assert logits(net, rows).isfinite().all()


def test_an_encoder_is_given_back_after_an_error() -> None:
    net = model()
    encoder = net.edge.encoders["photo"]
    with (
        pytest.raises(RuntimeError),
        from_features(net, encode(net, samples(), JOIN, ["photo"]), ["photo"]),
    ):
        raise RuntimeError
    assert net.edge.encoders["photo"] is encoder


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["table"], r"names holds 'table': the model has an encoder for photo. Name"),
        (["photo"], r"names holds 'photo', which none of 1 samples has.*Leave it out"),
    ],
)
def test_what_cannot_be_taken_from_features(names: list[str], match: str) -> None:
    net = model()
    with pytest.raises(ValueError, match=match), from_features(net, samples(1), names):
        pass


def test_an_encoder_that_returns_no_tensor() -> None:
    class Pair(nn.Module):
        def forward(self, photos: Tensor) -> Any:
            return photos, None

    net = mmfusion.CMML({"photo": (Pair(), 5), "table": 2}, num_classes=2, dim=8)
    with pytest.raises(ValueError, match=r"encoder of 'photo' returned a tuple.*Leave it out"):
        encode(net, samples(), JOIN, ["photo"])
