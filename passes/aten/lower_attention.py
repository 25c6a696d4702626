"""lower_attention: attention of one query per sequence as sums, which Inductor fuses with what is around them, and that
of many to the keys that they can see.

Runs inside Inductor, on the ATen graph of a piece, as ``lower_linears`` does.
"""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from tide_compile.kernels.cpu import attention
from tide_compile.passes.aten.hash_of_sources import hash_of_sources
from tide_compile.passes.graph.fx_tools import replace_traced
from tide_compile.torch_internals.fx import CustomGraphPass, realize

_TOGETHER = 8  # heads with a sum in one loop, at most: each has an accumulator
_MOST_PARTS, _SHORTEST = 16, 32  # parts that keys are split into, and keys of a part: enough for a loop to be worth it

aten = torch.ops.aten
_FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
_SAME = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.clone.default}


class LowerAttention(CustomGraphPass):
    """Rewrite attention on a CPU.

    Before: ``o, _ = flash_attention(q, k, v)``, behind copies of keys and values that are repeated for groups of
    queries. After: for one query, q [B, heads, 1, D], ``attend_one``, in the loops of the segment; for several with a
    mask ``attend``, a call. Both read each key where it is. Attention that leaves out keys at random or whose other
    result is used stays as it is.

    Safe because a single query sees all keys but for the mask, in the same order of operations, in fp32, and because
    the weight of a key behind a mask of minus infinity is zero.
    """

    def uuid(self) -> object:
        """What Inductor's caches tell code made with this pass by."""
        return hash_of_sources()

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=_FLASH):
            arguments = dict(zip(("query", "key", "value", "dropout", "causal"), node.args, strict=False)) | node.kwargs
            length = arguments["query"].meta["val"].shape[2]
            one = isinstance(length, int) and length == 1  # comparing a symbol would add a guard
            only_first = all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
            mask, scale = arguments.get("attn_mask"), arguments.get("scale")
            plain = only_first and not arguments.get("dropout") and not arguments.get("causal")
            if not plain or (mask is None and not one):
                continue
            tensors = [arguments["query"], *(_unrepeated(arguments[name]) for name in ("key", "value"))]
            inputs = [*tensors, mask] if mask is not None else tensors
            written = functools.partial(attend_one if one else attention.attend, scale=scale)
            for user in list(node.users):
                replace_traced(graph, user, inputs, lambda *given, written=written: written(*given))
            graph.erase_node(node)


def attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float | None) -> Tensor:
    """softmax(q k^T + mask) v of q [B, heads, 1, D], k and v [B, heads or groups of them, L, D] and an additive mask,
    [1, L] or [B, heads or 1, 1, L], in fp32; returned in the dtype of q. A query that sees no key has zeros.

    Heads that share keys have a sum each, which Inductor puts into one loop that reads every key once. Keys are split
    into parts, the outermost loop, so that threads have equal shares and a part of the values stays in a fast cache.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    per_key = query.shape[1] // key.shape[1]
    together = max(n for n in range(1, _TOGETHER + 1) if per_key % n == 0)
    if together < per_key:
        sizes = (-1, -1, per_key // together, -1, -1)
        key, value = (x.unsqueeze(2).expand(sizes).flatten(1, 2) for x in (key, value))
    parts = _parts(key.shape[2])
    key, value = (x.float().unflatten(2, (parts, -1)).transpose(1, 2) for x in (key, value))  # [B, parts, groups, l, D]
    rows = realize(query.float() * scale).unflatten(1, (-1, together)).unsqueeze(1)
    scores = torch.stack([(row * key).sum(-1) for row in rows.unbind(3)])  # [together, B, parts, groups, l]
    if mask is not None:
        mask = mask.float().expand(query.shape[0], query.shape[1], 1, -1).unflatten(3, (parts, -1))
        scores = scores + mask.unflatten(1, (-1, together)).squeeze(3).permute(2, 0, 3, 1, 4)
    largest = scores.amax((2, 4), keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = torch.exp(scores - largest)
    sums = torch.stack([(row.unsqueeze(-1) * value).sum(3) for row in weights.unbind()]).sum(2)
    result = sums / weights.sum((2, 4)).clamp(min=1).unsqueeze(-1)  # the largest weight is 1: [together, B, groups, D]
    return result.permute(1, 2, 0, 3).flatten(1, 2).unsqueeze(2).to(query.dtype)


def _parts(length: int | torch.SymInt) -> int:
    """How many parts of equal length: of at least ``_SHORTEST`` keys if there are several."""
    if not isinstance(length, int):
        return 1
    return max(n for n in range(1, _MOST_PARTS + 1) if length % n == 0 and (n == 1 or length // n >= _SHORTEST))


def _unrepeated(keys: Node) -> Node:
    """The keys or values [B, groups, L, D] that ``keys`` [B, heads, L, D] repeats for groups of queries, or itself."""
    node = keys
    while node.target in _SAME:
        node = node.args[0]
    if node.target is not aten.expand.default or node.args[0].target is not aten.unsqueeze.default:
        return keys
    source, dim = node.args[0].args
    batch, groups, repeated, length, size = node.meta["val"].shape
    same = keys.meta["val"].shape == (batch, groups * repeated, length, size)
    return source if dim == 2 and same else keys
