"""forecast: what exits would bring on a device, from the graph of a model without weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.fx import GraphModule
from transformers import PreTrainedConfig

from tide_compile.config import TIDEConfig
from tide_compile.errors import ConfigError
from tide_compile.generation.static_cache import new_static_cache
from tide_compile.kernels.gpu.cards import CARDS
from tide_compile.lowering.machine import measure_decoding
from tide_compile.passes.graph.cost import Device, PieceCost, cost_of, router_cost_of
from tide_compile.passes.plan import Plan
from tide_compile.passes.program import Piece, Program
from tide_compile.passes.run import run
from tide_compile.planning.token_costs import TokenCosts
from tide_compile.routers.bank import RouterBank
from tide_compile.routers.settings import settings_of_bank
from tide_compile.torch_internals.dynamo import forgetting_sizes

_CONTEXT = 64  # tokens of the cache in the traced graph; costs grow in proportion
_KERNEL = 4e-6  # seconds that a kernel of a CUDA GPU costs in a stream, whatever its size


def find_device(name: str, dtype: torch.dtype, config: PreTrainedConfig | None = None) -> Device:
    """A GPU of the table by name, at an eighth of its operations for fp32, or ``"cpu"``: this machine's, measured for
    attention as in a model of this ``config``.

    Raises:
        ConfigError: lists the known names.
    """
    if name.lower() == "cpu":
        text = config and config.get_text_config(decoder=True)
        heads = getattr(text, "num_attention_heads", None) or 1
        return measure_decoding(dtype, heads // (getattr(text, "num_key_value_heads", None) or heads))
    for card in CARDS:
        if card.name.lower() == name.lower():
            flops = card.flops / (1 if dtype.itemsize == 2 else 8)
            return Device(flops, card.bandwidth, _KERNEL)
    raise ConfigError(f"device {name!r} is not known: give cpu or one of {', '.join(c.name for c in CARDS)}.")


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of decoding one token for each of ``batch`` sequences behind ``context`` tokens, when ``share`` of the tokens
    leave after ``depth`` layers. Milliseconds; ``break_even`` is the share of tokens that has to leave there for the
    router to pay, None if it never does."""

    batch: int
    context: int
    depth: int
    share: float
    off: float
    on: float
    break_even: float | None

    @property
    def speedup(self) -> float:
        return self.off / self.on


class CostModel:
    """Predicts the time of a decoding step.

    Args:
        model: a transformers causal language model; one on the ``meta`` device will do.
        depths: of the checkpoints, in layers. bottleneck: width of the routers.
    """

    def __init__(self, model: nn.Module, depths: Sequence[int], bottleneck: int = 128) -> None:
        text = model.config.get_text_config(decoder=True)
        self.num_layers, self.depths = text.num_hidden_layers, tuple(depths)
        wrong = [d for d in depths if not 0 < d < self.num_layers]
        if wrong:
            raise ConfigError(f"exits after {wrong} layers are not possible: the model has {self.num_layers}.")
        self.costs = {}
        for depth in self.depths:
            bank = RouterBank.untrained(text.hidden_size, self.num_layers, bottleneck_dim=bottleneck)
            self.costs[depth] = _costs(*_trace(model, bank.keep([depth - 1]), TIDEConfig()), depth)

    def forecast(self, device: Device, batch: int, context: int, depth: int, share: float) -> Forecast:
        """See ``Forecast``. Tokens leave independently of each other. A step in which all of them leave runs no more
        layers; any other reads all weights, and tokens that have left save operations, keys and values of the rest."""
        off = self._seconds(device, batch, context, depth, 0.0, routed=False)
        on = self._seconds(device, batch, context, depth, share, routed=True)
        break_even = self._break_even(device, batch, context, depth)
        return Forecast(batch, context, depth, share, off * 1e3, on * 1e3, break_even)

    def _seconds(self, device: Device, batch: int, context: int, depth: int, share: float, routed: bool) -> float:
        device = device.for_rows(batch)
        first, router, rest, fill, ends = self.costs[depth]
        keys = batch * context / _CONTEXT
        all_leave = share**batch
        kept = (1 - share) / (1 - all_leave) if all_leave < 1 else 0.0  # of the tokens of a step that goes on
        always = first.scaled(batch, keys) + ends.scaled(batch, keys)
        if routed:
            always += router.scaled(batch, keys)
        going_on = rest.scaled(batch * kept, keys * kept) + PieceCost(fill.operations * batch * (1 - kept))
        leaving = fill.scaled(batch, keys)
        return always.seconds(device) + (1 - all_leave) * going_on.seconds(device) + all_leave * leaving.seconds(device)

    def _break_even(self, device: Device, batch: int, context: int, depth: int) -> float | None:
        off = self._seconds(device, batch, context, depth, 0.0, routed=False)
        if self._seconds(device, batch, context, depth, 1.0, routed=True) >= off:
            return None
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            pays = self._seconds(device, batch, context, depth, middle, routed=True) < off
            low, high = (low, middle) if pays else (middle, high)
        return high


