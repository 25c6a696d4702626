"""TokenTrace: for every token of a ``generate``, the layer it left at and what the router said.

Shapes: B sequences, T tokens, P of them the prompt's.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from tide_compile.errors import ConfigError
from tide_compile.files import write_text
from tide_compile.inspection.html import render
from tide_compile.passes.plan import PADDING
from tide_compile.runtime.exit_stats import ExitStats
from tide_compile.text.token_decoder import TokenDecoder

log = logging.getLogger("tide_compile")

_OTHER_WAYS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "num_beams", "guidance_scale")
_USUAL = {"num_beams": 1, "guidance_scale": 1}


@dataclass(frozen=True, slots=True)
class TracedToken:
    """``layer`` counts from 0; num_layers - 1 is full depth. ``score``: of the last router that was asked, 0..1, or
    None. ``text``: what the token adds to the text, or None without a tokenizer."""

    id: int
    text: str | None
    layer: int
    score: float | None
    prompt: bool


@dataclass(slots=True, eq=False, repr=False)
class TokenTrace:
    """Layers and scores of the tokens of one ``generate``.

    A token of the prompt has the layer and score of the pass that read it. A generated token has those of the pass
    that chose it, which read the token before; so the last token of the prompt and the first generated one share
    theirs. Tensors stay where the model put them until something is asked.

    Attributes:
        ids: [B, T] int64. layers: [B, T] int64, -1 for padding. scores: [B, T] fp32, NaN where no router was asked.
        prompt_length: P. num_layers: of the model. tokenizer: makes text of ids, or None.
    """

    ids: Tensor
    layers: Tensor
    scores: Tensor
    prompt_length: int
    num_layers: int
    tokenizer: object = None

    @classmethod
    def of(cls, stats: ExitStats, ids: Tensor, prompt_length: int, tokenizer: object = None) -> TokenTrace | None:
        """From the exits of a ``generate`` (``record_exits(per_token=True)``) and the ids [B, T] it returned. None, and
        a warning, where the two do not belong together."""
        rows = {len(layers) for layers in stats.exit_layers}
        if rows != {len(ids)}:
            log.warning("no trace: %s sequences were run and %d returned", sorted(rows), len(ids))
            return None
        widths = [layers.shape[1] for layers in stats.exit_layers]
        whole = widths == list(range(prompt_length, ids.shape[1]))  # without a cache, each token reads all before it
        layers, scores = (
            torch.cat([x[:, -1:] if whole and i else x for i, x in enumerate(kept)], 1)
            for kept in (stats.exit_layers, stats.scores)
        )
        if layers.shape[1] >= ids.shape[1]:
            if prompt_length:
                log.warning("no trace: %d tokens were run for %d in the text", layers.shape[1], ids.shape[1])
                return None
            # embeddings were given: the ids are those of generated tokens alone
            layers, scores = layers[:, -ids.shape[1] :], scores[:, -ids.shape[1] :]
        else:  # of tokens that were in the cache before, nothing is known
            prompt_length = max(1, prompt_length)  # without a prompt, generation starts from one token
            missing = (ids.shape[1] - 1 - layers.shape[1], 0)
            layers = torch.nn.functional.pad(layers, missing, value=PADDING)
            scores = torch.nn.functional.pad(scores, missing, value=torch.nan)
            read, chosen = slice(0, prompt_length), slice(prompt_length - 1, None)
            layers = torch.cat([layers[:, read], layers[:, chosen]], 1)
            scores = torch.cat([scores[:, read], scores[:, chosen]], 1)
        return cls(ids.detach(), layers, scores, prompt_length, stats.num_layers, tokenizer)

    @staticmethod
    def check(arguments: Mapping[str, object], config: GenerationConfig) -> None:
        """Raises ConfigError for ways to generate in which tokens change places, are taken back or run more than once,
        as the arguments of a ``generate`` say, or else its config."""
        for name in _OTHER_WAYS:
            value = arguments.get(name, getattr(config, name, None))
            if value is not None and value != _USUAL.get(name):
                what = f"{name}={value}" if isinstance(value, int | float) else name
                raise ConfigError(f"trace=True follows greedy search and sampling, not {what}: leave one of them out.")

    def tokens(self, tokenizer: object = None) -> list[list[TracedToken]]:
        """Per sequence, its tokens without padding. ``tokenizer``: in place of the trace's own."""
        tokenizer = tokenizer or self.tokenizer
        columns = zip(self.ids.tolist(), self.layers.tolist(), self.scores.tolist(), strict=True)
        return [self._sequence(*row, tokenizer) for row in columns]

    def _sequence(self, ids: list, layers: list, scores: list, tokenizer: object) -> list[TracedToken]:
        kept = [i for i, layer in enumerate(layers) if layer != PADDING]
        texts = token_texts(tokenizer, [ids[i] for i in kept])
        return [
            TracedToken(
                ids[i], text, layers[i], None if math.isnan(scores[i]) else round(scores[i], 4), i < self.prompt_length
            )
            for i, text in zip(kept, texts, strict=True)
        ]

    def depths(self, *, prompt: bool = False) -> dict[int, int]:
        """Layer -> number of generated tokens, or of the prompt's, that left there; ascending."""
        part = slice(0, self.prompt_length) if prompt else slice(self.prompt_length, None)
        counted = Counter(self.layers[:, part].flatten().tolist())
        return {layer: counted[layer] for layer in sorted(counted) if layer != PADDING}

    @property
    def mean_depth(self) -> float:
        """Layers run per generated token."""
        depths = self.depths()
        return sum((layer + 1) * n for layer, n in depths.items()) / max(1, sum(depths.values()))

    def __repr__(self) -> str:
        depths = self.depths()
        count, early = sum(depths.values()), sum(n for layer, n in depths.items() if layer < self.num_layers - 1)
        where = ", ".join(f"{n} at {'full depth' if i == self.num_layers - 1 else i}" for i, n in depths.items())
        return (
            f"TokenTrace({count} generated tokens, {early / max(1, count):.0%} left early, mean depth "
            f"{self.mean_depth:.1f} of {self.num_layers}; by layer: {where})"
        )

    def to_json(self, tokenizer: object = None) -> str:
        """Every token with id, text, layer, score and whether it is the prompt's."""
        sequences = [
            [{n: getattr(t, n) for n in TracedToken.__slots__} for t in tokens] for tokens in self.tokens(tokenizer)
        ]
        return json.dumps({"num_layers": self.num_layers, "sequences": sequences}, ensure_ascii=False)

    def to_html(self, path: str | Path | None = None, tokenizer: object = None, title: str = "Token depth") -> str:
        """The token depth view as a page that stands alone; also written to ``path``.

        Without a tokenizer (here, or in ``generate(tokenizer=...)``) ids are shown in the place of text.
        """
        layers = sorted({*self.depths(), *self.depths(prompt=True), self.num_layers - 1})
        page = render(
            "tokens.html", title=title, trace=self, sequences=self.tokens(tokenizer), layers=layers,
            generated=self.depths(), prompt=self.depths(prompt=True), last=self.num_layers - 1,
        )  # fmt: skip
        if path is not None:
            write_text(Path(path), page)
        return page


def token_texts(tokenizer: object, ids: Sequence[int]) -> list[str | None]:
    """One text per id, which together are the text of all. A token that holds a part of a character adds nothing, and
    the one after which all of it is certain adds it. Without a tokenizer all are None."""
    if tokenizer is None or not ids:
        return [None] * len(ids)
    decoder = TokenDecoder(tokenizer, skip_special_tokens=False)
    texts = [decoder.add(token) for token in ids]
    texts[-1] += decoder.finish()
    return texts
