"""tide::linear and others: products on a CPU with weights as they are, or with copies of them in another order.

ATen hands products in fp32 to another library, whose code does not use all that some makers' processors can do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from tide_compile.kernels.cpu.onednn import multiply, reordered
from tide_compile.kernels.cpu.packed_weights import copy_of

log = logging.getLogger("tide_compile")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] times the transpose of a weight [N, K], both in a dtype that oneDNN ``can_multiply``."""
    return torch.ops.tide.linear.default(x, weight)


def packed_linear(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """x [M, K] times the transposes of weights [N, K], one beside the other, from a copy of all of them in the order in
    which oneDNN reads it, see ``copy_of``."""
    return torch.ops.tide.packed_linear.default(x, weights)


def template_linear(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """As ``packed_linear``, by Inductor's C++ GEMM template, see ``gemm_template``, where ``has_template``."""
    return torch.ops.tide.template_linear.default(x, weights)


def _packed_linear(x: Tensor, weights: list[Tensor]) -> Tensor:
    return multiply(x, copy_of(weights, "onednn", reordered))


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
    ("linear(Tensor x, Tensor weight)", multiply, lambda x, weight: x.new_empty(x.shape[0], weight.shape[0])),
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
