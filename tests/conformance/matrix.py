"""The matrix: every case, in every way to generate, with and without exits, for one row and three."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from tests.conformance.cases import Case, Generate, Setup
from tests.conformance.outcomes import Outcome, outcome, verdict
from tests.support.models import SETTINGS, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig, eager_reference, synthetic_routers

WAYS = ("engine", "torch.compile", "model.compile")
BATCHES = (1, 3)
_THRESHOLD = 0.85
_LAYERS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """``exits``: off, or synthetic."""

    case: str
    covers: tuple[str, ...]
    way: str
    exits: str
    batch: int
    verdict: str
    why: str

    def __str__(self) -> str:
        return f"{self.case} | {self.way}, exits {self.exits}, batch {self.batch}: {self.verdict} {self.why}"


def new_model() -> PreTrainedModel:
    return tiny("rmsnorm-rope-gqa", layers=_LAYERS)


@functools.cache
def _bank() -> RouterBank:
    ids, mask = prompt(8, 12)
    return synthetic_routers(new_model(), ids, {0: 0.3, 1: 0.4}, attention_mask=mask, exit_threshold=_THRESHOLD)


class Ways:
    """Each way to generate, made when it is first asked for, and kept: what one call leaves behind, the next meets."""

    def __init__(self, lowering: str = "eager") -> None:
        self._lowering = lowering
        self._made: dict[tuple[str, str], Generate] = {}
        self.stock = new_model()

    def generate(self, way: str, exits: str) -> Generate:
        """``generate`` of a model of its own."""
        if (way, exits) not in self._made:
            self._made[way, exits] = self._make(way, exits)
        return self._made[way, exits]

    def _make(self, way: str, exits: str) -> Generate:
        model, config = new_model(), self._config(exits)
        bank = None if exits == "off" else _bank()
        if way == "engine":
            return TIDE(model, bank, config).generate
        options = {"router": bank, **config.to_dict()}
        if way == "model.compile":
            model.compile(backend="tide", options=options)
            return model.generate
        return torch.compile(model, backend="tide", options=options).generate

    def _config(self, exits: str) -> TIDEConfig:
        threshold = 1.0 if exits == "off" else _THRESHOLD
        return TIDEConfig(exit_threshold=threshold, **SETTINGS | {"lowering": self._lowering})

    def expected(self, case: Case, exits: str, batch: int) -> Outcome:
        """What stock transformers, or with exits the eager reference, comes to."""
        if exits == "off":
            return _run(case, self.stock, self.stock.generate, batch)
        with eager_reference(self.stock, _bank(), self._config(exits)):
            return _run(case, self.stock, self.stock.generate, batch)

    def rows(
        self, cases: Sequence[Case], ways: Sequence[str] = WAYS, exits: Sequence[str] = ("off", "synthetic"),
        batches: Sequence[int] = BATCHES,
    ) -> Iterator[Row]:  # fmt: skip
        for case in cases:
            for batch in batches:
                for kind in exits:
                    want = self.expected(case, kind, batch)
                    for way in ways:
                        got = _run(case, self.stock, self.generate(way, kind), batch)
                        yield Row(case.name, case.covers, way, kind, batch, *verdict(got, want))


def _run(case: Case, model: PreTrainedModel, generate: Generate, batch: int) -> Outcome:
    setup = Setup(model, *prompt(batch))
    return outcome(lambda: case.run(generate, setup), setup)
