"""agreement: what exits cost and save on text that the model writes itself, against the model without exits.

Shapes: B batch, G generated tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tide_compile.config import TIDEConfig
from tide_compile.model.decoder import Decoder, find_decoder
from tide_compile.reference import eager_reference
from tide_compile.routers.bank import RouterBank
from tide_compile.runtime.exit_stats import ExitStats
from tide_compile.text.padding import left_padded
from tide_compile.text.self_text import end_tokens, written_length
from tide_compile.text.written import preferred, write


@dataclass(frozen=True, slots=True)
class Generation:
    """One continuation.

    Attributes:
        tokens: [G] int64, what was generated, up to and with the end of the sequence.
        exit_layers: [G] int64, the layer that each left after.
        agrees: [G] bool, whether the model without exits prefers the same token after the same prefix.
    """

    tokens: Tensor
    exit_layers: Tensor
    agrees: Tensor

    @property
    def disagreement(self) -> float:
        """Share of tokens, 0..1."""
        return 1 - self.agrees.float().mean().item()


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of some prompts: a list of generations, and the number of layers of the model."""

    generations: Sequence[Generation]
    num_layers: int

    @property
    def disagreement(self) -> float:
        """Mean over prompts of the share of tokens, 0..1."""
        return sum(g.disagreement for g in self.generations) / len(self.generations)

    @property
    def layers_saved(self) -> float:
        """Share of layer passes of generated tokens that exits made unnecessary, 0..1."""
        return self.stats.layers_saved

    @property
    def stats(self) -> ExitStats:
        """Exits of the generated tokens; prompts are not counted."""
        stats = ExitStats()
        stats.add_layers(self.num_layers, torch.cat([g.exit_layers for g in self.generations]))
        return stats


@torch.no_grad()
def measure_agreement(
    model: nn.Module,
    bank: RouterBank,
    config: TIDEConfig,
    prompts: Iterable[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    pad_token_id: int = 0,
    progress: bool = False,
) -> Outcome:
    """Let the model with exits write greedily after each prompt, by the eager reference, and ask the model without
    exits what it would have written after each of the same prefixes. Processors that the model's generation config
    brings count for both.

    Args:
        model: uncompiled. prompts: token ids. max_new_tokens: G, fewer where a sequence ends.
        batch_size: prompts at a time; shorter ones are padded on the left.
    """
    decoder, prompts, generations = find_decoder(model), [list(p) for p in prompts], []
    ends = end_tokens(model)
    bar = tqdm(total=len(prompts), desc="generate", unit="prompt", disable=not progress)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        ids, mask = left_padded(batch, pad_token_id, decoder.device)
        with eager_reference(model, bank, config, decoder) as reference:
            text = write(model, ids, mask, max_new_tokens, pad_token_id)
        layers = torch.stack([call[:, -1] for call in reference.exit_layers], 1).cpu()  # [B, G]
        for row, seen, left_at in zip(text, mask, layers, strict=True):
            length = written_length(row[len(seen) :].cpu(), ends)
            row = row[: len(seen) + length]
            logits = _logits_without_exits(decoder, row, seen)
            choice = preferred(model, row, seen, logits, max_new_tokens, pad_token_id)
            written = row[len(seen) :]
            generations.append(Generation(written.cpu(), left_at[:length], (choice == written).cpu()))
            bar.update()
    bar.close()
    return Outcome(generations, len(decoder.layers))


def _logits_without_exits(decoder: Decoder, row: Tensor, mask: Tensor) -> Tensor:
    """[G, V], from which each generated token of a row [P + G] would have been chosen; ``mask`` [P]."""
    prompt = row[: len(mask)][mask.bool()]
    ids = torch.cat([prompt, row[len(mask) :]])
    return decoder.model.forward(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
