"""corpus: what a calibration reads, rows of token ids, in shards that can be made one by one and in any order.

A shard is made when it is called, so that a resumed run, or another process, passes over it without work.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tide_compile.errors import CalibrationDataError
from tide_compile.files import user_path
from tide_compile.text.self_text import continue_prompts, openings, questions
from tide_compile.text.sources import calibration_texts, count_texts, sources_of

SELF = "self"
SHARD = 64  # rows
PROMPT = 32  # tokens of a text that the model goes on from
_OPENING = 16  # tokens that are sampled where there is no text to go on from
_FOLDS = 5  # every fifth row is held out
_OTHER_SEEDS = 1_000_003  # apart from those of shards


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids; those before ``start`` are context only. ``held_out``: kept from fitting, to stop, choose and report.
    What the model writes after the beginning of a text is in the same part as the text."""

    ids: list[int]
    start: int
    held_out: bool


Shard = Callable[[], list[Row]]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Where the rows come from.

    Attributes:
        source: one or more of ``calibration_texts``' sources, joined by ``+``; ``"self"`` among them is text that the
            model writes: after the beginnings of the other source's texts, or from nothing. Or the texts themselves.
        model: writes ``"self"``; uncompiled. tokenizer: of the model.
        max_length: tokens of a row. self_length: tokens that the model writes.
        chat: put texts into the tokenizer's chat template as a user's message.
        seed: of what is sampled.

    Raises:
        CalibrationDataError: there is no chat template.
    """

    source: str | Path | Iterable[str]
    model: nn.Module
    tokenizer: object
    max_length: int = 512
    self_length: int = 96
    chat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.chat and not getattr(self.tokenizer, "chat_template", None):
            raise CalibrationDataError("chat=True needs a chat template, and the tokenizer has none.")

    def shards(self, limit: int) -> Iterator[Shard]:
        """Up to ``limit`` rows, an equal part from each source."""
        each = self._each(limit)
        for source in self._sources:
            made_of = self._texts if source == SELF else source
            texts = None if made_of is None else calibration_texts(made_of, each)
            make = self._written if source == SELF else self._read
            for number, start in enumerate(range(0, each, SHARD)):
                size = min(SHARD, each - start)
                batch = None if texts is None else list(itertools.islice(texts, size))
                if batch == []:
                    break
                yield lambda make=make, batch=batch, number=number, size=size: make(batch, number, size)

    def sample(self, limit: int, shards: int = 6) -> list[Row]:
        """Rows of up to so many of ``shards(limit)``, of all sources."""
        found = list(self.shards(limit))
        chosen = sorted({i * (len(found) - 1) // max(1, shards - 1) for i in range(shards)})
        return [row for i in chosen for row in found[i]()]

    def prompts(self, count: int, limit: int) -> list[list[int]]:
        """Beginnings of up to ``count`` texts that come after those of ``shards(limit)``; where there are no texts, of
        ones that the model samples for this purpose."""
        if self._texts is None:
            sizes = [min(SHARD, count - start) for start in range(0, count, SHARD)]
            return [p for i, size in enumerate(sizes) for p in self._sampled(size, _OTHER_SEEDS + i, PROMPT)]
        skip = self._each(limit)
        return self._beginnings(list(itertools.islice(calibration_texts(self._texts, skip + count), skip, None)))

    def check(self, limit: int, prompts: int = 0) -> int:
        """Read the texts that lie here, as far as ``shards(limit)`` and so many ``prompts`` need them: what is wrong
        with them is known before the model has run for long.

        Returns:
            Number of prompts that there will be, as far as can be known.

        Raises:
            CalibrationDataError: the texts cannot be read.
        """
        for number, source in enumerate(s for s in self._sources if s != SELF):
            found = count_texts(source, self._each(limit) + (prompts if number == 0 else 0))
            if number == 0 and found is not None:
                prompts = min(prompts, max(0, found - self._each(limit)))
        return prompts

    def versions(self) -> list[int]:
        """When the files among the sources were last written, in nanoseconds."""
        paths = [user_path(s) for s in self._sources if isinstance(s, str | Path) and s != SELF]
        return [path.stat().st_mtime_ns for path in paths if os.path.isfile(path)]

    def _each(self, limit: int) -> int:
        """Rows of each source."""
        return -(-limit // len(self._sources))

    @property
    def _sources(self) -> list[object]:
        return sources_of(self.source)

    @property
    def _texts(self) -> object:
        """The first source of texts, or None."""
        return next((s for s in self._sources if s != SELF), None)

    def _read(self, texts: list[str], number: int, size: int) -> list[Row]:
        return [Row(ids, 0, _held_out(number, i)) for i, ids in enumerate(self._ids(texts)) if ids]

    def _written(self, texts: list[str] | None, number: int, size: int) -> list[Row]:
        """Every second row greedily, as text is mostly made, the others by sampling."""
        seed = self.seed + number
        prompts = self._sampled(size, seed, _OPENING) if texts is None else self._beginnings(texts)
        rows: list[list[int]] = [[]] * len(prompts)
        for first in (0, 1):
            if chosen := prompts[first::2]:
                rows[first::2] = continue_prompts(self.model, chosen, self.self_length, sample=bool(first), seed=seed)
        return [
            Row(row, len(prompt) - 1, _held_out(number, i))
            for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]

    def _sampled(self, count: int, seed: int, length: int) -> list[list[int]]:
        if self.chat:
            return self._ids(questions(self.model, self.tokenizer, count, seed))
        return openings(self.model, self.tokenizer, count, length, seed)

    def _beginnings(self, texts: list[str]) -> list[list[int]]:
        rows = [row for row in self._ids(texts) if row]
        return rows if self.chat else [row[:PROMPT] for row in rows]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if not self.chat:
            return self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        messages = [[{"role": "user", "content": text}] for text in texts]
        rows = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        return [list(row)[-self.max_length :] for row in rows]


def _held_out(shard: int, row: int) -> bool:
    return (shard * SHARD + row + 1) % _FOLDS == 0
