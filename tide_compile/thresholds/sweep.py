"""sweep: what the thresholds of each of several prices lead to on texts, before anything is generated with them.

Shapes: B batch, S sequence, T tokens, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tide_compile.config import TIDEConfig
from tide_compile.model.decoder import Decoder
from tide_compile.reference import eager_reference
from tide_compile.routers.bank import RouterBank
from tide_compile.routers.metadata import SweepRow
from tide_compile.runtime.exit_stats import ExitStats
from tide_compile.text.corpus import Row
from tide_compile.text.padding import right_padded
from tide_compile.thresholds.price import thresholds_at

_LENGTH = 192  # tokens read of a text
_PRICES = torch.logspace(-1.9, 0.3, 14).tolist()


@torch.no_grad()
def sweep_prices(
    decoder: Decoder, bank: RouterBank, config: TIDEConfig, rows: Sequence[Row], batch_size: int = 8
) -> list[SweepRow]:
    """Texts are read with exits at each of 14 prices, and without any: what their tokens predict then, and what the
    later ones make of the keys and values of those that have left.

    Args:
        rows: texts; of those that the model has written itself, if there are some, what it wrote.

    Returns:
        A row for each price, ascending.
    """
    rows = [replace(row, ids=row.ids[:_LENGTH]) for row in [row for row in rows if row.start] or rows]
    found = {price: ExitStats() for price in _PRICES}
    wrong = dict.fromkeys(_PRICES, 0)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids, mask = right_padded([row.ids for row in batch], decoder.device)
        starts = torch.tensor([[row.start] for row in batch])
        counted = mask.cpu().bool() & (torch.arange(ids.shape[1]) >= starts)  # [B, S]
        arguments = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        wanted = decoder.model.forward(**arguments).logits.argmax(-1).cpu()
        for price in _PRICES:
            chosen = replace(bank, thresholds=thresholds_at(price, bank.layers, bank.num_layers))
            with eager_reference(decoder.model, chosen, replace(config, exit_threshold=None), decoder) as reference:
                ours = decoder.model(**arguments).logits.argmax(-1).cpu()
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
