"""certify: thresholds with a promise, "on new prompts, at most this share of the tokens is another than the model's".

Angelopoulos, Bates, Candes, Jordan and Lei (2021), "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk
Control": each candidate is a hypothesis "its risk is above the bound", candidates are tested from the most careful one
on until one is not rejected (fixed sequence, which controls the family-wise error), and the last rejected one is used.
The unit is a prompt, its loss the share of generated tokens that disagree; prompts have to be exchangeable with those
to come.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from scipy.special import bdtr
from torch import nn

from tide_compile.agreement import measure_agreement
from tide_compile.config import TIDEConfig
from tide_compile.errors import ConfigError
from tide_compile.routers import RouterBank
from tide_compile.screen import prices_for, thresholds_at

log = logging.getLogger("tide_compile")

PROMISE = "certificate"  # its name in a bank's metadata
_PARTS = (0.3, 0.6, 0.85, 1.0, 1.2)  # of what can be certified: the losses that candidates are expected to have
_PILOT = 8  # every eighth prompt tells how far expectations are off, and tests nothing
_OFF = (0.25, 4.0)  # that they are taken to be off, at most


def p_value(losses: Sequence[float], bound: float) -> float:
    """Of the hypothesis that the expected loss is above ``bound``: twice the smaller of two p-values.

    Hoeffding's and Bentkus's (Bates et al. 2021, "Distribution-Free, Risk-Controlling Prediction Sets") sees the mean
    only. The other is what is left of a stake of one that was put on the hypothesis being false (Waudby-Smith and
    Ramdas 2023, "Estimating means of bounded random variables by betting", with the largest bet that cannot lose more
    than the stake); it rewards losses that are all alike, as shares of many tokens are.

    Args:
        losses: in 0..1, of independent prompts. bound: in 0..1.
    """
    mean, count = sum(losses) / len(losses), len(losses)
    seen = min(mean, bound)
    divergence = (1 - seen) * math.log((1 - seen) / (1 - bound))
    if seen > 0:
        divergence += seen * math.log(seen / bound)
    hoeffding = math.exp(-count * divergence)
    bentkus = math.e * float(bdtr(math.ceil(count * mean - 1e-9), count, bound))
    betting = 1.0
    if max(losses) < 1:
        betting = math.exp(min(0.0, sum(math.log((1 - bound) / (1 - loss)) for loss in losses)))
    return min(1.0, 2 * min(hoeffding, bentkus, betting))


def prompts_needed(bound: float, confidence: float) -> int:
    """The least number of prompts with which a bound can be certified: if no token disagrees."""
    return math.ceil(math.log((1 - confidence) / 2) / math.log(1 - bound) - 1e-9)


def largest_loss(prompts: int, bound: float, confidence: float) -> float:
    """The largest loss that certifies a bound on so many prompts, if it is the same on each."""
    return max(0.0, 1 - (1 - bound) * (2 / (1 - confidence)) ** (1 / prompts))


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate that was tested: the mean ``loss`` and ``layers_saved`` as measured, the p-value, whether it is
    certified."""

    thresholds: dict[int, float]
    loss: float
    layers_saved: float
    p_value: float
    certified: bool


def certify_in_sequence(
    candidates: Sequence[dict[int, float]],
    measure: Callable[[dict[int, float]], tuple[Sequence[float], float]],
    prompts: int,
    bound: float,
    confidence: float,
) -> list[Trial]:
    """Test candidates, the most careful first, up to the first that cannot be certified.

    Args:
        candidates: layer -> threshold. measure: (loss of each prompt, layers saved) of a candidate, on ``prompts``
            prompts that had no part in choosing the candidates.
        bound: on the expected loss, 0..1. confidence: that the certified candidates keep it.

    Returns:
        The trials in order; all but perhaps the last are certified.

    Raises:
        ConfigError: ``bound`` or ``confidence`` is not between 0 and 1, or so few prompts cannot certify the bound.
    """
    check_promise(bound, confidence, prompts)
    trials = []
    for thresholds in candidates:
        losses, saved = measure(thresholds)
        value = p_value(losses, bound)
        trials.append(Trial(thresholds, sum(losses) / prompts, saved, value, value <= 1 - confidence))
        if not trials[-1].certified:
            break
    return trials


def testing(prompts: int) -> int:
    """How many of so many prompts ``certify`` tests with; the others are its pilot."""
    return prompts - len(range(0, prompts, _PILOT))


