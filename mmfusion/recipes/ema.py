"""A moving average of the weights, which often scores better than the last weights do."""

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of ``model`` that follows its parameters slowly and has its buffers as they are.

    Call ``update_parameters(model)`` after each step, then use ``module``. After ``n`` updates the
    decay is at most ``(1 + n) / (10 + n)``, so that a short run does not keep its initial weights.
    Buffers are copied, not averaged: a mean of two memory banks is neither.

    Args:
        model: What to follow; it is copied, on its device.
        decay: Share of the average that stays at an update, in the long run.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = moving_average(model, decay=0.9)
        >>> for value in (0.0, 11.0):
        ...     model.weight.data.fill_(value)
        ...     average.update_parameters(model)
        tensor([[0.]])
        tensor([[11.]])
        >>> average.module.weight.item()
        9.0

    References:
        The bound on early decays is that of TensorFlow's ``ExponentialMovingAverage``.
    """

    def follow(average: Tensor, weights: Tensor, updates: Tensor | int) -> Tensor:
        kept = min(decay, (1 + int(updates)) / (10 + int(updates)))
        return average.lerp(weights, 1 - kept)

    return AveragedModel(model, avg_fn=follow)
