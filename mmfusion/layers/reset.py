"""One way to initialise a container: its children in order, then its own parameters."""

from torch import nn

__all__ = ["reset_children"]


def reset_children(module: nn.Module) -> None:
    """Call ``reset_parameters`` on every child, and look inside those that have none.

    The order is that of construction, so that with one seed a module made usable on the meta device
    (``to_empty`` then ``reset_parameters``) holds the values of one built normally. Not so with
    parts that were passed in ready-made: those were drawn before their container, and with other
    numbers.

    Raises:
        ValueError: If a module holds parameters of its own and has no ``reset_parameters``.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(1, 1, device="meta")).to_empty(device="cpu")
        >>> reset_children(model)
        >>> bool(model[0].weight.isfinite().all())
        True
    """
    for name, child in module.named_children():
        reset = getattr(child, "reset_parameters", None)
        if reset is not None:
            reset()
            continue
        reset_children(child)
        own = getattr(child, "_reset_parameters", None)  # as torch's attention spells it
        if own is not None:
            own()
        elif any(True for _ in child.parameters(recurse=False)):
            raise ValueError(
                f"{name} is a {type(child).__name__} with parameters and without reset_parameters: "
                "who draws them is unknown. Give it that method, or initialise it by hand."
            )
