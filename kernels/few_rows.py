"""few_rows: products of so few rows that reading the weights is all that takes time.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import linear

FEW_ROWS = 4  # up to here a product as one sum per row is the fastest, as far as has been seen


def few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [..., K] times the transpose of ``weight`` [N, K], in the dtype of ``x``. For few rows as a sum in fp32,
    which Inductor fuses with what is around it, where a matrix product is a call of its own and mostly padding. A
    symbolic number of rows counts as many."""
    rows = math.prod(x.shape[:-1])
    if isinstance(rows, int) and rows <= FEW_ROWS:
        return (x.unsqueeze(-2).float() * weight.float()).sum(-1).to(x.dtype)
    return linear(x, weight)
