"""screen: what thresholds would lead to, before anything is generated with them.

Shapes: B batch, S sequence, T tokens, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from tide_compile.config import TIDEConfig
from tide_compile.corpus import Row
from tide_compile.decoder import Decoder
from tide_compile.reference import eager_reference
from tide_compile.routers import RouterBank
from tide_compile.stats import ExitStats

_LENGTH = 192  # tokens read of a text
_PRICES = torch.logspace(-1.9, 0.3, 14).tolist()


def thresholds_at(price: float, layers: Sequence[int], num_layers: int) -> dict[int, float]:
    """A token leaves where the chance that it disagrees, 1 - score, is below ``price`` times the share of the layers
    that leaving saves. So one number sets all checkpoints; scores have to be probabilities of agreement."""
    return {n: round(max(0.0, 1 - price * (num_layers - 1 - n) / num_layers), 6) for n in layers}


@torch.no_grad()
def screen(
    decoder: Decoder, bank: RouterBank, config: TIDEConfig, rows: Sequence[Row], batch_size: int = 8
) -> list[dict[str, float]]:
    """Texts are read with exits at each of 14 prices, and without any: what their tokens predict then, and what the
    later ones make of the keys and values of those that have left.

    Args:
        rows: texts; of those that the model has written itself, if there are some, what it wrote.

    Returns:
        Rows with ``price``, ``disagreement`` (share of tokens) and ``layers saved`` (share of layer passes).
    """
    rows = [replace(row, ids=row.ids[:_LENGTH]) for row in [row for row in rows if row.start] or rows]
    found = {price: ExitStats() for price in _PRICES}
    wrong = dict.fromkeys(_PRICES, 0)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row.ids) for row in batch], batch_first=True)
        places = torch.arange(ids.shape[1])
        mask = torch.stack([places < len(row.ids) for row in batch])
        counted = mask & torch.stack([places >= row.start for row in batch])  # [B, S]
        arguments = {"input_ids": ids.to(decoder.device), "attention_mask": mask.long().to(decoder.device)}
        wanted = decoder.model.forward(**arguments, use_cache=False).logits.argmax(-1).cpu()
        for price in _PRICES:
            chosen = replace(bank, thresholds=thresholds_at(price, bank.layers, bank.num_layers))
            with eager_reference(decoder.model, chosen, replace(config, exit_threshold=None), decoder) as reference:
                ours = decoder.model(**arguments, use_cache=False).logits.argmax(-1).cpu()
            wrong[price] += int((ours != wanted)[counted].sum())
            found[price].add_layers(bank.num_layers, reference.exit_layers[0].cpu()[counted])
    return [
        {
            "price": round(price, 6),
            "disagreement": round(wrong[price] / max(1, stats.total_tokens), 6),
            "layers saved": round(stats.layers_saved, 6),
        }
        for price, stats in found.items()
    ]


def leaving(scores: Tensor, correct: Tensor, thresholds: Mapping[int, float]) -> tuple[float, dict[int, float]]:
    """Share of tokens that leave and disagree, and share of tokens that leave by layer; each leaves at the first of its
    C checkpoints, in the order of ``thresholds``, whose threshold its score is above.

    Args:
        scores, correct: [T, C]. thresholds: C, by layer, ascending.
    """
    leave = scores > torch.tensor([*thresholds.values()])
    first = torch.where(leave.any(1), leave.int().argmax(1), len(thresholds))
    counts = first.bincount(minlength=len(thresholds) + 1)[:-1] / len(scores)
    right = torch.cat([correct.bool(), torch.ones(len(correct), 1, dtype=torch.bool)], 1).gather(1, first[:, None])
    return 1 - right.float().mean().item(), dict(zip(thresholds, counts.tolist(), strict=True))


def prices_for(table: list[dict[str, float]], disagreements: Sequence[float]) -> list[float]:
    """The prices at which a ``screen`` would have found each of the disagreements, between its own prices by linear
    interpolation; ascending and each once."""
    measured = np.maximum.accumulate([row["disagreement"] for row in table])
    found = np.interp(disagreements, measured, [row["price"] for row in table])
    return sorted({round(price, 6) for price in found.tolist()})
