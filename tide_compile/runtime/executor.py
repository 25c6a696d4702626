"""The executor: the only control flow at run time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from operator import itemgetter

import torch

from tide_compile.kernels.scatter import scatter
from tide_compile.passes.plan import PADDING, Plan
from tide_compile.passes.program import ACTIVE, COUNTS, HIDDEN, KEPT, LEAVE, OUT, ROWS, SCORE, VALID, Piece, Program
from tide_compile.runtime.bindings import RouterBindings
from tide_compile.runtime.compaction_policy import CompactionPolicy
from tide_compile.runtime.exit_stats import ExitStats, active_recorders
from tide_compile.runtime.host_read import CountsReader
from tide_compile.runtime.overrides import is_rehearsal, overridden_threshold
from tide_compile.runtime.piece_times import EXECUTOR, active_times

log = logging.getLogger("tide_compile")

Environment = list[object]  # values by slot; None where there is none yet


class Executor:
    """Runs the pieces of a program in order and skips what nobody needs.

    After each checkpoint one host read says how many rows leave and how many go on:

    * nobody has left yet: the next segment as it is;
    * some have: the masked segment, in which exited rows keep their frozen state, or the compact one, which leaves them
      out, once enough have left and where that pays (``CompactionPolicy``);
    * nobody is left: the keys and values of the remaining segments in one call, then the epilogue.

    Args:
        program: the pieces' inputs and outputs by name.
        plan: the plan they were built from.
        runnables: the compiled pieces (``lowering.lower``).
        policy: of compaction.
        bindings: the tensors of the routers for each call.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        runnables: Mapping[Piece, Callable[..., tuple]],
        policy: CompactionPolicy,
        bindings: RouterBindings,
    ) -> None:
        self.plan = plan
        slots = _slots_of(program)

        def step(part: str, piece: Piece | None) -> _Step | None:
            if piece is None:
                return None
            read = _reader([slots[name] for name in piece.inputs])
            return _Step(piece.name, part, runnables[piece], read, tuple(slots[name] for name in piece.outputs))

        self._prologue, self._epilogue = step("prologue", program.prologue), step("epilogue", program.epilogue)
        self._segments = tuple(
            _SegmentSteps(
                index,
                *(step("segments", piece) for piece in (segment.plain, segment.masked, segment.compact)),
                step("projections", segment.project),
                step("fill", segment.fill),
                segment.checkpoint,
            )
            for index, segment in enumerate(program.segments)
        )
        self._hidden, self._active, self._valid, self._out = (slots[n] for n in (HIDDEN, ACTIVE, VALID, OUT))
        self._score, self._leave, self._counts, self._rows = (slots[n] for n in (SCORE, LEAVE, COUNTS, ROWS))
        self._policy, self._bindings, self._read = policy, bindings, CountsReader(size=3)
        self._thresholds = {layer: slots[plan.settings.threshold_name(layer)] for layer in plan.checkpoints}
        self._empty = [None] * (len(slots) - len(program.arguments) - len(program.constants))
        self._results = tuple((slots[r], None) if isinstance(r, str) else (None, r) for r in program.results)

    def __call__(self, *arguments: object) -> tuple:
        times = active_times()
        with nullcontext() if times is None else times.timed(EXECUTOR):
            return self._forward(arguments)

    def _forward(self, arguments: tuple[object, ...]) -> tuple:
        env = [*arguments, *self._bindings(arguments), *self._empty]
        self._override_thresholds(env)
        self._prologue(env)
        env[self._valid] = env[self._active]
        passed = _Pass(active_recorders(), ExitRecorder.maybe(env[self._valid], self.plan))
        for segment in self._segments:
            self._form_of(segment, env, passed)(env)
            if segment.checkpoint is not None:
                self._decide(segment, env, passed)
                if passed.exits and passed.remaining == 0:  # in a call of padding alone nobody leaves
                    break
        self._merge(env, passed)
        self._epilogue(env)
        if is_rehearsal():
            self._rehearse(env)
        else:
            passed.record(self.plan, env[self._valid])
        return tuple(value if slot is None else env[slot] for slot, value in self._results)

    def _override_thresholds(self, env: Environment) -> None:
        override = overridden_threshold()
        if override is not None:
            by_layer = override if isinstance(override, Mapping) else dict.fromkeys(self._thresholds, override)
            for layer, slot in self._thresholds.items():
                env[slot] = env[slot].new_full((), by_layer.get(layer, 1.0))

    def _form_of(self, segment: _SegmentSteps, env: Environment, passed: _Pass) -> _Step:
        """The segment as those need it who have not left."""
        if not passed.exits:
            return segment.plain
        if env[self._rows] is None:
            return segment.masked
        decision = self._policy.decide(segment.index, env[self._rows], env[self._active])
        if decision is None:
            return segment.masked
        for recorder in passed.recorders:
            recorder.decisions[decision.segment] = decision
        log.debug("%s", decision)
        return segment.compact if decision.compact else segment.masked

    def _decide(self, segment: _SegmentSteps, env: Environment, passed: _Pass) -> None:
        """Behind a checkpoint: who leaves, what they leave with, and what that means for the next segments."""
        leaving, passed.remaining, most = self._read(env[self._counts])
        if passed.before is None:
            passed.before = leaving + passed.remaining
        if passed.recorder is not None:
            passed.recorder.decided(segment.checkpoint, env[self._score], env[self._leave], env[self._active])
        if not leaving:
            return
        if not passed.exits:
            env[self._out] = env[self._hidden].detach()  # a tensor of its own: guards tell one that is given twice
        segment.project(env)
        passed.exits[segment.checkpoint] = leaving
        if passed.remaining == 0:
            if segment.fill is not None:
                segment.fill(env)
        elif self._policy.possible and self._policy.due(passed.before, passed.remaining):
            env[self._rows] = self._policy.rows(env[self._active], passed.remaining, most)
            passed.before = passed.remaining

    def _merge(self, env: Environment, passed: _Pass) -> None:
        """Rows that have left get what they left with, and padding keeps its state, which is in both if all left at one
        checkpoint."""
        if passed.remaining == 0 and len(passed.exits) == 1:
            env[self._hidden] = env[self._out]
        elif passed.exits:
            left = env[self._valid] & ~env[self._active]
            env[self._hidden] = scatter(env[self._out], left, env[self._hidden])

    def _rehearse(self, env: Environment) -> None:
        """Run what this pass did not need on what it has left behind, so that it is compiled."""
        results = list(env)
        if self._policy.possible:
            results[self._rows] = self._policy.some_rows(results[self._valid])
        if results[self._out] is None:
            results[self._out] = results[self._hidden].detach()
        for step in (step for segment in self._segments for step in segment.after_exits()):
            # numbers are copied: a cache that counts its tokens would overflow
            step([x.clone() if isinstance(x, torch.Tensor) and x.numel() == 1 else x for x in results])


