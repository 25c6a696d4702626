"""find_padding: the input that says which tokens are padding."""

from __future__ import annotations

import torch
from tide_compile.passes.errors import PaddingError
from tide_compile.passes.fx_tools import value_of
from tide_compile.passes.plan import Padding, Plan
from torch.fx import GraphModule


def find_padding(gm: GraphModule, plan: Plan) -> dict[str, Padding | None]:
    """Find the attention mask among the placeholders: ``[B, L]`` of 0/1, or ``[B, 1, S, L]`` as generate() builds it.

    Of several 4-D masks (one per kind of attention) the one for full attention is taken, else the first: a token that
    is padding sees nothing in any of them.

    Raises:
        PaddingError: the mask has fewer columns than the layers have rows.
    """
    masks = [n for n in gm.graph.find_nodes(op="placeholder") if "attention_mask" in n.name and _is_tensor(n)]
    masks = [n for n in masks if value_of(n).dim() in (2, 4)]
    if not masks:
        return {"padding": None}
    chosen = next((n for n in masks if "full_attention" in n.name), masks[0])
    columns, rows = _number(value_of(chosen).shape[-1]), _number(plan.boundaries.entering_value.shape[1])
    if columns < rows:
        raise PaddingError(mask_too_short(columns, rows))
    return {"padding": Padding(chosen.name, value_of(chosen))}


def mask_too_short(columns: int, rows: int) -> str:
    """The message of a ``PaddingError``."""
    return (
        f"the attention mask has {columns} columns, but the layers run {rows} tokens: the model puts tokens of its own "
        "in front, and which tokens are padding is not known. Exits are not possible with it."
    )


def _number(size: int | torch.SymInt) -> int:
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _is_tensor(node: torch.fx.Node) -> bool:
    return isinstance(value_of(node), torch.Tensor)
