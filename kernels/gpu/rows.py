"""rows_of: a hidden state as rows for a kernel."""

from __future__ import annotations

from torch import Tensor


def rows_of(h: Tensor) -> Tensor:
    """[B, S, H] as [T, H] whose rows lie in one piece each; a view where that is possible."""
    x = h.reshape(-1, h.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
