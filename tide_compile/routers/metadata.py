"""metadata: what a router file tells of how its routers were made and how good they are.

The keys are those of the file's header and are shown as they are in tables, which is why some hold spaces.
"""

from __future__ import annotations

from typing import Final, TypedDict

SCREEN: Final = "screen"  # what thresholds/sweep.py has found
CERTIFICATE: Final = "certificate"

TableRow = TypedDict(
    "TableRow",
    {
        "layer": int,
        "identity top-1": float,
        "identity KL": float,
        "identity cosine": float,
        "affine top-1": float,
        "affine KL": float,
        "affine cosine": float,
        "low_rank top-1": float,
        "low_rank KL": float,
        "low_rank cosine": float,
        "top-1 agreement": float,
        "label rate": float,
        "their agreement": float | None,
        "calibration error": float,
    },
    total=False,
)
"""A checkpoint on held-out tokens. Of each kind of exit projection that was fitted: the share of tokens for which it
predicts the full model's, the divergence in nats, the cosine with the last state. Of the projection in use: agreement
and the share of label 1; of the router: the share that leaves (``"exits at 0.85"``, the threshold is in the key), how
many of those agree (None: none leaves), and the expected calibration error of its scores. Shares are 0..1."""

ReliabilityRow = TypedDict(
    "ReliabilityRow", {"from": float, "to": float, "tokens": int, "score": float, "agreement": float}
)
"""Tokens with scores in an interval: their number, mean score and share of label 1."""

SweepRow = TypedDict("SweepRow", {"price": float, "disagreement": float, "layers saved": float})
"""Exits at a price (see ``thresholds/price.py``): the share of tokens that disagree and of layer passes saved, 0..1."""

TrialRow = TypedDict("TrialRow", {"disagreement": float, "layers saved": float, "p": float})
"""A candidate that was tested: shares as in ``SweepRow``, on generated tokens, and its p-value."""

Certificate = TypedDict(
    "Certificate",
    {
        "bound": float,
        "confidence": float,
        "prompts": int,
        "new tokens": int,
        "date": str,
        "data": str,
        "measured": float | None,
        "layers saved": float,
        "trials": list[TrialRow],
    },
)
"""That thresholds keep a ``bound`` on the share of tokens that disagree, with a ``confidence``: tested on so many
``prompts`` with up to so many ``new tokens`` each. ``data``: the beginning of the SHA-256 of their token ids;
``measured``: the disagreement of the thresholds in use, None where no candidate was certified."""


class Metadata(TypedDict, total=False):
    """What is known of a bank, all of it JSON.

    ``table`` and ``reliability`` (by layer as a string) come from held-out tokens, ``screen`` from texts that are read
    with exits, ``certificate`` from generated text. ``tuned`` is the point that ``tide tune`` chose. The others say
    what was asked for (``config``, ``data``, ``chat``, ``seed``, ``max_length``) and how much was read, when.
    """

    table: list[TableRow]
    reliability: dict[str, list[ReliabilityRow]]
    screen: list[SweepRow]
    certificate: Certificate
    tuned: dict[str, object]
    config: dict[str, object]
    data: str
    chat: bool
    seed: int
    max_length: int
    texts: int
    tokens: int
    date: str