def check_promise(bound: float, confidence: float, prompts: int) -> None:
    """Raises ConfigError; see ``certify_in_sequence``."""
    for name, value in (("max_disagreement", bound), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ConfigError(f"{name}={value!r} is not allowed: give a number above 0 and below 1.")
    needed = prompts_needed(bound, confidence)
    if prompts < needed:
        raise ConfigError(
            f"{prompts} prompts to test with cannot certify a disagreement of at most {bound:.2%} with confidence "
            f"{confidence:.0%}: "
            f"{needed} are needed if not one token disagrees, and more if some do (every eighth that is given is a "
            "pilot and does not count). Give more calibration texts or another bound."
        )


def _from_pilot(
    measure: Callable[[Sequence[int]], tuple[Sequence[float], float]], layers: Sequence[int], expected: float
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


def certify(
    model: nn.Module,
    bank: RouterBank,
    prompts: Sequence[Sequence[int]],
    max_disagreement: float,
    confidence: float = 0.95,
    *,
    config: TIDEConfig | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, object]:
    """Choose a bank's thresholds with a promise: on prompts like these, the expected share of generated tokens on
    which the output differs from the full model's choice after the same prefix is at most ``max_disagreement``.

    Candidates come from the calibration's ``screen``, which reads texts and so sees less disagreement than there is in
    what TIDE writes: how much less, and from which checkpoint on exits save most for it, generations after every eighth
    prompt tell, once for each checkpoint. The others test; each candidate is measured on generations of its own
    (greedy, by the eager reference). Sets ``bank.thresholds`` and ``bank.metadata[PROMISE]``; where nothing can be
    certified, all thresholds are 1: TIDE is off.

    Args:
        model: uncompiled. prompts: token ids, not used in calibration. confidence: that the promise holds.
        config: only its ``kv_cache_strategy`` and ``exit_strategy`` matter.

    Returns:
        The certificate.

    Raises:
        ConfigError: too few prompts, or no ``screen`` in the bank.
    """
    pilot, tested = prompts[::_PILOT], [p for i, p in enumerate(prompts) if i % _PILOT]
    check_promise(max_disagreement, confidence, len(tested))
    if not bank.metadata.get("screen"):
        raise ConfigError("these routers have no record of their scores: calibrate again to certify them.")
    config = replace(config or TIDEConfig(), exit_threshold=None)
    most = largest_loss(len(tested), max_disagreement, confidence)

    def measure(thresholds: dict[int, float], prompts: Sequence[Sequence[int]]) -> tuple[list[float], float]:
        trial = replace(bank, thresholds=thresholds)
        outcome = measure_agreement(
            model, trial, config, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
        )
        log.info("%s: disagreement %.4f, layers saved %.3f", thresholds, outcome.disagreement, outcome.layers_saved)
        return [g.disagreement for g in outcome.generations], outcome.layers_saved

    def candidates(losses: Sequence[float], layers: Sequence[int]) -> list[dict[int, float]]:
        prices = prices_for(bank.metadata["screen"], losses)
        return [thresholds_at(price, layers, bank.num_layers) for price in prices]

    layers, off = _from_pilot(lambda layers: measure(candidates([most], layers)[0], pilot), bank.layers, most)
    trials = certify_in_sequence(
        candidates([part * most / off for part in _PARTS], layers),
        lambda thresholds: measure(thresholds, tested),
        len(tested),
        max_disagreement,
        confidence,
    )
    chosen = next((trial for trial in reversed(trials) if trial.certified), None)
    if chosen is None:
        log.warning("no thresholds keep a disagreement of %s, so TIDE is off for these routers", max_disagreement)
    bank.thresholds = dict.fromkeys(bank.layers, 1.0) if chosen is None else chosen.thresholds
    digest = hashlib.sha256(json.dumps([list(p) for p in prompts]).encode()).hexdigest()
    bank.metadata[PROMISE] = {
        "bound": max_disagreement,
        "confidence": confidence,
        "prompts": len(tested),
        "new tokens": max_new_tokens,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "data": digest[:16],
        "measured": None if chosen is None else round(chosen.loss, 5),
        "layers saved": 0.0 if chosen is None else round(chosen.layers_saved, 4),
        "trials": [
            {"disagreement": round(t.loss, 5), "layers saved": round(t.layers_saved, 4), "p": round(t.p_value, 6)}
            for t in trials
        ],
    }
    return bank.metadata[PROMISE]
