"""quality: how good the exits of one checkpoint are, on held-out tokens.

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tide_compile.calibration.fit_maps import projected
from tide_compile.calibration.training import kl
from tide_compile.model.decoder import Decoder
from tide_compile.routers.metadata import ReliabilityRow, TableRow
from tide_compile.routers.networks import Projection

_ROWS = 256  # rows through the head at a time
_JUDGED = 2048  # tokens on which projections are compared
_BINS = 10  # of the reliability curve


def projection_quality(
    decoder: Decoder, projections: dict[str, Projection | None], states: Tensor, targets: Tensor
) -> TableRow:
    """Of each kind of projection, by name: top-1 agreement, divergence in nats and cosine.

    Args:
        states, targets: at the checkpoint and behind the last layer, [T, H] each; the first 2048 tokens count.
    """
    row: TableRow = {}
    states, targets = states[:_JUDGED], targets[:_JUDGED]
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in projections}
    for x, y in zip(states.split(_ROWS), targets.split(_ROWS), strict=True):
        wanted = decoder.logits(y.to(decoder.device)).float()
        for name, projection in projections.items():
            state = projected(projection, x)
            logits = decoder.logits(state.to(decoder.device)).float()
            same = (logits.argmax(-1) == wanted.argmax(-1)).double().sum().cpu()
            cosine = nn.functional.cosine_similarity(state, y.float(), dim=-1).double().sum()
            sums[name] += torch.stack([same, kl(logits, wanted).double().cpu() * len(x), cosine])
    for name, found in sums.items():
        same, divergence, cosine = (found / len(states)).tolist()
        row |= {f"{name} top-1": round(same, 3), f"{name} KL": round(divergence, 3), f"{name} cosine": round(cosine, 3)}
    return row


def decision_quality(score: Tensor, label: Tensor, agreement: Tensor, threshold: float) -> TableRow:
    """What a router's scores lead to.

    Args:
        score: [T]. label, agreement: what the router learnt, and whether the exit agrees, [T] of 0 and 1.
    """
    leave = score > threshold
    return {
        "top-1 agreement": round(agreement.mean().item(), 3),
        "label rate": round(label.mean().item(), 3),
        f"exits at {threshold}": round(leave.float().mean().item(), 3),
        "their agreement": round(agreement[leave].mean().item(), 3) if leave.any() else None,
    }


def reliability(scores: Tensor, labels: Tensor) -> list[ReliabilityRow]:
    """Tokens by score, in ten equal intervals: their number, mean score and share of label 1."""
    rows: list[ReliabilityRow] = []
    for index in range(_BINS):
        low, high = index / _BINS, (index + 1) / _BINS
        inside = (scores >= low) & ((scores < high) | (index == _BINS - 1))
        if inside.any():
            rows.append(
                {
                    "from": low,
                    "to": high,
                    "tokens": int(inside.sum()),
                    "score": round(scores[inside].mean().item(), 4),
                    "agreement": round(labels[inside].float().mean().item(), 4),
                }
            )
    return rows


def calibration_error(curve: list[ReliabilityRow]) -> float:
    """Expected calibration error of a ``reliability`` curve: the mean distance of score and agreement over tokens."""
    total = sum(row["tokens"] for row in curve)
    return sum(row["tokens"] * abs(row["score"] - row["agreement"]) for row in curve) / max(1, total)
