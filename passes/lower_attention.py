"""lower_attention: attention of one query per sequence as sums, which Inductor fuses with what is around them.

Runs inside Inductor, on the ATen graph of a piece, as ``lower_linears`` does.
"""

from __future__ import annotations

import operator

import torch
from tide_compile.passes.fx_tools import replace_traced
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class LowerAttention(CustomGraphPass):
    """Rewrite attention of one query on a CPU.

    Before: ``o, _ = flash_attention(q, k, v)`` with q [B, heads, 1, D]: a call from Python, behind copies of keys and
    values that are repeated for groups of queries. After: ``attend_one``, in the loops of the segment, which reads
    each key where it is. Attention that leaves out keys at random or whose other result is used stays as it is.

    Safe because a single query sees all keys but for the mask, in the same order of operations, in fp32.
    """

    def uuid(self) -> object:
        """What Inductor's caches tell code made with this pass by."""
        return get_hash_for_files((__file__,))

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=_FLASH):
            arguments = dict(zip(("query", "key", "value", "dropout", "causal"), node.args, strict=False)) | node.kwargs
            length = arguments["query"].meta["val"].shape[2]
            one = isinstance(length, int) and length == 1  # comparing a symbol would add a guard
            only_first = all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
            if not one or not only_first or arguments.get("dropout") or arguments.get("causal"):
                continue
            tensors = [arguments["query"], arguments["key"], arguments["value"]]
            mask, scale = arguments.get("attn_mask"), arguments.get("scale")
            inputs = [*tensors, mask] if mask is not None else tensors
            for user in list(node.users):
                replace_traced(graph, user, inputs, lambda *given, scale=scale: attend_one(*given, scale=scale))
            graph.erase_node(node)


def attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float | None) -> Tensor:
    """softmax(q k^T + mask) v of q [B, heads, 1, D], k and v [B, heads or groups of them, L, D] and an additive mask,
    [1, L] or [B, heads or 1, 1, L], in fp32; returned in the dtype of q."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if key.shape[1] != query.shape[1]:  # each key serves a group of queries
        sizes = (-1, -1, query.shape[1] // key.shape[1], -1, -1)
        key, value = (x.unsqueeze(2).expand(sizes).flatten(1, 2) for x in (key, value))
    scores = (query.float() * scale * key.float()).sum(-1)  # [B, heads, L]
    if mask is not None:
        scores = scores + mask.float()[..., 0, :]
    weights = torch.softmax(scores, -1).unsqueeze(-1)
    return (weights * value.float()).sum(2, keepdim=True).to(query.dtype)
