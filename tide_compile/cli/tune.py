"""``tide tune``: what can be had for which disagreement, and one point of it recommended."""

from __future__ import annotations

import importlib.util
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tide_compile.cli.check_inputs import check_data, check_device, check_dtype, check_files, check_router
from tide_compile.cli.frontier_report import Findings, draw_frontier, findings_record, show_frontier
from tide_compile.cli.output import notes, print_json, working
from tide_compile.config import TIDEConfig
from tide_compile.errors import ConfigError
from tide_compile.model.loading import load_model, load_tokenizer
from tide_compile.planning.choose_checkpoints import LEVELS
from tide_compile.planning.forecast import find_device, predict_costs
from tide_compile.planning.frontier import find_frontier, recommend, save_point, time_point
from tide_compile.planning.token_costs import TokenCosts, measure_costs
from tide_compile.planning.tuning_data import perplexity_texts, tuning_data
from tide_compile.routers.bank import RouterBank
from tide_compile.routers.lookup import resolve_bank
from tide_compile.text.corpus import Corpus

_NEAR = (0.6, 0.8, 1.0)  # of the disagreement that is asked for: levels beside the usual ones


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for, by the options of the command.

    Attributes:
        device: to predict for; None: this machine, which is timed.
        prompts: how many; every second one chooses candidates, the others measure.
        plot, save: files to write, if given.
    """

    model: str
    router: str | None
    device: str | None
    data: str | None
    prompts: int
    max_new_tokens: int
    chat: bool
    max_disagreement: float | None
    min_speedup: float | None
    plot: Path | None
    save: Path | None
    dtype: str

    @property
    def levels(self) -> tuple[float, ...]:
        """Of disagreement, at first sight."""
        most = self.max_disagreement
        return LEVELS if most is None else (*LEVELS, *(most * part for part in _NEAR))


@dataclass(frozen=True, slots=True)
class Texts:
    """``prompts`` to generate after and ``texts`` for the perplexity, as token ids; ``source`` names where they are
    from."""

    source: str
    prompts: list[list[int]]
    texts: list[list[int]]


def tune_model(asked: Asked, as_json: bool) -> bool:
    """Print the frontier and the recommendation, for this machine or, predicted, for a ``device``. Returns whether
    there is a point that was asked for."""
    dtype = _check(asked)
    with working(f"loading {asked.model}"):
        model, tokenizer = load_model(asked.model, dtype), load_tokenizer(asked.model)
        bank = resolve_bank(asked.router, model)
    read = _read(asked, model, tokenizer, bank)
    found = _find(asked, model, bank, read, progress=not as_json)
    written = _write(asked, bank, found)
    if as_json:
        print_json({"model": asked.model, **findings_record(found), **written})
        return found.best is not None
    show_frontier(found)
    for path in filter(None, written.values()):
        notes().print(f"written: {path}", style="dim", markup=False)
    return found.best is not None


def _check(asked: Asked) -> torch.dtype:
    """Before anything takes long; returns the dtype."""
    if asked.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'tide-compile[plot]'.")
    if asked.prompts < 2:
        raise ConfigError("--prompts must be at least 2: half of them choose candidates, the others measure.")
    dtype = check_dtype(asked.dtype)
    check_device(asked.device, dtype)
    check_files(plot=asked.plot, save=asked.save)
    check_router(asked.router)
    if asked.data is not None:
        check_data(asked.data, asked.prompts)
    return dtype


def _read(asked: Asked, model: nn.Module, tokenizer: object, bank: RouterBank) -> Texts:
    source, skip = tuning_data(bank, asked.data)
    corpus = Corpus(source, model, tokenizer, chat=asked.chat)
    with working("reading prompts"):
        read = Texts(source, corpus.prompts(asked.prompts, skip), perplexity_texts(source, tokenizer))
    if len(read.prompts) < 2:
        raise ConfigError(
            f"{source!r} holds {len(read.prompts)} texts after those of the calibration: give other --data."
        )
    return read


def _find(asked: Asked, model: nn.Module, bank: RouterBank, read: Texts, progress: bool) -> Findings:
    """The frontier, its recommended point, and the speed of that as it will be used."""
    config = TIDEConfig()
    costs = _costs(asked, model, bank, config, read.prompts)
    points = find_frontier(model, bank, config, read.prompts, costs, texts=read.texts, levels=asked.levels,
                           max_new_tokens=asked.max_new_tokens, progress=progress)  # fmt: skip
    best, timed = recommend(points, asked.max_disagreement, asked.min_speedup), None
    if best is not None and asked.device is None:
        with working("compiling and timing the recommended point"):
            timed = time_point(model, bank, best, read.prompts[1])
    dropped = [layer for layer in bank.layers if not any(layer in p.thresholds for p in points)]
    return Findings(asked.device, asked.dtype, read.source, len(read.prompts), asked.max_new_tokens, costs, dropped,
                    points, best, timed)  # fmt: skip


def _costs(
    asked: Asked, model: nn.Module, bank: RouterBank, config: TIDEConfig, prompts: list[list[int]]
) -> TokenCosts:
    """Of a token: measured here, or predicted in the middle of a reply."""
    if asked.device is None:
        with working("compiling and timing tokens by the layer that they leave after"):
            return measure_costs(model, bank, config, prompts[0])
    with working("tracing the model"):
        device = find_device(asked.device, model.dtype, model.config)
        context = round(statistics.median(map(len, prompts))) + asked.max_new_tokens // 2
        return predict_costs(model, bank, config, device, context)


def _write(asked: Asked, bank: RouterBank, found: Findings) -> dict[str, Path | None]:
    """The files that were asked for, by what they are; routers are not written where no point is recommended."""
    saved = None if found.best is None else asked.save
    if saved is not None:
        save_point(bank, found.best, saved, asked.device)
    if asked.plot is not None:
        draw_frontier(found, asked.plot, Path(asked.model).name)
    return {"saved": saved, "plot": asked.plot}
