"""Triton twins of the ops in ``reference.py``: tensors in, tensors out, no autograd.

The only place that imports triton. Op implementations in ``ops.py`` import it on first use.
"""

from mmfusion.kernels.contrastive import contrastive_backward, contrastive_forward
from mmfusion.kernels.presence_attention import (
    presence_attention_backward,
    presence_attention_forward,
)
from mmfusion.kernels.retrieve import retrieve_backward, retrieve_forward

__all__ = [
    "contrastive_backward",
    "contrastive_forward",
    "presence_attention_backward",
    "presence_attention_forward",
    "retrieve_backward",
    "retrieve_forward",
]
