"""find_frontier: what can be had at which disagreement, and how fast, from measurements on a model's own text.

The checkpoints and thresholds that ``choose`` finds in the scores of some prompts are measured on generations of their
own, on other prompts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from tide_compile.config import TIDEConfig
from tide_compile.generation.engine import TIDE
from tide_compile.planning.choose_checkpoints import LEVELS, choose, read_scores
from tide_compile.planning.token_costs import TokenCosts, time_decoding
from tide_compile.reference import eager_reference
from tide_compile.routers.bank import RouterBank
from tide_compile.thresholds.agreement import measure_agreement
from tide_compile.thresholds.certify import CERTIFICATE


@dataclass(frozen=True, slots=True)
class Point:
    """Thresholds, and what came out on generations.

    Attributes:
        thresholds: by layer; checkpoints that are not named are not there.
        disagreement: share of tokens, 0..1. layers_saved: share of layer passes, 0..1.
        exits: share of tokens by the layer that they left after.
        speedup: time of a decoded token without checkpoints over its time here, from measured costs; None without.
        perplexity: of texts, over that of the full model; None where there were none.
    """

    thresholds: dict[int, float]
    disagreement: float
    layers_saved: float
    exits: dict[int, float]
    speedup: float | None = None
    perplexity: float | None = None


def measure_point(
    model: nn.Module,
    bank: RouterBank,
    thresholds: Mapping[int, float],
    config: TIDEConfig,
    prompts: Sequence[Sequence[int]],
    *,
    costs: TokenCosts | None = None,
    texts: Sequence[Sequence[int]] = (),
    full_perplexity: float = 1.0,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> Point:
    """Measure thresholds: exits and agreement on generations after ``prompts``, perplexity on ``texts`` (token ids).

    Args:
        thresholds: see ``RouterBank.thresholds``. config: its ``exit_threshold`` does not matter.
        full_perplexity: of the full model on ``texts``.
    """
    bank, config = replace(bank, thresholds=dict(thresholds)), replace(config, exit_threshold=None)
    outcome = measure_agreement(model, bank, config, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    stats = outcome.stats
    exits = {layer: stats.exits_per_layer.get(layer, 0) / stats.total_tokens for layer in sorted(thresholds)}
    return Point(
        dict(thresholds),
        outcome.disagreement,
        outcome.layers_saved,
        exits,
        None if costs is None else costs.speedup(exits),
        perplexity(model, texts, bank, config) / full_perplexity if texts else None,
    )


def find_frontier(
    model: nn.Module,
    bank: RouterBank,
    config: TIDEConfig,
    prompts: Sequence[Sequence[int]],
    costs: TokenCosts,
    *,
    texts: Sequence[Sequence[int]] = (),
    levels: Sequence[float] = LEVELS,
    max_new_tokens: int = 64,
    progress: bool = True,
) -> list[Point]:
    """The frontier: what can be had at each level of disagreement.

    Args:
        model: uncompiled. prompts: token ids; every second one is for ``choose``, the others measure.
        texts: token ids, for the perplexity. levels: see ``choose``.

    Returns:
        Points by disagreement; empty where no checkpoint pays.
    """
    scores, correct = read_scores(model, bank, config, prompts[::2], max_new_tokens=max_new_tokens)
    candidates = choose(scores, correct, bank.layers, bank.num_layers, costs, levels)
    full = perplexity(model, texts) if texts else 1.0
    points = [
        measure_point(
            model,
            bank,
            thresholds,
            config,
            prompts[1::2],
            costs=costs,
            texts=texts,
            full_perplexity=full,
            max_new_tokens=max_new_tokens,
        )
        for thresholds in tqdm(candidates, "measure", unit="point", disable=not progress)
    ]
    return sorted(points, key=lambda point: point.disagreement)


def recommend(
    points: Sequence[Point], max_disagreement: float | None = None, min_speedup: float | None = None
) -> Point | None:
    """The fastest point with at most this disagreement, or the most faithful with at least this speed-up; with both,
    the fastest that keeps both. None: there is none."""
    kept = [
        p
        for p in points
        if p.disagreement <= (1 if max_disagreement is None else max_disagreement)
        and (p.speedup or 0) >= (1 if min_speedup is None else min_speedup)
    ]
    if max_disagreement is None:
        return min(kept, key=lambda p: p.disagreement, default=None)
    return max(kept, key=lambda p: p.speedup, default=None)


@torch.no_grad()
def perplexity(
    model: nn.Module, texts: Sequence[Sequence[int]], bank: RouterBank | None = None, config: TIDEConfig | None = None
) -> float:
    """Of texts (token ids, at least two each), with the exits of ``bank`` or without any."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with nullcontext() if bank is None else eager_reference(model, bank, config):
        for text in texts:
            ids = torch.tensor([list(text)], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += len(text) - 1
    return math.exp(total / count)


def time_point(model: nn.Module, bank: RouterBank, point: Point, prompt: list[int]) -> dict[str, float]:
    """Speed of a point as it will be used, compiled for its own checkpoints, on one prompt: mean times of a token
    without exits and with them, and the first over the second."""
    used = TIDE(model, replace(bank, thresholds=point.thresholds))
    plain = TIDE(model, None, TIDEConfig(exit_threshold=1.0))
    found = time_decoding({"off": (plain, None), "on": (used, None)}, prompt, tokens=64)
    on, off = (statistics.fmean(found[n]) for n in ("on", "off"))
    return {"ms_on": on * 1e3, "ms_off": off * 1e3, "speedup": off / on}


def save_point(bank: RouterBank, point: Point, path: Path, device: str | None) -> None:
    """A router file with the thresholds of a point, whose speed was predicted if there is a ``device``; a
    certificate, which was about others, is taken out."""
    kept = {n: value for n, value in bank.metadata.items() if n != CERTIFICATE}
    tuned = {**asdict(point), "device": device}
    replace(bank, thresholds=point.thresholds, metadata={**kept, "tuned": tuned}).save(path)
