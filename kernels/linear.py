"""tide::linear and others: products on a CPU with weights as they are, or with copies of them in another order.

ATen hands products in fp32 to another library, whose code does not use all that some makers' processors can do.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

log = logging.getLogger("tide_compile")

_SUPPORT = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
_copies: MutableMapping[Tensor, dict[tuple, _Copy]] = WeakTensorKeyDictionary()  # of the first weight of each


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


def template_linear(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """As ``packed_linear``, by Inductor's C++ GEMM template, see ``gemm_template``, where ``has_template``."""
    return torch.ops.tide.template_linear.default(x, weights)


@functools.cache
def has_template(dtype: torch.dtype) -> bool:
    """Whether Inductor has its template, and inner loops for products in ``dtype`` on this processor."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    try:
        import tide_compile.kernels.gemm_template  # noqa: F401 (only here: its many imports are not for other processes)
    except ImportError as error:
        log.warning("products do not try Inductor's C++ GEMM template, which this torch has elsewhere: %s", error)
        return False
    return True


def packed_bytes() -> int:
    """Bytes of all copies of weights that there are in this process, see ``TIDEConfig.pack_weights``."""
    found = [each.copy for copies in list(_copies.values()) for each in list(copies.values())]
    return sum(torch.ops.mkldnn._nbytes(copy) if copy.is_mkldnn else copy.nbytes for copy in found)


def drop_packed() -> None:
    """Forget all copies of weights: they are made anew when they are next needed. For weights that were written to in a
    way that cannot be noticed, see ``copy_of``."""
    _copies.clear()


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy, and of what: ``state`` of the weights, and their memory, so that no other gets the same name."""

    state: list[tuple[int, int, int | None]]
    memory: list[StorageWeakRef]
    copy: Tensor


def copy_of(weights: Sequence[Tensor], kind: object, make: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``make`` does of weights [N, K] one above the other, made once and kept as long as the first is.

    Weights that have got other values or other memory since are copied again. Not noticed are values that were written
    in place through ``.data``, as PEFT does when it merges an adapter, or into inference tensors: ``drop_packed``.
    """
    copies = _copies.setdefault(weights[0], {})
    key = kind, *map(id, weights)
    state = [
        (w.untyped_storage()._cdata, w.storage_offset(), None if w.is_inference() else w._version) for w in weights
    ]
    known = copies.get(key)
    if known is None or known.state != state:
        for stale in [k for k, c in list(copies.items()) if any(memory.expired() for memory in c.memory)]:
            del copies[stale]
        whole = weights[0] if len(weights) == 1 else torch.cat(weights)
        memory = [StorageWeakRef(weight.untyped_storage()) for weight in weights]
        copies[key] = known = _Copy(state, memory, make(whole.detach()))
    return known.copy


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _packed_linear(x: Tensor, weights: list[Tensor]) -> Tensor:
    return _linear(x, copy_of(weights, "onednn", torch.ops.mkldnn._reorder_linear_weight))


def _template_linear(x: Tensor, weights: list[Tensor]) -> Tensor:
    return torch.nn.functional.linear(x, torch.cat(weights))


def _blocked(weights: list[Tensor], outs: int, width: int, interleaved: int) -> Tensor:
    """The transpose [K, outs], filled up with zeros, in blocks [outs / width, K, width], of which each ``interleaved``
    rows take turns."""

    def make(weight: Tensor) -> Tensor:
        filled = torch.nn.functional.pad(weight, (0, 0, 0, outs - weight.shape[0]))
        blocks = filled.view(outs // width, width, -1, interleaved).transpose(1, 2)
        return blocks.reshape(weight.shape[1], outs).contiguous()

    return copy_of(weights, (outs, width, interleaved), make)


def _one_beside_the_other(x: Tensor, weights: list[Tensor]) -> Tensor:
    return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))


_library = torch.library.Library("tide", "FRAGMENT")
for _schema, _run, _fake in (
    ("linear(Tensor x, Tensor weight)", _linear, lambda x, weight: x.new_empty(x.shape[0], weight.shape[0])),
    ("packed_linear(Tensor x, Tensor[] weights)", _packed_linear, _one_beside_the_other),
    ("template_linear(Tensor x, Tensor[] weights)", _template_linear, _one_beside_the_other),
    (
        "blocked(Tensor[] weights, int outs, int width, int interleaved)",
        _blocked,
        lambda weights, outs, *_: weights[0].new_empty(weights[0].shape[1], outs),
    ),
):
    _name = _schema.partition("(")[0]
    _library.define(f"{_schema} -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"tide::{_name}", _fake, lib=_library)
