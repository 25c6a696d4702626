"""gemm_template: ``tide::template_linear`` lowered to Inductor's C++ GEMM template.

Inductor packs weights only when they are constants of the code; here the code of one layer serves all of them, so that
its copies are made, and kept, where it runs.
"""

from __future__ import annotations

import torch
import torch._inductor.lowering  # before the template, which it imports itself
from torch._inductor import ir
from torch._inductor.codegen.cpp_gemm_template import CppGemmTemplate
from torch._inductor.codegen.cpp_micro_gemm import CppMicroGemm, LayoutType, create_micro_gemm
from torch._inductor.codegen.cpp_utils import get_gemm_template_output_and_compute_dtype
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.select_algorithm import autotune_select_algorithm
from torch._inductor.utils import parallel_num_threads
from torch._inductor.virtualized import V

import tide_compile.kernels.cpu.linear  # noqa: F401 (defines the operators)

NAMES = (
    "torch._inductor.codegen.cpp_gemm_template.CppGemmTemplate.add_choices",
    "torch._inductor.codegen.cpp_gemm_template.CppGemmTemplate.block_weight",
    "torch._inductor.codegen.cpp_gemm_template.CppGemmTemplate.pack_vnni_weight",
    "torch._inductor.codegen.cpp_micro_gemm.create_micro_gemm",
    "torch._inductor.codegen.cpp_utils.get_gemm_template_output_and_compute_dtype",
    "torch._inductor.lowering.register_lowering",
    "torch._inductor.select_algorithm.autotune_select_algorithm",
)

_INTERLEAVED = {LayoutType.NORMAL: 1, LayoutType.VNNI2: 2, LayoutType.VNNI4: 4}


class _BlockedGemm(CppGemmTemplate):
    """For weights that are in blocks when they come."""

    @classmethod
    def block_weight(cls, W: ir.IRNode, new_size: list[int], padding: int) -> ir.IRNode:
        whole = W if isinstance(W, ir.TensorBox) else ir.TensorBox(W)
        return ir.ExternKernel.realize_input(lowerings[torch.ops.aten.view.default](whole, new_size))

    @classmethod
    def pack_vnni_weight(cls, W: ir.IRNode, micro_gemm: CppMicroGemm, new_size: list[int]) -> ir.IRNode:
        return W


def _blocking(rows: object, outs: int, ins: int, dtype: torch.dtype) -> tuple[int, int]:
    """Columns of the blocks in which the template will read a weight, and how many of its rows take turns."""
    output, compute = get_gemm_template_output_and_compute_dtype(dtype)
    inner = create_micro_gemm(
        "micro_gemm", rows, outs, ins, input_dtype=dtype, input2_dtype=dtype, output_dtype=output,
        compute_dtype=compute, num_threads=parallel_num_threads(),
    )  # fmt: skip
    return inner.register_blocking.block_n, _INTERLEAVED[inner.get_b_layout()]


def _lower(x: ir.TensorBox, weights: list[ir.TensorBox]) -> ir.TensorBox:
    (rows, ins), dtype = x.get_size(), x.get_dtype()
    outs = filled = sum(weight.get_size()[0] for weight in weights)
    while filled % (blocking := _blocking(rows, filled, ins, dtype))[0]:
        filled += -filled % blocking[0]
    copied = fallback_handler(torch.ops.tide.blocked.default, add_to_fallback_set=False)(weights, filled, *blocking)
    V.graph.never_reuse_buffers.add(copied.get_name())  # it is what ``copy_of`` keeps
    x = ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))
    layout = ir.FixedLayout(x.get_device(), dtype, [rows, filled])
    choices: list[object] = []
    _BlockedGemm.add_choices(choices, layout, [x, copied])
    result, _ = autotune_select_algorithm("tide_template_linear", choices, [x, copied], layout)
    return result if filled == outs else lowerings[torch.ops.aten.slice.Tensor](result, 1, 0, outs)


register_lowering(torch.ops.tide.template_linear.default, type_promotion_kind=None)(_lower)
