"""compaction_cost: when leaving rows out pays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from tide_compile.passes.graph.cost import Device, bytes_of
from tide_compile.passes.graph.fx_tools import value_of

aten = torch.ops.aten

FLOPS = "tide_flops"  # node.meta: (operations of the node on all rows, whether it now runs on some only)
KEYS = "tide_keys"  # of attention: (bytes of K and V moved for all rows, bytes read, whether for some rows only)
MOVED = "tide_moved"  # node.meta: the fake value that a gather or scatter reads or writes
_COPIES = {aten.reshape.default, aten.contiguous.default, aten.clone.default}


@dataclass(frozen=True, slots=True)
class Work:
    """What a compact segment does, for the ``rows`` that the sizes in its graph stand for.

    Attributes:
        whole: operations on all rows, whatever is left out. some: operations on the chosen rows, if all are chosen.
        weights: bytes of the weights. keys: bytes of keys and values that attention and what prepares them move.
        whole_keys, some_keys: those that the compact segment's attention reads, for all rows and for the chosen ones.
        moved: bytes of the values that are gathered and scattered, if all rows are chosen. moves: their number.
    """

    rows: int
    whole: float
    some: float
    weights: float
    keys: float
    whole_keys: float
    some_keys: float
    moved: float
    moves: int

    def masked_seconds(self, rows: int, device: Device) -> float:
        """All of ``rows`` rows, with masks."""
        scale = rows / self.rows
        return self._seconds(scale * (self.whole + self.some), scale * self.keys, device)

    def left(self, rows: int, kept: int) -> float:
        """The share of the operations that ``kept`` of ``rows`` rows need."""
        return (self.whole + kept / rows * self.some) / (self.whole + self.some)

    def compact_seconds(self, rows: int, kept: int, device: Device) -> float:
        """``kept`` of ``rows`` rows."""
        scale, share = rows / self.rows, kept / self.rows
        operations = scale * self.whole + share * self.some
        moved = scale * self.whole_keys + share * (self.some_keys + 2 * self.moved)
        return self._seconds(operations, moved, device) + self.moves * device.overhead

    def _seconds(self, operations: float, moved: float, device: Device) -> float:
        return max(operations / device.flops, self.weights / device.bandwidth) + moved / device.bandwidth


def work_of(gm: GraphModule, rows: int) -> Work:
    """Add up a compact segment (after dead code is gone)."""
    counted = [n.meta[FLOPS] for n in gm.graph.nodes if FLOPS in n.meta]
    moved = [bytes_of(n.meta[MOVED]) for n in gm.graph.nodes if MOVED in n.meta]
    operands = {n for node in gm.graph.nodes if node.meta.get(FLOPS, (0,))[0] for n in node.all_input_nodes}
    weights = sum(bytes_of(value_of(n)) for n in operands if n.op == "placeholder" and value_of(n).dim() == 2)
    whole, some = (sum(f for f, is_some in counted if is_some == wanted) for wanted in (False, True))
    keys = [n.meta[KEYS] for n in gm.graph.nodes if KEYS in n.meta]
    whole_keys, some_keys = (sum(read for _, read, is_some in keys if is_some == wanted) for wanted in (False, True))
    return Work(rows, whole, some, weights, sum(m for m, _, _ in keys), whole_keys, some_keys, sum(moved), len(moved))


def keys_of(node: Node) -> tuple[float, float]:
    """Bytes of keys and values that attention makes move on all rows, and that it reads itself: an operand that is
    copied on the way (heads repeated for groups of queries) is read and written once more."""
    operands = [n for n in node.args[1:3] if isinstance(n, Node)]
    read = [bytes_of(value_of(n)) for n in operands]
    moved = [(3 if n.target in _COPIES else 1) * size for n, size in zip(operands, read, strict=True)]
    return sum(moved), sum(read)
