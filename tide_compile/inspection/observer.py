"""observer: who is told what happens to a graph: the log, torch's structured trace, and the dumps that are open."""

from __future__ import annotations

import logging
from collections.abc import Callable

from tide_compile.inspection.graph_dump import new_dumps
from tide_compile.inspection.graph_source import source_of
from tide_compile.passes.plan import Plan
from tide_compile.passes.program import Program
from tide_compile.passes.run import PassEvent
from tide_compile.torch_internals.fx import trace_structured

log = logging.getLogger("tide_compile")


class CompileObserver:
    """An observer of the passes and of what follows them. ``dump``: the backend's option of that name."""

    def __init__(self, dump: object = None) -> None:
        self.dumps = new_dumps(dump)
        self._passes = 0

    def __call__(self, event: PassEvent) -> None:
        self._passes += 1
        log.debug("%s", event)
        trace_artifact(f"tide_{self._passes:02d}_{event.name}", lambda: source_of(event.program, str(event)))
        for dump in self.dumps:
            dump(event)

    def planned(self, program: Program, plan: Plan) -> None:
        """The passes are done."""
        shape = ", ".join(map(str, plan.boundaries.entering_value.shape))
        exits = list(plan.checkpoints) or "none"
        log.info("compiling [%s]: %d layers, exits after layers %s", shape, len(plan.layers), exits)
        for dump in self.dumps:
            dump.planned(program, plan)

    def compiled(self, piece: str, files: list[str]) -> None:
        """A piece is compiled into ``files``."""
        for dump in self.dumps:
            dump.compiled(piece, files)

    def failed(self, error: Exception) -> None:
        """The passes gave up."""
        for dump in self.dumps:
            dump.failed(error)


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add an artifact to the compilation that is going on. ``text`` is called only where a trace is wanted."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)
