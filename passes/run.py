"""run: the one loop that carries a graph through all passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch.fx import GraphModule

from tide_compile.passes.plan import Plan, Settings
from tide_compile.passes.program import Program
from tide_compile.passes.verify import verify


@dataclass(frozen=True, slots=True)
class PassEvent:
    """What an observer is told after each pass; ``seconds`` is wall time."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    plan: Plan
    program: GraphModule | Program

    def __str__(self) -> str:
        return f"{self.name}: nodes {self.nodes_before} -> {self.nodes_after} in {self.seconds * 1e3:.0f} ms"


def run(
    gm: GraphModule, settings: Callable[[], Settings], observer: Callable[[PassEvent], None] | None = None
) -> tuple[Program, Plan]:
    """Analyse and rewrite a Dynamo graph.

    Args:
        gm: the graph of one forward pass of a decoder, as Dynamo hands it to a backend.
        settings: says what to build; asked when the graph is known to be a whole decoder, because only then can
            its parameters tell which routers are its own.
        observer: called after every pass.

    Returns:
        The pieces to compile, and the plan that they follow.

    Raises:
        TideError: one of the named errors of ``passes.errors``.
    """
    from tide_compile.passes import ANALYSES, PLACEMENT, REWRITES

    plan, program = Plan(), gm
    for step in (*ANALYSES, *PLACEMENT, *REWRITES):
        started, before = time.perf_counter(), _count(program)
        if step in REWRITES:
            program = step(program, plan)
        else:
            if step in PLACEMENT:
                plan = replace(plan, settings=settings())
            plan = replace(plan, **step(gm, plan))
        verify(program, after=step.__name__)
        if observer is not None:
            seconds = time.perf_counter() - started
            observer(PassEvent(step.__name__, seconds, before, _count(program), plan, program))
    return program, plan


def _count(program: GraphModule | Program) -> int:
    return len(program.graph.nodes) if isinstance(program, GraphModule) else program.node_count()
