"""certify: thresholds with a certificate, "on new prompts, at most this share of tokens is another than the model's".

The unit is a prompt, its loss the share of generated tokens that disagree; prompts have to be exchangeable with those
to come. The statistics are in ``risk_control.py``.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from tide_compile.config import TIDEConfig
from tide_compile.errors import ConfigError
from tide_compile.routers.bank import RouterBank
from tide_compile.routers.metadata import CERTIFICATE, SCREEN, Certificate
from tide_compile.thresholds.agreement import measure_agreement
from tide_compile.thresholds.price import prices_for, thresholds_at
from tide_compile.thresholds.risk_control import Trial, certify_in_sequence, check_bound, largest_loss

log = logging.getLogger("tide_compile")

_PARTS = (0.3, 0.6, 0.85, 1.0, 1.2)  # of what can be certified: the losses that candidates are expected to have
_PILOT = 8  # every eighth prompt tells how far expectations are off, and tests nothing
_OFF = (0.25, 4.0)  # that they are taken to be off, at most

Prompts = Sequence[Sequence[int]]  # token ids
Measurement = tuple[Sequence[float], float]  # the loss of each prompt, and the share of layer passes saved


def certify(
    model: nn.Module,
    bank: RouterBank,
    prompts: Prompts,
    max_disagreement: float,
    confidence: float = 0.95,
    *,
    config: TIDEConfig | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: bool = True,
) -> Certificate:
    """Choose a bank's thresholds and certify them: on prompts like these, the expected share of generated tokens on
    which the output differs from the full model's choice after the same prefix is at most ``max_disagreement``.

    Candidates come from the calibration's sweep of prices, which reads texts and so sees less disagreement than there
    is in what TIDE writes: how much less, and from which checkpoint on exits save most for it, generations after every
    eighth prompt tell, once for each checkpoint. The others test; each candidate is measured on generations of its own
    (greedy, by the eager reference). Sets ``bank.thresholds`` and ``bank.metadata["certificate"]``; where nothing can
    be certified, all thresholds are 1: TIDE is off.

    Angelopoulos et al. (2021), "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control".

    Args:
        model: uncompiled. prompts: token ids, not used in calibration. confidence: that the bound holds, 0..1.
        config: only its ``kv_cache_strategy`` and ``exit_strategy`` matter.

    Returns:
        The certificate.

    Raises:
        ConfigError: too few prompts, or no sweep in the bank.
    """
    pilot, tested = prompts[::_PILOT], [p for i, p in enumerate(prompts) if i % _PILOT]
    check_bound(max_disagreement, confidence, len(tested))
    if not bank.metadata.get(SCREEN):
        raise ConfigError("these routers have no record of their scores: calibrate again to certify them.")
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": progress}
    measure = functools.partial(_measure, model, bank, replace(config or TIDEConfig(), exit_threshold=None), options)
    most = largest_loss(len(tested), max_disagreement, confidence)
    candidates = _candidates(bank, functools.partial(measure, pilot), most)
    trials = certify_in_sequence(
        candidates, functools.partial(measure, tested), len(tested), max_disagreement, confidence
    )
    chosen = next((trial for trial in reversed(trials) if trial.certified), None)
    if chosen is None:
        log.warning("no thresholds keep a disagreement of %s, so TIDE is off for these routers", max_disagreement)
    bank.thresholds = dict.fromkeys(bank.layers, 1.0) if chosen is None else chosen.thresholds
    bank.metadata[CERTIFICATE] = {
        "bound": max_disagreement,
        "confidence": confidence,
        "prompts": len(tested),
        "new tokens": max_new_tokens,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "data": _digest(prompts),
        **_results(trials, chosen),
    }
    return bank.metadata[CERTIFICATE]


def count_tested(prompts: int) -> int:
    """How many of so many prompts ``certify`` tests with; the others are its pilot."""
    return prompts - len(range(0, prompts, _PILOT))


def _measure(
    model: nn.Module,
    bank: RouterBank,
    config: TIDEConfig,
    options: Mapping[str, object],
    prompts: Prompts,
    thresholds: dict[int, float],
) -> Measurement:
    """By generations with these ``thresholds`` after each prompt."""
    outcome = measure_agreement(model, replace(bank, thresholds=thresholds), config, prompts, **options)
    log.info("%s: disagreement %.4f, layers saved %.3f", thresholds, outcome.disagreement, outcome.layers_saved)
    return [g.disagreement for g in outcome.generations], outcome.layers_saved


def _candidates(
    bank: RouterBank, measure: Callable[[dict[int, float]], Measurement], most: float
) -> list[dict[int, float]]:
    """Thresholds, the most careful first, that should lead to parts of the loss ``most``: going by the sweep, mended by
    what the pilot's prompts ``measure``."""

    def expected_to_lose(losses: Sequence[float], layers: Sequence[int]) -> list[dict[int, float]]:
        return [thresholds_at(price, layers, bank.num_layers) for price in prices_for(bank.metadata[SCREEN], losses)]

    layers, off = _from_pilot(lambda layers: measure(expected_to_lose([most], layers)[0]), bank.layers, most)
    return expected_to_lose([part * most / off for part in _PARTS], layers)


def _from_pilot(
    measure: Callable[[Sequence[int]], Measurement], layers: Sequence[int], expected: float
) -> tuple[Sequence[int], float]:
    """From which of ``layers`` on to leave, and how many times the ``expected`` loss exits there lead to.

    A checkpoint may do harm that its scores do not know of: what leaves early leaves the layers behind it poorer keys
    and values. So each end of the list is tried, and the one chosen that saves most layers at no more than that loss,
    or, where it loses more, most for the loss.
    """
    best, chosen, off = -1.0, layers, 1.0
    for first in reversed(range(len(layers))):
        losses, saved = measure(layers[first:])
        seen = sum(losses) / len(losses)
        worth = saved * min(1.0, expected / seen) if seen else saved
        if worth >= best:  # what did no harm stays
            best, chosen, off = worth, layers[first:], seen / expected if expected else 1.0
    return chosen, min(max(off, _OFF[0]), _OFF[1])


def _results(trials: Sequence[Trial], chosen: Trial | None) -> dict[str, object]:
    """What a certificate tells of the thresholds in use and of all that were tested."""
    return {
        "measured": None if chosen is None else round(chosen.loss, 5),
        "layers saved": 0.0 if chosen is None else round(chosen.layers_saved, 4),
        "trials": [
            {"disagreement": round(t.loss, 5), "layers saved": round(t.layers_saved, 4), "p": round(t.p_value, 6)}
            for t in trials
        ],
    }


def _digest(prompts: Prompts) -> str:
    return hashlib.sha256(json.dumps([list(p) for p in prompts]).encode()).hexdigest()[:16]
