"""Which parameters decay, and which learn slowly."""

from typing import Any

from torch import nn

from mmfusion.recipes.plan import Plan


def parameter_groups(model: nn.Module, plan: Plan) -> list[dict[str, Any]]:
    """Groups for an optimiser, each with its ``weight_decay`` and ``pace``.

    Weights that multiply activations decay; biases, norms, embeddings and learned tokens do not. A
    parameter counts as such a weight if its name ends in ``weight``, it has two axes or more, and
    no ``nn.Embedding`` holds it. An encoder that says ``pretrained = True`` learns at
    ``plan.backbone_rate`` times the learning rate, which is the ``pace`` of its groups.

    Args:
        model: Frozen parameters are left out.
        plan: Has ``weight_decay`` and ``backbone_rate``.

    Raises:
        ValueError: If ``backbone_rate`` is not 1 and nothing in ``model`` is pretrained.

    Example:
        >>> encoder, head = nn.Linear(2, 4), nn.Linear(4, 1)
        >>> encoder.pretrained = True
        >>> groups = parameter_groups(nn.Sequential(encoder, head), Plan(backbone_rate=0.1))
        >>> [(group["weight_decay"], group["pace"], len(group["params"])) for group in groups]
        [(0.01, 0.1, 1), (0.0, 0.1, 1), (0.01, 1.0, 1), (0.0, 1.0, 1)]
    """
    pretrained = {
        id(parameter)
        for module in model.modules()
        if getattr(module, "pretrained", False)
        for parameter in module.parameters()
    }
    if plan.backbone_rate != 1 and not pretrained:
        raise ValueError(
            f"backbone_rate={plan.backbone_rate}: no encoder of the model is pretrained, and it is "
            "for those, set by hand or by a preset. Set encoder.pretrained = True, or pass "
            "backbone_rate=1."
        )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()  # an encoder used twice
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            weight = name.endswith("weight") and parameter.ndim > 1
            decays = weight and not isinstance(module, nn.Embedding)
            pace = plan.backbone_rate if id(parameter) in pretrained else 1.0
            groups.setdefault((plan.weight_decay if decays else 0.0, pace), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "pace": pace}
        for (decay, pace), parameters in groups.items()
    ]
