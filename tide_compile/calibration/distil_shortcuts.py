"""refine: shortcuts trained for what they are there for, the tokens that come after one that has left.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tide_compile.calibration.fit_maps import kl
from tide_compile.calibration.training import mixed_precision
from tide_compile.config import TIDEConfig
from tide_compile.model.decoder import Decoder
from tide_compile.reference import eager_reference
from tide_compile.routers.bank import RouterBank
from tide_compile.routers.networks import Projection
from tide_compile.text.corpus import Row
from tide_compile.thresholds.price import thresholds_at

_ROWS, _LENGTH = 4, 128  # of a step
_RATE = 8e-4
_CHECKS = 4  # times that held-out rows judge
_JUDGED = 4  # batches of them
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
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        n: {k: nn.Parameter(t.to(decoder.device, torch.float32).clone()) for k, t in s.tensors.items()}
        for n, s in bank.shortcuts.items()
    }
    flat = [p for found in tensors.values() for p in found.values()]
    optimizer = torch.optim.Adam(flat, lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    judged = [judging[start : start + _ROWS] for start in range(0, _ROWS * _JUDGED, _ROWS) if judging[start:]]

    def held_out() -> float:
        with torch.no_grad():
            return sum(_divergence(decoder, bank, tensors, batch, _PRICES[0]).item() for batch in judged) / len(judged)

    with _weights_held(decoder.model):
        best, kept = held_out(), bank.shortcuts
        for step in tqdm(range(1, steps + 1), "shortcuts", unit="step", disable=not progress):
            chosen = torch.randint(len(training), (_ROWS,), generator=generator).tolist()
            with torch.enable_grad():
                loss = _divergence(decoder, bank, tensors, [training[i] for i in chosen], _PRICES[step % 2])
                gradients = torch.autograd.grad(loss, flat, allow_unused=True) if loss.requires_grad else ()
            for parameter, gradient in zip(flat, gradients, strict=False):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            if step % -(-steps // _CHECKS) == 0 or step == steps:
                found = held_out()
                if found < best:
                    best = found
                    kept = {
                        n: Projection(**{k: p.detach().cpu().clone() for k, p in found.items()})
                        for n, found in tensors.items()
                    }
    return kept


def _divergence(
    decoder: Decoder, bank: RouterBank, tensors: dict[int, dict[str, Tensor]], texts: list[list[int]], price: float
) -> Tensor:
    """In nats, mean over the tokens."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True).to(decoder.device)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(text), dtype=torch.long) for text in texts], batch_first=True)
    arguments = {"input_ids": ids, "attention_mask": mask.to(decoder.device), "use_cache": False}
    precision = mixed_precision(decoder.device, decoder.dtype)
    with torch.no_grad(), precision:
        wanted = decoder.model.forward(**arguments).logits
    bank = replace(bank, thresholds=thresholds_at(price, bank.layers, bank.num_layers))
    with eager_reference(decoder.model, bank, TIDEConfig(kv_cache_strategy="shortcut"), decoder) as reference:
        for layer, found in tensors.items():
            if layer in reference.settings.shortcuts:
                reference.settings.shortcuts[layer] = {n: p.to(decoder.dtype) for n, p in found.items()}
        with precision:
            ours = decoder.model(**arguments).logits  # [B, S, V]
    real = mask.bool().to(ours.device)
    return kl(ours[real], wanted[real])


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
