"""One way to initialise a container: its children in order, then its own parameters."""

from torch import nn

__all__ = ["reset_children"]


def reset_children(module: nn.Module) -> None:
    """Call ``reset_parameters`` on every child, and look inside those that have none.

    The order is that of construction, so that with one seed a module made usable on the meta device
    (``to_empty`` then ``reset_parameters``) holds the values of one built normally.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(1, 1, device="meta")).to_empty(device="cpu")
        >>> reset_children(model)
        >>> bool(model[0].weight.isfinite().all())
        True
    """
    for child in module.children():
        reset = getattr(child, "reset_parameters", None)
        if reset is None:
            reset_children(child)
        else:
            reset()
