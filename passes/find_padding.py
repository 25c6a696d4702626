"""find_padding: the input that says which tokens are padding."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from tide_compile.passes.errors import PaddingError
from tide_compile.passes.graph.fx_tools import ancestors, hint, value_of
from tide_compile.passes.plan import Padding, Plan
from tide_compile.torch_internals.fx import ATTENTION


def find_padding(gm: GraphModule, plan: Plan) -> dict[str, Padding | None]:
    """Find the attention mask among the placeholders: ``[B, L]`` of 0/1, ``[B, 1, S, L]`` as generate() builds it, or
    ``[B, 1, 1, L]``.

    Of several 4-D masks (one per kind of attention) the one for full attention is taken, else the first: a token that
    is padding sees nothing in any of them.

    Raises:
        PaddingError: the mask does not fit the hidden states, or attention has a mask and none of the
            graph's arguments is called one.
    """
    masks = [n for n in gm.graph.find_nodes(op="placeholder") if "attention_mask" in n.name and _is_tensor(n)]
    masks = [n for n in masks if value_of(n).dim() in (2, 4)]
    if not masks:
        unknown = _masks_of_attention(gm.graph)
        if unknown:
            raise PaddingError(
                f"attention is masked by the argument {unknown[0].name!r} of this graph, made before a graph break, so "
                "which tokens are padding is not known. Find the break with TORCH_LOGS=graph_breaks."
            )
        return {"padding": None}
    chosen = next((n for n in masks if "full_attention" in n.name), masks[0])
    mask, rows = (tuple(map(hint, v.shape)) for v in (value_of(chosen), plan.boundaries.entering_value))
    if does_not_fit(mask, rows):
        raise PaddingError(does_not_fit(mask, rows))
    return {"padding": Padding(chosen.name, value_of(chosen))}


def _masks_of_attention(graph: Graph) -> list[Node]:
    """Arguments of the graph, neither weights nor buffers nor integers, that masks of attention are made of."""
    masks = [n.args[3] if len(n.args) > 3 else n.kwargs.get("attn_mask") for n in graph.nodes if n.target is ATTENTION]
    sources = {a for m in masks if isinstance(m, Node) for a in ancestors(m, lambda n: n.op == "placeholder")}
    return [n for n in sources if n.op == "placeholder" and "buffers" not in n.name and _may_mask(value_of(n))]


def _may_mask(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
        return False
    return value.dim() > 1 and (value.dtype == torch.bool or value.is_floating_point())


def does_not_fit(mask: tuple[int, ...], rows: tuple[int, ...]) -> str | None:
    """The message of a ``PaddingError`` if a mask of this shape says nothing about hidden states of this shape."""
    if mask[0] in (1, rows[0]) and mask[-1] >= rows[1]:
        return None
    return (
        f"the attention mask is {list(mask)}, but the hidden states are {list(rows)}: the model adds tokens of its own "
        "or has another order of dimensions, and which tokens are padding is not known. Exits are not possible with it."
    )


def _is_tensor(node: Node) -> bool:
    return isinstance(value_of(node), torch.Tensor)
