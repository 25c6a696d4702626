"""switches: the tricks that lean on torch's insides, by the names that switch them off, and the environment variables.

``TIDE_DISABLE=graph_replay,buffer_reuse`` (or ``all``) switches off for the process what ``TIDEConfig.disable`` does
for one compilation. ``TIDE_AUTOTUNE=0`` lets Triton's kernels take the first configuration that fits.
"""

from __future__ import annotations

import os
from collections.abc import Collection

TRICKS = {
    "guard_skipping": "tokens of a generate run without evaluating Dynamo's guards again",
    "graph_replay": "after two tokens of a kind, Dynamo's graph runs without the code around it",
    "compiled_generate": "torch.compile(model, backend='tide').generate runs the compiled model",
    "captured_outputs": "models may be asked for hidden states the first time while they are traced",
    "buffer_reuse": "Inductor's generated code is rewritten to keep its small temporaries",
    "prewarm": "Inductor's compiler and headers are made ready while Dynamo traces",
    "compile_together": "C++ compilers are waited for together",
    "lower_linears": "products in Inductor's ATen graph take the form that is the fastest here",
    "lower_attention": "attention in Inductor's ATen graph takes other forms",
    "gemm_template": "products with packed weights may take Inductor's C++ GEMM template",
    "static_addresses": "Inductor is told which inputs stay at their addresses (CUDA graphs)",
}
ALL = "all"


def disabled_by_environment() -> tuple[str, ...]:
    """The names in ``TIDE_DISABLE``, as they stand there."""
    return tuple(name for name in os.environ.get("TIDE_DISABLE", "").replace(" ", "").split(",") if name)


def unknown(names: Collection[str]) -> list[str]:
    """Those that name no trick."""
    return [name for name in names if name != ALL and name not in TRICKS]


def enabled(disabled: Collection[str] = ()) -> frozenset[str]:
    """The tricks that neither these names nor ``TIDE_DISABLE`` switch off."""
    off = {*disabled, *disabled_by_environment()}
    return frozenset() if ALL in off else frozenset(TRICKS) - off


def autotunes() -> bool:
    """Whether configurations of Triton's kernels are measured."""
    return os.environ.get("TIDE_AUTOTUNE") != "0"
