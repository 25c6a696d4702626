"""The executor: the only control flow at run time."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import nn

from tide_compile.errors import RouterMismatchError
from tide_compile.kernels.scatter import scatter
from tide_compile.passes.plan import ACTIVE, COUNTS, HIDDEN, LEAVE, OUT, ROWS, SCORE, VALID, Plan, Program, Settings
from tide_compile.runtime.compaction_policy import CompactionPolicy
from tide_compile.runtime.exit_stats import PADDING, ExitStats, active_recorders
from tide_compile.runtime.host_read import CountsReader
from tide_compile.runtime.overrides import rehearsing, threshold_override
from tide_compile.runtime.piece_times import EXECUTOR, active_times

log = logging.getLogger("tide_compile")


@dataclass(frozen=True, slots=True)
class _Call:
    """A compiled piece and the slots of the environment that it reads and writes."""

    name: str
    run: Callable[..., tuple]
    read: Callable[[list], tuple]
    write: tuple[int, ...]

    def __call__(self, env: list) -> None:
        times = active_times()
        with nullcontext() if times is None else times.timed(self.name):
            self._run(env)

    def _run(self, env: list) -> None:
        for slot, value in zip(self.write, self.run(*self.read(env)), strict=True):
            env[slot] = value


@dataclass(frozen=True, slots=True)
class _Segment:
    """The variants of one segment; ``checkpoint`` is the layer of the router that closes it, or None; ``project`` and
    ``fill`` follow it."""

    name: str
    plain: _Call
    masked: _Call | None
    compact: _Call | None
    project: _Call | None
    fill: _Call | None
    checkpoint: int | None


class Executor:
    """Runs the pieces of a program in order and skips what nobody needs.

    After each checkpoint one host read says how many rows leave and how many go on:

    * nobody has left yet: the next segment as it is;
    * some have: the masked segment, in which exited rows keep their frozen state, or the compact one, which leaves them
      out, once enough have left and where that pays (``CompactionPolicy``);
    * nobody is left: the keys and values of the remaining segments in one call, then the epilogue.

    Dynamo runs the code of one model for any other of the same shape, and for the same model when it has got new
    routers. So routers are looked up again for a model that was not seen before (by the identity of three of its
    parameters), and when their version changes.

    Args:
        program: the pieces' inputs and outputs by name.
        plan: the plan they were built from.
        runnables: the compiled pieces by name (``lowering.lower``).
        compaction: the policy.
        example_inputs: of the graph; the routers in ``program`` belong to the model they come from.
        settings_for: finds the settings for the inputs of another model.
        version: of the routers; looked at on every call.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        runnables: dict[str, Callable[..., tuple]],
        compaction: CompactionPolicy,
        example_inputs: Sequence[object],
        settings_for: Callable[[Sequence[object]], Settings],
        version: Callable[[], object],
    ) -> None:
        self.plan = plan
        names = [*program.arguments, *program.constants]
        names += [n for piece in program.pieces.values() for n in (*piece.inputs, *piece.outputs)]
        kept = (HIDDEN, ACTIVE, VALID, ROWS, OUT, SCORE, LEAVE, COUNTS)
        slots = {name: i for i, name in enumerate(dict.fromkeys([*names, *kept]))}

        def call(name: str) -> _Call | None:
            piece = program.pieces.get(name)
            if piece is None:
                return None
            write = tuple(slots[n] for n in piece.outputs)
            return _Call(name, runnables[name], _reader([slots[n] for n in piece.inputs]), write)

        self._prologue, self._epilogue = call("prologue"), call("epilogue")
        self._segments = tuple(
            _Segment(
                f"segment_{i}",
                call(f"segment_{i}"),
                call(f"segment_{i}.masked"),
                call(f"segment_{i}.compact"),
                call(f"project_{plan.checkpoint_of(i)}"),
                call(f"fill_{plan.checkpoint_of(i)}"),
                plan.checkpoint_of(i),
            )
            for i in range(plan.num_segments)
        )
        self._hidden, self._active, self._valid, self._out = (slots[n] for n in (HIDDEN, ACTIVE, VALID, OUT))
        self._score, self._leave, self._counts, self._rows = (slots[n] for n in (SCORE, LEAVE, COUNTS, ROWS))
        self._keeps_out = plan.settings.projections is not None or bool(plan.settings.shortcuts)  # else the state is it
        self._compaction, self._read = compaction, CountsReader(size=3)
        self._constants = {n: (t.shape, t.dtype) for n, t in program.constants.items()}
        self._settings_for = settings_for
        names = {layer: f"router.{layer}.threshold" for layer in plan.checkpoints}
        self._thresholds = {layer: slots[n] for layer, n in names.items() if n in program.constants}
        self._empty = len(slots) - len(program.arguments) - len(program.constants)
        parameters = [i for i, x in enumerate(example_inputs) if isinstance(x, nn.Parameter)]
        self._anchors = [parameters[i] for i in {0, len(parameters) // 2, len(parameters) - 1}] if parameters else []
        self._version_of, self._version = version, version()
        self._bound: list[tuple[list[weakref.ref], list]] = []
        self._bind(example_inputs, program.constants)
        self._results = tuple((slots[r], None) if isinstance(r, str) else (None, r) for r in program.results)

    def __call__(self, *arguments: object) -> tuple:
        times = active_times()
        with nullcontext() if times is None else times.timed(EXECUTOR):
            return self._forward(arguments)

    def _forward(self, arguments: tuple[object, ...]) -> tuple:
        env = [*arguments, *self._constants_of(arguments)]
        override = threshold_override.get()
        if override is not None:
            by_layer = override if isinstance(override, Mapping) else dict.fromkeys(self._thresholds, override)
            for layer, slot in self._thresholds.items():
                env[slot] = env[slot].new_full((), by_layer.get(layer, 1.0))
        self._prologue(env)
        valid = env[self._valid] = env[self._active]
        recorders = active_recorders()
        trace = _Trace(valid, self.plan) if any(r.per_token for r in recorders) else None
        exits, remaining, before = {}, None, None
        for segment in self._segments:
            self._variant(segment, env, bool(exits), recorders)(env)
            if segment.checkpoint is None:
                continue
            leaving, remaining, most = self._read(env[self._counts])
            before = leaving + remaining if before is None else before
            if trace is not None:
                trace.decided(segment.checkpoint, env[self._score], env[self._leave], env[self._active])
            if leaving:
                if not exits and self._keeps_out:
                    env[self._out] = env[self._hidden]
                if segment.project is not None:
                    segment.project(env)
                elif exits and self._keeps_out:
                    env[self._out] = scatter(env[self._hidden], env[self._leave], env[self._out])
                exits[segment.checkpoint] = leaving
                if remaining and self._compaction.possible and self._compaction.due(before, remaining):
                    env[self._rows] = self._compaction.rows(env[self._active], remaining, most)
                    before = remaining
                if not remaining:
                    if segment.fill is not None:
                        segment.fill(env)
                    break
        if env[self._out] is not None:
            left = valid & ~env[self._active]
            env[self._hidden] = scatter(env[self._out], left, env[self._hidden])
        self._epilogue(env)
        if rehearsing.get():
            self._rehearse(env)
            recorders = ()
        for recorder in recorders:
            recorder.add(len(self.plan.layers), exits, valid if remaining is None else remaining)
            if recorder.per_token:
                recorder.exit_layers.append(trace.layers)
                recorder.scores.append(trace.scores)
        return tuple(value if slot is None else env[slot] for slot, value in self._results)

    def _rehearse(self, env: list) -> None:
        """Run what this pass did not need on what it has left behind, so that it is compiled."""
        results = list(env)
        valid = results[self._valid]
        if self._compaction.possible:
            results[self._rows] = self._compaction.some_rows(valid)
        results[self._out] = results[self._hidden] if results[self._out] is None else results[self._out]
        for segment in self._segments:
            for call in (segment.masked, segment.compact, segment.project, segment.fill):
                if call is not None:  # numbers are copied: a cache that counts its tokens would overflow
                    call([x.clone() if isinstance(x, torch.Tensor) and x.numel() == 1 else x for x in results])

    def _variant(self, segment: _Segment, env: list, mixed: bool, recorders: tuple[ExitStats, ...]) -> _Call:
        if not mixed:
            return segment.plain
        if env[self._rows] is None:
            return segment.masked
        decision = self._compaction.decide(segment.name, env[self._rows], env[self._active])
        if decision is None:
            return segment.masked
        for recorder in recorders:
            recorder.decisions[segment.name] = decision
        log.debug("%s", decision)
        return segment.compact if decision.compact else segment.masked

    def _bind(self, arguments: Sequence[object], constants: dict[str, torch.Tensor]) -> list:
        tail = [*constants.values(), *[None] * self._empty]
        self._bound.append(([weakref.ref(arguments[i]) for i in self._anchors], tail))
        return tail

    def _constants_of(self, arguments: Sequence[object]) -> list:
        if not self._constants:
            return self._bound[0][1]
        version = self._version_of()
        if version not in (None, self._version):
            self._bound, self._version = [], version
        for references, tail in self._bound:
            if all(ref() is arguments[i] for ref, i in zip(references, self._anchors, strict=True)):
                return tail
        settings, compiled = self._settings_for(arguments), self.plan.settings
        layers = [layer for layer in self.plan.checkpoints if layer in settings.routers]
        found = {name: tensor for layer in layers for name, tensor in settings.constants(layer).items()}
        found |= settings.shortcut_constants()
        alike = (settings.norm_eps, settings.layer_norm) == (compiled.norm_eps, compiled.layer_norm)
        if not alike or {n: (t.shape, t.dtype) for n, t in found.items()} != self._constants:
            raise RouterMismatchError(
                f"this code was compiled for routers after layers {list(self.plan.checkpoints)}, and now there are "
                f"others (after layers {sorted(settings.routers)}, or of another size or norm) for this model or "
                "another of the same shape. Compile each with its own options={'router': ...}, or call "
                "torch._dynamo.reset()."
            )
        return self._bind(arguments, {name: found[name] for name in self._constants})


class _Trace:
    """The exit layer of every token, [B, S] int64, and the latest score that it got, [B, S] fp32 (NaN: none)."""

    def __init__(self, valid: torch.Tensor, plan: Plan) -> None:
        last = len(plan.layers) - 1
        self.layers = torch.where(valid, last, PADDING)
        self.scores = torch.full_like(self.layers, torch.nan, dtype=torch.float32)

    def decided(self, layer: int, scores: torch.Tensor, leave: torch.Tensor, active: torch.Tensor) -> None:
        self.layers = torch.where(leave, layer, self.layers)
        self.scores = torch.where(leave | active, scores, self.scores)


def _reader(slots: list[int]) -> Callable[[list], tuple]:
    if len(slots) == 1:
        (slot,) = slots
        return lambda env: (env[slot],)
    return itemgetter(*slots)
