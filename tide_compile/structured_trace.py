"""structured_trace: what torch's structured trace (``TORCH_TRACE=DIR``, shown by tlparse) is told."""

from __future__ import annotations

from collections.abc import Callable

from torch._logging import trace_structured


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add an artifact to the compilation that is going on. ``text`` is called only where a trace is wanted."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)
