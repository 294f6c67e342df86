"""One training step of CMML against a masked Transformer of the same width and depth."""

import harness
import torch
from harness import Case
from torch import nn

import mmfusion

WIDTH, TOKENS, HEADS, BLOCKS, CLASSES = 128, 4, 4, 3, 5
FEATURES = {"a": 512, "b": 768, "c": 20}


class MaskedTransformer(nn.Module):
    """Torch parts: project, add a modality embedding, encode with padding hidden, pool."""

    def __init__(self):
        super().__init__()
        self.project = nn.ModuleDict(
            {name: nn.Linear(width, TOKENS * WIDTH) for name, width in FEATURES.items()}
        )
        self.modality = nn.Parameter(torch.zeros(len(FEATURES), 1, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encode = nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs, present, labels):
        parts = [
            self.project[name](torch.where(present[:, i, None], x, 0)).unflatten(1, (TOKENS, WIDTH))
            for i, (name, x) in enumerate(inputs.items())
        ]
        tokens = (torch.stack(parts, 1) + self.modality).flatten(1, 2)
        hidden = (~present).repeat_interleave(TOKENS, 1)
        tokens = self.encode(tokens, src_key_padding_mask=hidden)
        seen = (~hidden).unsqueeze(-1)
        pooled = torch.where(seen, tokens, 0).sum(1) / seen.sum(1).clamp(min=1)
        return nn.functional.cross_entropy(self.head(pooled), labels)


class Step:
    """One optimiser step on a fixed batch."""

    def __init__(self, model, device, batch):
        self.model = model.to(device).train()
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.inputs = {n: torch.randn(batch, width, device=device) for n, width in FEATURES.items()}
        self.labels = torch.randint(0, CLASSES, (batch,), device=device)
        self.present = torch.rand(batch, len(FEATURES), device=device) > 0.4
        self.present[:, 0] = True
        self.ids = torch.arange(batch, device=device)

    def __call__(self):
        self.optimiser.zero_grad()
        if isinstance(self.model, MaskedTransformer):
            loss = self.model(self.inputs, self.present, self.labels)
        else:
            out = self.model(self.inputs, self.present, labels=self.labels, sample_ids=self.ids)
            loss = out.loss
        loss.backward()
        self.optimiser.step()


def main():
    arguments = harness.arguments(__doc__)
    device = arguments.device
    recorder = harness.Recorder(arguments.out / "cmml_step.csv", device)
    sizes = {"dim": WIDTH, "num_tokens": TOKENS, "num_heads": HEADS, "num_blocks": BLOCKS}
    sizes |= {"dropout": 0.0}  # as its opponent
    for batch in (64,) if device == "cpu" else (64, 512):
        cmml = mmfusion.CMML(dict(FEATURES), num_classes=CLASSES, **sizes)
        config = {"D": WIDTH, "L": TOKENS, "blocks": BLOCKS, "dtype": "torch.float32"}
        case = Case("cmml_step", "B", batch, config, list, lambda: None, 0.0)
        for name, model in (("CMML", cmml), ("MaskedTransformer", MaskedTransformer())):
            call = Step(model, device, batch)
            median, q20, q80 = harness.quantiles(call, device, seconds=2.0)
            recorder.add(case, name, "both", "eager_us", value=median, q20=q20, q80=q80)
            recorder.add(case, name, "both", "peak_mb", value=harness.peak_mb(call, device))
    recorder.save()


if __name__ == "__main__":
    main()
