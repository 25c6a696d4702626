"""tide::attend: attention of many queries on a CPU, to the keys that they can see.

A static cache is as long as all tokens to come, and a token of a prompt sees none behind it: the fused attention of
ATen multiplies with all keys all the same, for about half the time of a long prompt and most of that of a short one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

ROWS = 128  # queries that share a range of keys


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """softmax(q k^T scale + mask) v of q [B, heads, S, D], k and v [B, heads or groups of them, L, D], and an additive
    mask [S, L] or [B or 1, heads or 1, S, L], in which S and L may be 1 as well.

    Queries are taken in blocks, each with the keys from the first to the last for which the mask of any of them is not
    minus infinity. ``scale`` None: the root of 1 / D.
    """
    return torch.ops.tide.attend.default(query, key, value, mask, scale)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    out = _empty(query, key, value, mask, scale)
    mask = mask.expand(*mask.shape[:-2], query.shape[2], key.shape[2])
    for start in range(0, query.shape[2], ROWS):
        rows = slice(start, start + ROWS)
        bias = mask[..., rows, :]
        seen = (bias.flatten(0, -2).amax(0) > -torch.inf).nonzero()
        keys = slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 1)
        out[:, :, rows] = scaled_dot_product_attention(
            query[:, :, rows], key[:, :, keys], value[:, :, keys], bias[..., keys], scale=scale, enable_gqa=True
        )
    return out


def _empty(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)


_library = torch.library.Library("tide", "FRAGMENT")
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor mask, float? scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("attend", _attend, "CPU")
torch.library.register_fake("tide::attend", _empty, lib=_library)
