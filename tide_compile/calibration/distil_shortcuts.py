"""distil_shortcuts: train shortcuts for what they are there for, the tokens that come after one that has left.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from tide_compile.calibration.training import descend, detached, kl, mixed_precision, trainable
from tide_compile.config import TIDEConfig
from tide_compile.model.decoder import Decoder
from tide_compile.reference import eager_reference
from tide_compile.routers.bank import RouterBank
from tide_compile.routers.networks import Projection
from tide_compile.text.corpus import Row
from tide_compile.text.padding import right_padded
from tide_compile.thresholds.price import thresholds_at

_ROWS, _LENGTH = 4, 128  # of a step
_RATE = 8e-4
_JUDGED = 4  # batches of held-out rows
_PRICES = (0.5, 1.0)  # of exits, between careful and bold


def distil_shortcuts(
    decoder: Decoder, bank: RouterBank, rows: Sequence[Row], steps: int, seed: int, progress: bool = False
) -> dict[int, Projection]:
    """Train a bank's shortcuts by distillation: texts are read with exits, and the loss is the Kullback-Leibler
    divergence of what their tokens predict from what they predict where none leaves.

    Args:
        rows: texts; those that are held out judge. steps: of 4 rows of up to 128 tokens. seed: of their order.

    Returns:
        The best of the given shortcuts and those seen at four points of the way, by held-out divergence.
    """
    training, judging = ([row.ids[:_LENGTH] for row in rows if row.held_out is held] for held in (False, True))
    if not steps or not bank.shortcuts or not training or not judging:
        return bank.shortcuts
    shortcuts = {layer: trainable(shortcut, decoder.device) for layer, shortcut in bank.shortcuts.items()}
    batches = [judging[start : start + _ROWS] for start in range(0, min(len(judging), _ROWS * _JUDGED), _ROWS)]
    generator = torch.Generator().manual_seed(seed)

    def losses(step: int) -> Iterator[Tensor]:
        chosen = torch.randint(len(training), (_ROWS,), generator=generator).tolist()
        yield divergence_with_exits(decoder, bank, shortcuts, [training[i] for i in chosen], _PRICES[step % 2])

    def judge() -> float:
        found = [divergence_with_exits(decoder, bank, shortcuts, batch, _PRICES[0]).item() for batch in batches]
        return sum(found) / len(found)

    parameters = [p for shortcut in shortcuts.values() for p in shortcut if p is not None]
    with _weights_held(decoder.model):
        descend(parameters, losses, steps, _RATE, judge, "shortcuts" if progress else None)
    return {layer: detached(shortcut) for layer, shortcut in shortcuts.items()}


def divergence_with_exits(
    decoder: Decoder, bank: RouterBank, shortcuts: Mapping[int, Projection], texts: list[list[int]], price: float
) -> Tensor:
    """Of what the tokens of ``texts`` predict where they may leave, with these ``shortcuts`` and the thresholds of a
    ``price``, from what they predict where none leaves: in nats, mean over the tokens."""
    ids, mask = right_padded(texts, decoder.device)
    arguments = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    precision = mixed_precision(decoder.device, decoder.dtype)
    with torch.no_grad(), precision:
        wanted = decoder.model.forward(**arguments).logits
    bank = replace(bank, thresholds=thresholds_at(price, bank.layers, bank.num_layers))
    with eager_reference(decoder.model, bank, TIDEConfig(kv_cache_strategy="shortcut"), decoder) as reference:
        used = reference.settings.shortcuts
        used |= {n: _in_dtype(shortcuts[n], decoder.dtype) for n in shortcuts.keys() & used.keys()}
        with precision:
            ours = decoder.model(**arguments).logits  # [B, S, V]
    real = mask.bool().to(ours.device)
    return kl(ours[real], wanted[real])


def _in_dtype(shortcut: Projection, dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: t.to(dtype) for n, t in shortcut.tensors.items()}


@contextmanager
def _weights_held(model: nn.Module) -> Iterator[None]:
    """No gradients for the model's own weights inside."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