def predict_costs(model: nn.Module, bank: RouterBank, config: TIDEConfig, device: Device, context: int) -> TokenCosts:
    """What ``measure_costs`` measures, from the graph of the model with all checkpoints of a bank: for a device that
    need not be there, behind ``context`` tokens."""
    program, _ = _trace(model, bank, config)
    device, keys = device.for_rows(1), context / _CONTEXT

    def seconds(piece: Piece | None, cost: Callable[[GraphModule], PieceCost] = cost_of) -> float:
        return 0.0 if piece is None else cost(piece.graph).scaled(1, keys).seconds(device)

    spent, asked, leaving = seconds(program.prologue) + seconds(program.epilogue), 0.0, {}
    for segment in program.segments:
        spent += seconds(segment.plain)
        asked += seconds(segment.plain, router_cost_of)
        if segment.checkpoint is not None:
            leaving[segment.checkpoint] = spent + seconds(segment.project, router_cost_of) + seconds(segment.fill)
    return TokenCosts(spent, asked / len(leaving), leaving)


def _costs(program: Program, plan: Plan, depth: int) -> tuple[PieceCost, ...]:
    """First layers, router, remaining layers, fill, and what comes before and after the layers."""
    first = rest = fill = PieceCost()
    for index, segment in enumerate(program.segments):
        if plan.segment_layers(index)[0] < depth:
            first += cost_of(segment.plain.graph)
        else:
            rest += cost_of(segment.plain.graph)
        if segment.checkpoint == depth - 1 and segment.fill is not None:
            fill = cost_of(segment.fill.graph)
    router = sum((router_cost_of(piece.graph) for piece in program.pieces()), PieceCost())
    return first, router, rest, fill, cost_of(program.prologue.graph) + cost_of(program.epilogue.graph)


@torch.no_grad()
def _trace(model: nn.Module, bank: RouterBank, config: TIDEConfig) -> tuple[Program, Plan]:
    """The pieces of a decoding step of one sequence behind ``_CONTEXT`` tokens, with all checkpoints of a bank."""
    bank = replace(bank, thresholds=dict.fromkeys(bank.layers, 0.5))
    config = replace(config, exit_threshold=None, compaction="never")
    first = next(p for p in model.parameters() if p.is_floating_point())
    found = []

    def backend(gm: GraphModule, example_inputs: Sequence[object]) -> Callable[..., object]:
        found.append(run(gm, lambda: settings_of_bank(bank, config, first.device, first.dtype)))
        return gm

    cache = new_static_cache(model, 1, _CONTEXT)
    ids = torch.zeros(1, 1, dtype=torch.long, device=first.device)
    # what torch.compile has made of the model before stays
    with forgetting_sizes():
        compiled = torch.compile(model, backend=backend, fullgraph=True, isolate_recompiles=True)
        compiled(input_ids=ids, past_key_values=cache)
    return found[0]
