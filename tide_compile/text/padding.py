"""padding: rows of token ids of several lengths as one batch.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, S] int64, for generation."""
    return _padded(rows, pad, device, "left")


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, S] int64, for reading: positions need no correction."""
    return _padded(rows, 0, device, "right")


def _padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device, side: str) -> tuple[Tensor, Tensor]:
    tensors = [torch.tensor(row) for row in rows]
    ids = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad, padding_side=side)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tensors], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)
