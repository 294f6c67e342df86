"""``tl.topk`` for the interpreter in one numpy call instead of hundreds of interpreted steps."""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def fast_topk(x, k, dim=None):
    k = int(getattr(k, "value", k))
    best = np.ascontiguousarray(np.sort(x.handle.data, axis=-1)[..., ::-1][..., :k])
    kind = tl.block_type(x.type.scalar, list(best.shape))
    return tl.core.tensor(TensorHandle(best, x.handle.dtype), kind)
