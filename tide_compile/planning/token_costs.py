"""TokenCosts: what a decoded token takes, by the layer that it leaves after; measured on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from tide_compile.config import TIDEConfig
from tide_compile.generation.engine import TIDE
from tide_compile.generation.token_clock import TokenClock
from tide_compile.routers.bank import RouterBank
from tide_compile.runtime.overrides import exit_threshold

_TOKENS = 12  # timed in a row, unless asked for otherwise
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class TokenCosts:
    """Seconds of decoding a token of one sequence, measured (``measure_costs``) or predicted (``predict_costs``).

    Attributes:
        off: without checkpoints. checkpoint: what each checkpoint adds that a token passes.
        leaving: layer -> of a token that leaves there, without the cost of checkpoints.
    """

    off: float
    checkpoint: float
    leaving: Mapping[int, float]

    def seconds(self, exits: Mapping[int, float]) -> float:
        """Mean of a token where these shares of tokens leave at the checkpoints, which are all that there are."""
        total, staying = 0.0, 1.0
        for passed, (layer, share) in enumerate(sorted(exits.items()), 1):
            total += share * (self.leaving[layer] + passed * self.checkpoint)
            staying -= share
        return total + staying * (self.off + len(exits) * self.checkpoint)

    def speedup(self, exits: Mapping[int, float]) -> float:
        """Time without checkpoints over time with them."""
        return self.off / self.seconds(exits)


def measure_costs(model: nn.Module, bank: RouterBank, config: TIDEConfig, prompt: Sequence[int]) -> TokenCosts:
    """Compile a model with all checkpoints of a bank, and without any, and time decoding after ``prompt`` in turns:
    no checkpoints, nobody leaves, everybody leaves at each of them."""
    watched = TIDE(model, replace(bank, thresholds=dict.fromkeys(bank.layers, 0.5)), config)
    plain = TIDE(model, None, replace(config, exit_threshold=1.0))
    passed = {layer: number for number, layer in enumerate(bank.layers, 1)}
    found = time_decoding(
        {"off": (plain, None), "all": (watched, 1.0), **{layer: (watched, {layer: 0.0}) for layer in passed}}, prompt
    )
    off, everything = (statistics.median(found[name]) for name in ("off", "all"))
    each = max(0.0, (everything - off) / len(passed))
    return TokenCosts(
        off, each, {layer: statistics.median(found[layer]) - number * each for layer, number in passed.items()}
    )


def time_decoding(
    contenders: Mapping[object, tuple[TIDE, float | dict[int, float] | None]],
    prompt: Sequence[int],
    rounds: int = _ROUNDS,
    tokens: int = _TOKENS,
) -> dict[object, list[float]]:
    """Seconds of each decoded token after the first, of engines with thresholds (None: their own), taken in turns."""
    seconds: dict[object, list[float]] = {name: [] for name in contenders}
    for number in range(-1, rounds):
        for name, (engine, threshold) in contenders.items():
            clock, ids = TokenClock(), torch.tensor([list(prompt)], device=engine.model.device)
            with nullcontext() if threshold is None else exit_threshold(threshold):
                engine.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, min_new_tokens=tokens + 1,
                    max_new_tokens=tokens + 1, pad_token_id=0, streamer=clock,
                )  # fmt: skip
            if number >= 0:  # the first round compiles
                seconds[name] += clock.seconds()
    return seconds