@dataclass(frozen=True, slots=True)
class _Step:
    """A compiled piece, what part of a pass it is, and the slots of the environment that it reads and writes."""

    name: str
    part: str
    run: Callable[..., tuple]
    read: Callable[[Environment], tuple]
    write: tuple[int, ...]

    def __call__(self, env: Environment) -> None:
        times = active_times()
        with nullcontext() if times is None else times.timed(self.name, self.part):
            for slot, value in zip(self.write, self.run(*self.read(env)), strict=True):
                env[slot] = value


@dataclass(frozen=True, slots=True)
class _SegmentSteps:
    """As ``Segment``, ready to run."""

    index: int
    plain: _Step
    masked: _Step | None
    compact: _Step | None
    project: _Step | None
    fill: _Step | None
    checkpoint: int | None

    def after_exits(self) -> Iterator[_Step]:
        """What is needed only once somebody has left."""
        found = (self.masked, self.compact, self.project, self.fill)
        return (step for step in found if step is not None)


@dataclass(slots=True)
class _Pass:
    """What a forward pass has come to: tokens that left by layer, those that go on (None: nobody was asked), and how
    many there were when rows were last left out."""

    recorders: tuple[ExitStats, ...]
    recorder: ExitRecorder | None
    exits: dict[int, int] = field(default_factory=dict)
    remaining: int | None = None
    before: int | None = None

    def record(self, plan: Plan, valid: torch.Tensor) -> None:
        for stats in self.recorders:
            stats.add(len(plan.layers), self.exits, valid if self.remaining is None else self.remaining)
            if stats.per_token:
                stats.exit_layers.append(self.recorder.layers)
                stats.scores.append(self.recorder.scores)


class ExitRecorder:
    """The exit layer of every token, [B, S] int64, and the latest score that it got, [B, S] fp32 (NaN: none)."""

    def __init__(self, valid: torch.Tensor, plan: Plan) -> None:
        self.layers = torch.where(valid, len(plan.layers) - 1, PADDING)
        self.scores = torch.full_like(self.layers, torch.nan, dtype=torch.float32)

    @classmethod
    def maybe(cls, valid: torch.Tensor, plan: Plan) -> ExitRecorder | None:
        """None where nobody wants to know of every token."""
        return cls(valid, plan) if any(stats.per_token for stats in active_recorders()) else None

    def decided(self, layer: int, scores: torch.Tensor, leave: torch.Tensor, active: torch.Tensor) -> None:
        """Behind the checkpoint after ``layer``; ``active``: who goes on."""
        self.layers = torch.where(leave, layer, self.layers)
        self.scores = torch.where(leave | active, scores, self.scores)


def _slots_of(program: Program) -> dict[str, int]:
    """A place in the environment for every name: arguments first, then constants."""
    named = (name for piece in program.pieces() for name in (*piece.inputs, *piece.outputs))
    names = dict.fromkeys([*program.arguments, *program.constants, *named, *KEPT])
    return {name: slot for slot, name in enumerate(names)}


def _reader(slots: list[int]) -> Callable[[Environment], tuple]:
    if len(slots) == 1:
        (slot,) = slots
        return lambda env: (env[slot],)
    return itemgetter(*slots)
