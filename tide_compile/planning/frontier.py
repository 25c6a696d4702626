"""tune: which checkpoints and thresholds to use, from measurements on a model's own text.

Every set of checkpoints is screened on scores of the model's own tokens, whose exits are turned into time with measured
costs; the fastest at each level of disagreement are then measured on generations of their own, on other prompts.

Shapes: T tokens, C checkpoints, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tide_compile.config import TIDEConfig
from tide_compile.errors import ConfigError
from tide_compile.generation.engine import TIDE
from tide_compile.kernels.route import normalise_reference
from tide_compile.model.decoder import find_decoder
from tide_compile.planning.token_costs import TokenCosts, time_decoding
from tide_compile.reference import eager_reference
from tide_compile.routers.bank import RouterBank
from tide_compile.text.self_text import continue_prompts
from tide_compile.text.sources import calibration_texts
from tide_compile.thresholds.agreement import measure_agreement
from tide_compile.thresholds.certify import CERTIFICATE
from tide_compile.thresholds.price import simulate_exits, thresholds_at

log = logging.getLogger("tide_compile")

LEVELS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12)  # of disagreement, at first sight
_PRICES = torch.logspace(-2.5, 1, 36).tolist()
_SETS = 8  # checkpoints, up to which every set of them is looked at


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


@torch.no_grad()
def read_scores(
    model: nn.Module,
    bank: RouterBank,
    config: TIDEConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """What each router says of each token that the full model writes after ``prompts``, and whether leaving there would
    have been right.

    Returns:
        scores [T, C] fp32 and correct [T, C] bool, checkpoints in the order of ``bank.layers``.
    """
    decoder, captured, parts = find_decoder(model), {}, []
    projections = {} if config.exit_strategy == "identity" else bank.projections
    prompts = [list(prompt) for prompt in prompts]
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        for prompt, row in zip(batch, continue_prompts(model, batch, max_new_tokens, sample=False), strict=True):
            ids = torch.tensor(row, device=decoder.device)
            with decoder.on_layers(lambda layer, _, state: captured.__setitem__(layer, state[0])):
                model.forward(input_ids=ids[None], use_cache=False)
            written = slice(len(prompt) - 1, len(row) - 1)
            scores, correct = [], []
            for layer in bank.layers:
                state = captured[layer][written]
                left = projections[layer](state.cpu()) if layer in projections else state
                normed = normalise_reference(state.float().cpu(), *_norm(bank))
                scores.append(bank.routers[layer](normed))
                correct.append((decoder.logits(left.to(decoder.device)).argmax(-1) == ids[len(prompt) :]).cpu())
            parts.append((torch.stack(scores, 1), torch.stack(correct, 1)))
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def choose(
    scores: Tensor,
    correct: Tensor,
    layers: Sequence[int],
    num_layers: int,
    costs: TokenCosts,
    levels: Sequence[float] = LEVELS,
) -> list[dict[int, float]]:
    """Thresholds worth measuring: of all sets of checkpoints, the fastest at each level of disagreement. A checkpoint
    that costs more than it saves is in none of them.

    Args:
        scores, correct: [T, C]. levels: shares of tokens, 0..1.

    Returns:
        At most one for each level, none twice, none that is slower than the model without exits.
    """
    screened = []
    for chosen in checkpoint_sets(layers):
        columns = [list(layers).index(layer) for layer in chosen]
        for price in _PRICES:
            thresholds = thresholds_at(price, chosen, num_layers)
            wrong, exits = simulate_exits(scores[:, columns], correct[:, columns], thresholds)
            screened.append((costs.seconds(exits), wrong, thresholds))
    found = []
    for level in sorted(levels):
        seconds, _, thresholds = min(
            (s for s in screened if s[1] <= level), key=lambda s: s[0], default=(math.inf, 0, {})
        )
        if seconds < costs.off and thresholds not in found:
            found.append(thresholds)
    return found


def checkpoint_sets(layers: Sequence[int]) -> list[tuple[int, ...]]:
    """All sets of up to eight checkpoints; of more, those of every ``min_layers`` and every interval."""
    if len(layers) <= _SETS:
        sizes = range(1, len(layers) + 1)
        return [chosen for size in sizes for chosen in itertools.combinations(layers, size)]
    spaced = (tuple(layers[first::step]) for first in range(len(layers)) for step in range(1, len(layers) + 1))
    return list(dict.fromkeys(spaced))


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
        model: uncompiled. prompts: token ids; every second one screens, the others measure.
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


def _norm(bank: RouterBank) -> tuple[Tensor, Tensor | None, float, bool]:
    return bank.norm.weight, bank.norm.bias, bank.norm.eps, bank.norm.layer_norm


_TEXTS, _TEXT_TOKENS = 16, 256  # for the perplexity


def tuning_data(bank: RouterBank, data: str | None) -> tuple[str, int]:
    """Where prompts come from, and how many calibration rows of it to pass over.

    Raises:
        ConfigError: nothing is given, and the routers do not say what they were made of.
    """
    made_of = bank.metadata.get("data")
    source = data or made_of
    if not isinstance(source, str) or source == "list":
        raise ConfigError("these routers do not say what they were made of: give --data.")
    seen = bank.metadata.get("config", {}).get("calibration_samples", 0)
    return source, seen if source == made_of else 0


def perplexity_texts(source: str, tokenizer: object) -> list[list[int]]:
    """Token ids of some texts; none where the model's own samples are all there is."""
    texts = next((s for s in source.split("+") if s != "self"), None)
    if texts is None:
        return []
    ids = tokenizer(list(calibration_texts(texts, _TEXTS)), truncation=True, max_length=_TEXT_TOKENS)["input_ids"]
    return [row for row in ids if len(row) > 1]


def time_point(model: object, bank: RouterBank, point: Point, prompt: list[int]) -> dict[str, float]:
    """Speed of a point as it will be used, compiled for its own checkpoints, on one prompt: median times without exits
    over with them."""
    used = TIDE(model, replace(bank, thresholds=point.thresholds))
    plain = TIDE(model, None, TIDEConfig(exit_threshold=1.0))
    found = time_decoding({"off": (plain, None), "on": (used, None)}, prompt, tokens=64)
    on, off = (statistics.fmean(found[n]) for n in ("on", "off"))
    return {"ms_on": on * 1e3, "ms_off": off * 1e3, "speedup": off / on}


def save_point(bank: RouterBank, point: Point, path: Path, device: str | None) -> None:
    """A router file with the thresholds of a point, whose speed was predicted if there is a ``device``; a promise that
    was about others is taken out."""
    kept = {n: value for n, value in bank.metadata.items() if n != CERTIFICATE}
    tuned = {**asdict(point), "device": device}
    replace(bank, thresholds=point.thresholds, metadata={**kept, "tuned": tuned}).save(path)
