"""build: compile the kernels for a GPU that is not there, and say what came out.

Legend: T rows, H hidden, D bottleneck, R rank.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from tide_compile.kernels import compact, project, route, scatter
from tide_compile.kernels.gpu.autotune import fitting
from tide_compile.kernels.gpu.cards import DTYPES, card_of, check_dtype


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the model: ``hidden`` H, ``bottleneck`` D of the routers, ``rank`` R of low-rank projections."""

    hidden: int = 4096
    bottleneck: int = 128
    rank: int = 64


@dataclass(frozen=True, slots=True)
class Launch:
    """One specialisation of a kernel in one configuration.

    Attributes:
        name: kernel and case. dtype: a key of ``DTYPES``, of the hidden state. rows: T.
        kernel: the ``triton.jit`` function. signature: type of each argument. constants: values of the constexprs.
        config: tile sizes, warps, stages.
        bytes_moved: to and from memory when every operand moves once.
    """

    name: str
    dtype: str
    rows: int
    kernel: object
    signature: dict[str, str]
    constants: dict[str, object]
    config: triton.Config
    bytes_moved: int

    @property
    def settings(self) -> str:
        """The configuration in a word."""
        constants = {**self.constants, **self.config.kwargs}
        tiles = sorted(n.removeprefix("BLOCK_") + str(v) for n, v in constants.items() if n.startswith("BLOCK_"))
        return f"{' '.join(tiles)}, {self.config.num_warps} warps, {self.config.num_stages} stages"


@dataclass(frozen=True, slots=True)
class Built:
    """What the compiler made of a launch: bytes of machine code, registers per thread, bytes of shared memory per
    program, bytes of spilled registers (stores and loads) per thread."""

    cubin: int
    registers: int
    shared: int
    spilled: int
    ptx: str = field(repr=False)


def launches(sizes: Sizes, dtype: str, rows: int, every: bool = False) -> Iterator[Launch]:
    """Every kernel for one dtype and number of rows, in the configuration that is used without tuning, or in
    ``every`` one that tuning tries."""
    h, d, r = sizes.hidden, sizes.bottleneck, sizes.rank
    size = DTYPES[dtype].itemsize

    def cases(name: str, kernel: object, types: dict[str, str], constants: dict, moved: int) -> Iterator[Launch]:
        tunable = isinstance(kernel, triton.runtime.Autotuner)
        configs = fitting(kernel.configs, constants, kernel.fits) if tunable else [triton.Config({})]
        for config in configs if every else configs[:1]:
            yield Launch(name, dtype, rows, getattr(kernel, "fn", kernel) if tunable else kernel, types, constants,
                         config, moved)  # fmt: skip

    t, f, b, i = f"*{dtype}", "*fp32", "*i1", "i32"
    block_t, block_d = route.blocks_of(rows, d)
    splits = triton.cdiv(d, block_d)
    decision = dict(active=b, threshold=f, score=f, leave=b, offset=f)
    moved = rows * h * size + 4 * h * (d + 2) + 4 * d + 10 * rows
    for norm, layer_norm in (("RMSNorm", False), ("LayerNorm", True)):
        types = dict(h=t, active=b, norm_weight=f, norm_bias=f, down=f, up=f, threshold=f, score=f, leave=b, parts=f,
                     offset=f, rows=i, row_stride=i, eps="fp32")  # fmt: skip
        constants = dict(H=h, D=d, LAYER_NORM=layer_norm, HAS_BIAS=layer_norm, SPLIT=splits > 1, HAS_OFFSET=True,
                         BLOCK_T=block_t, BLOCK_D=block_d)  # fmt: skip
        yield from cases(f"route {norm}", route._route_kernel, types, constants, moved)
    if splits > 1:
        constants = dict(SPLITS=splits, HAS_OFFSET=True, BLOCK_T=route.DECIDE_ROWS)
        moved = 4 * splits * rows + 10 * rows
        yield from cases("route decide", route._decide_kernel, dict(parts=f, **decision, rows=i), constants, moved)
    types = dict(active=b, chosen="*i64", length=i, count=i)
    yield from cases("compact", compact._compact_kernel, types, dict(BLOCK_L=compact.BLOCK), rows + 8 * rows)
    types = dict(h=t, leave=b, out=t, result=t, rows=i, h_stride=i, out_stride=i)
    yield from cases("scatter", scatter._scatter_kernel, types, dict(H=h), 2 * rows * h * size + rows)
    types = dict(x=t, leave=b, weight=t, bias=t, residual=t, out=t, result=t, rows=i, x_stride=i, residual_stride=i,
                 out_stride=i)  # fmt: skip
    for name, n, k, bias, residual, out in (
        ("project affine", h, h, True, False, True),
        ("project low rank, down", r, h, False, False, False),
        ("project low rank, up", h, r, True, True, True),
    ):
        constants = dict(N=n, K=k, HAS_BIAS=bias, HAS_RESIDUAL=residual, HAS_OUT=out, WIDEN=False,
                         BLOCK_T=project.block_of(rows))  # fmt: skip
        moved = size * (n * k + n * bias + rows * (k + n * (1 + residual))) + rows
        yield from cases(name, project._project_kernel, types, constants, moved)


def build(launch: Launch, capability: int) -> Built:
    """Compile for ``capability`` (times ten). No GPU and no driver are needed.

    Raises:
        CardError: the dtype is not for this capability.
        RuntimeError: ``TRITON_INTERPRET=1``: then there is nothing to compile.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 is set: Triton interprets kernels and compiles none. Unset it.")
    card = card_of(capability)
    check_dtype(DTYPES[launch.dtype], capability, card.name if card else f"a card of {capability / 10}")
    constants = {**launch.constants, **launch.config.kwargs}
    names = launch.kernel.arg_names
    signature = {n: "constexpr" if n in constants else launch.signature[n] for n in names}
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n.endswith("stride")]
    source = ASTSource(
        launch.kernel, signature, constants, {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    )
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spilled = _resources(ptx, capability)
    return Built(len(compiled.asm["cubin"]), registers, compiled.metadata.shared, spilled, ptx)


def _resources(ptx: str, capability: int) -> tuple[int, int]:
    """Registers and bytes of spills, from what ``ptxas -v`` says (the driver, which also knows, needs a GPU)."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        done = subprocess.run(
            [get_ptxas(capability).path, "-v", "--regAllocOptLevel=2",
             f"--gpu-name={sm_arch_from_capability(capability)}", source, "-o", source.with_suffix(".cubin")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    log = done.stdout + done.stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    return int(re.search(r"Used (\d+) registers", log).group(1)), spilled
