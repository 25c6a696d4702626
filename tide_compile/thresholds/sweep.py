"""screen: what thresholds would lead to, before anything is generated with them.

Shapes: B batch, S sequence, T tokens, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from tide_compile.config import TIDEConfig
from tide_compile.model.decoder import Decoder
from tide_compile.reference import eager_reference
from tide_compile.routers.bank import RouterBank
from tide_compile.runtime.exit_stats import ExitStats
from tide_compile.text.corpus import Row
from tide_compile.thresholds.price import thresholds_at

_LENGTH = 192  # tokens read of a text
_PRICES = torch.logspace(-1.9, 0.3, 14).tolist()


@torch.no_grad()
def sweep_prices(
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
