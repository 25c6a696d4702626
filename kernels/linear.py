"""tide::linear: products by oneDNN on a CPU, with weights as they are or in copies in oneDNN's own order.

ATen hands products in fp32 to another library, whose code does not use all that some makers' processors can do.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_SUPPORT = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
# first weight -> (addresses of all, kind of copy) -> (their states when they were copied, the copy)
_copies: MutableMapping[Tensor, dict[tuple, tuple[list[object], Tensor]]] = WeakTensorKeyDictionary()


def can_multiply(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there, and this processor has instructions for products in ``dtype``."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype in _SUPPORT and getattr(torch.ops.mkldnn, _SUPPORT[dtype])())


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] times the transpose of a weight [N, K], both in a dtype that ``can_multiply``."""
    return torch.ops.tide.linear.default(x, weight)


def packed_linear(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """x [M, K] times the transposes of weights [N, K], one beside the other, from a copy of all of them in the order in
    which oneDNN reads it, see ``copy_of``."""
    return torch.ops.tide.packed_linear.default(x, weights)


def packed_bytes() -> int:
    """Bytes of all copies of weights that there are in this process, see ``TIDEConfig.pack_weights``."""
    found = [copy for copies in _copies.values() for _, copy in copies.values()]
    return sum(torch.ops.mkldnn._nbytes(copy) if copy.is_mkldnn else copy.nbytes for copy in found)


def copy_of(weights: Sequence[Tensor], kind: object, make: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``make`` does of weights [N, K] one above the other, made once and kept as long as the first is.

    Weights that have got other values since are copied again; values that were written through ``.data`` are not
    noticed.
    """
    copies = _copies.setdefault(weights[0], {})
    key = kind, *(weight.data_ptr() for weight in weights)
    states = [None if weight.is_inference() else weight._version for weight in weights]
    known = copies.get(key)
    if known is None or known[0] != states:
        known = states, make(torch.cat(weights).detach())
        copies[key] = known
    return known[1]


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _packed_linear(x: Tensor, weights: list[Tensor]) -> Tensor:
    return _linear(x, copy_of(weights, "onednn", torch.ops.mkldnn._reorder_linear_weight))


library = torch.library.Library("tide", "FRAGMENT")
for _schema, _run, _out in (
    ("linear(Tensor x, Tensor weight) -> Tensor", _linear, lambda weight: weight.shape[0]),
    ("packed_linear(Tensor x, Tensor[] weights) -> Tensor", _packed_linear, lambda ws: sum(w.shape[0] for w in ws)),
):
    _name = _schema.partition("(")[0]
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(_name, _run, "CPU")
    torch.library.register_fake(
        f"tide::{_name}", lambda x, given, out=_out: x.new_empty(x.shape[0], out(given)), lib=library
    )
