"""risk_control: the statistics of certificates: p-values of a bounded loss, tests in a fixed sequence.

Angelopoulos, Bates, Candes, Jordan and Lei (2021), "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk
Control": each candidate is a hypothesis "its risk is above the bound", candidates are tested from the most careful one
on until one is not rejected (fixed sequence, which controls the family-wise error), and the last rejected one is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.special import bdtr

from tide_compile.errors import ConfigError


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
    check_bound(bound, confidence, prompts)
    trials = []
    for thresholds in candidates:
        losses, saved = measure(thresholds)
        value = p_value(losses, bound)
        trials.append(Trial(thresholds, sum(losses) / prompts, saved, value, value <= 1 - confidence))
        if not trials[-1].certified:
            break
    return trials


def check_bound(bound: float, confidence: float, prompts: int) -> None:
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
