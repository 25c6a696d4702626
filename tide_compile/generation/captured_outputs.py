"""captured_outputs: models may be asked for hidden states and attentions the first time while they are traced.

transformers hangs the hooks that collect them into a model in the first call that asks, under a lock: a graph cannot
hold that, and Dynamo would cut the model apart. Here Dynamo itself calls what hangs them, and goes on tracing.
"""

from __future__ import annotations

from transformers.utils import output_capturing

from tide_compile.torch_internals.dynamo import call_while_tracing
from tide_compile.torch_internals.switches import enabled

_NAME = "maybe_install_capturing_hooks"
HOOKS_OF = output_capturing.__name__  # the module that they come from


def install() -> None:
    """Let ``transformers`` hang its hooks into models that are being traced; once per process."""
    before = getattr(output_capturing, _NAME, None)
    if before is not None and "captured_outputs" in enabled():
        setattr(output_capturing, _NAME, call_while_tracing(before))
