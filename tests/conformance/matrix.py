"""The matrix: every case, in every way to generate, with and without exits, for one row and three."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from tests.conformance.cases import CASES, Case, Generate, Setup
from tests.conformance.outcomes import WRONG, Outcome, outcome, verdict
from tests.support.models import SETTINGS, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig, eager_reference, synthetic_routers

WAYS = ("engine", "torch.compile", "model.compile")
BATCHES = (1, 3)
_THRESHOLD = 0.85
_LAYERS = 3
_GRAPHS = 1000  # of one model: Dynamo's usual 8 are too few for all cases


@dataclass(frozen=True, slots=True)
class Model:
    """``kind``: of ``tests.support.models``. ``covers``: parameters and fields whose cases it runs, or all."""

    about: str
    kind: str = "rmsnorm-rope-gqa"
    attention: str = "sdpa"
    covers: tuple[str, ...] = ()

    @property
    def arguments(self) -> dict[str, str]:
        return {"kind": self.kind, "attention": self.attention}


_SHAPES = (
    "inputs",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "cache_implementation",
    "past_key_values",
    "num_beams",
)
MODELS = {
    "plain": Model("grouped queries, rotary positions; every case"),
    "eager attention": Model(
        "the same with attention that gives its weights", attention="eager", covers=("output_attentions",)
    ),
    "learned positions": Model("prompts, masks and caches", "layernorm-learned-positions", covers=_SHAPES),
    "sliding window": Model("prompts, masks and caches", "sliding-window", covers=_SHAPES),
}


def cases_of(model: str) -> list[int]:
    """Where in ``CASES`` those of a model are."""
    wanted = set(MODELS[model].covers)
    return [index for index, case in enumerate(CASES) if not wanted or wanted & set(case.covers)]


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


@functools.cache
def _bank(kind: str) -> RouterBank:
    ids, mask = prompt(8, 12)
    rates = {0: 0.3, 1: 0.4}
    model = tiny(kind, layers=_LAYERS)
    return synthetic_routers(model, ids, rates, attention_mask=mask, exit_threshold=_THRESHOLD)


class Ways:
    """Each way to generate, made when it is first asked for, and kept: what one call leaves behind, the next meets."""

    def __init__(self, kind: str = "rmsnorm-rope-gqa", attention: str = "sdpa", lowering: str = "eager") -> None:
        self.kind, self.attention, self._lowering = kind, attention, lowering
        self._made: dict[tuple[str, str], Generate] = {}
        self._configs: list[PreTrainedConfig] = []
        self.stock = self._new_model()
        self._plain = self._new_model()  # that nobody patches

    def _new_model(self) -> PreTrainedModel:
        model = tiny(self.kind, layers=_LAYERS)
        model.set_attn_implementation(self.attention)
        self._configs.append(model.config)
        return model

    def generate(self, way: str, exits: str) -> Generate:
        """``generate`` of a model of its own."""
        if (way, exits) not in self._made:
            self._made[way, exits] = self._make(way, exits)
        return self._made[way, exits]

    def _make(self, way: str, exits: str) -> Generate:
        model, config = self._new_model(), self._config(exits)
        bank = None if exits == "off" else _bank(self.kind)
        if way == "engine":
            return TIDE(model, bank, config).generate
        compiled = {"backend": "tide", "options": {"router": bank, **config.to_dict()}, "recompile_limit": _GRAPHS}
        if way == "model.compile":
            model.compile(**compiled)
            return model.generate
        return torch.compile(model, **compiled).generate

    def _config(self, exits: str) -> TIDEConfig:
        threshold = 1.0 if exits == "off" else _THRESHOLD
        return TIDEConfig(exit_threshold=threshold, **SETTINGS | {"lowering": self._lowering})

    def expected(self, case: Case, exits: str, batch: int, **kwargs: object) -> Outcome:
        """What stock transformers, or with exits the eager reference, comes to."""
        generate = functools.partial(self.stock.generate, **kwargs)
        if exits == "off":
            return self._run(case, generate, batch)
        with eager_reference(self.stock, _bank(self.kind), self._config(exits)):
            return self._run(case, generate, batch)

    def _verdict(self, case: Case, way: str, exits: str, batch: int, want: Outcome) -> tuple[str, str]:
        """With exits, padding that sees a token counts as one, and whether it sees one may depend on the cache."""
        got = self._run(case, self.generate(way, exits), batch)
        found, why = verdict(got, want)
        if found == WRONG and way == "engine" and exits != "off":
            found, other = verdict(got, self.expected(case, exits, batch, cache_implementation="static"))
            why = why if found == WRONG else f"{other} (with the same cache)".strip()
        return found, why

    def rows(
        self, cases: Sequence[Case], ways: Sequence[str] = WAYS, exits: Sequence[str] = ("off", "synthetic"),
        batches: Sequence[int] = BATCHES,
    ) -> Iterator[Row]:  # fmt: skip
        for case in cases:
            for batch in batches:
                for kind in exits:
                    want = self.expected(case, kind, batch)
                    for way in ways:
                        found = self._verdict(case, way, kind, batch, want)
                        yield Row(case.name, case.covers, way, kind, batch, *found)

    def _run(self, case: Case, generate: Generate, batch: int) -> Outcome:
        setup = Setup(self._plain, *prompt(batch))
        found = outcome(lambda: case.run(generate, setup), setup)
        for config in self._configs:  # transformers leaves it cut where drafting with the first layers fails
            config.num_hidden_layers = _LAYERS
        return found


def examine(model: str, indices: Sequence[int]) -> list[Row]:
    """Some cases, one after another, on the same engines and compiled models."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with torch._dynamo.config.patch(
        fail_on_recompile_limit_hit=True, accumulated_recompile_limit=10_000
    ):  # instead of going on without a compiler
        ways = Ways(**MODELS[model].arguments)
        return [row for index in indices for row in ways.rows([CASES[index]])]


def examine_all(models: Iterable[str], processes: int, chunk: int = 12) -> list[tuple[str, Row]]:
    """Rows with the names of their models."""
    jobs = [
        (model, indices[start : start + chunk])
        for model in models
        for indices in [cases_of(model)]
        for start in range(0, len(indices), chunk)
    ]
    found = []
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = [(model, pool.submit(examine, model, indices)) for model, indices in jobs]
        for model, future in tqdm(futures, desc="cases, by twelve"):
            found += [(model, row) for row in future.result()]
    return found
