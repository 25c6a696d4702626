"""static_cache: the cache that an engine keeps between calls, and which sizes are compiled for."""

from __future__ import annotations

import torch
from torch import Tensor

from tide_compile.passes.aten.gemm_forms import FEW_ROWS

SMALLEST_CACHE = 256  # tokens; below that a longer cache costs nothing measurable and saves a recompilation


def mark_sizes(kwargs: dict[str, object]) -> None:
    """Compile prompts of all lengths as one dynamic shape from the first, not from the second on, and every small
    number of sequences for itself: products of few rows have forms that need it."""
    ids = kwargs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return
    masks = kwargs.get("attention_mask")
    for tensor in (ids, kwargs.get("position_ids"), *(masks.values() if isinstance(masks, dict) else (masks,))):
        if isinstance(tensor, Tensor):
            if len(ids) <= FEW_ROWS:
                torch._dynamo.mark_static(tensor, 0)
            if ids.shape[1] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 2 if tensor.dim() == 4 else 1)


def has_rows(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
