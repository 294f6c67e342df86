"""Class contrastive loss: streamed, with the matrix of pairs, and pytorch-metric-learning."""

from functools import partial

import harness
import torch
from harness import Case

from mmfusion import functional

CLASSES = 10
WIDTH = 128


def ours(vectors, labels, *, backend="auto"):
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    yes = torch.ones_like(labels, dtype=torch.bool)
    loss, number = functional.class_contrastive(
        vectors, vectors, labels, labels, yes, yes, temperature=0.1, backend=backend
    )
    return torch.where(number > 0, loss, 0).sum() / (number > 0).sum().clamp(min=1)


def metric_learning():
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=0.1)


def main():
    arguments = harness.arguments(__doc__)
    device, gpu = arguments.device, arguments.device == "cuda"
    recorder = harness.Recorder(arguments.out / "contrastive.csv", device)
    rates = harness.measure_rates(device)
    counts = (512, 2048, 8192, 32768) if gpu else (256, 1024, 2048)
    for rows in counts[:2] if arguments.quick else counts:

        def inputs(rows=rows):
            vectors = torch.randn(rows, WIDTH, device=device)
            return [vectors.requires_grad_(), torch.randint(0, CLASSES, (rows,), device=device)]

        flops = 2.0 * rows * rows * WIDTH
        once = 4.0 * rows * WIDTH
        case = Case(
            "class_contrastive",
            "rows",
            rows,
            {"D": WIDTH, "classes": CLASSES, "dtype": "torch.float32"},
            inputs,
            partial(ours, backend="torch"),
            1e-4,
            {"forward": flops, "backward": 2 * flops, "both": 3 * flops},
            {"forward": once, "backward": 3 * once, "both": 4 * once},
            partial(inputs, min(rows, 8192)),  # pairs in fp64 have no room above
        )
        providers = {
            "mmfusion": ours,
            "mmfusion torch": partial(ours, backend="torch"),
            "compiled": harness.compiled(partial(ours, backend="torch")),
            "metric-learning": lambda vectors, labels: metric_learning()(vectors, labels),
        }
        harness.run(recorder, case, providers, rates, seconds=0.05 if gpu else 0.1)


if __name__ == "__main__":
    main()
