"""``tide inspect``: what a router file holds, or what the compiler does with a model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from transformers import BatchEncoding
from transformers.generation.streamers import BaseStreamer

from tide_compile.cli.check_inputs import check_dtype, check_folder, check_router, room_for
from tide_compile.cli.model_inputs import encode, find_bank_maybe
from tide_compile.cli.output import console, print_json, size_of, working
from tide_compile.cli.router_tables import checkpoint_table, reliability_rows
from tide_compile.config import TIDEConfig
from tide_compile.files import user_path
from tide_compile.generation.engine import TIDE
from tide_compile.inspection.explain import explain
from tide_compile.inspection.graph_dump import CONTENTS, INDEX, GraphDump, dump
from tide_compile.model.loading import load_config, load_model, load_tokenizer
from tide_compile.routers.bank import RouterBank
from tide_compile.runtime.exit_stats import ExitStats, record_exits
from tide_compile.runtime.piece_times import Times, record_times
from tide_compile.thresholds.certify import CERTIFICATE

_ROUTER_FILES = (".safetensors", ".pt", ".pth")
_TOKENS = 24  # decoded for the picture
_ROUNDS = 3  # of the prompt and of these tokens


def inspect_path(
    name: str, *, router: str | None, threshold: float | None, prompt: str, dtype: str, folder: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Look at a router file or at a model."""
    path = user_path(name)
    if path.suffix in _ROUTER_FILES or (path.suffix != ".gguf" and path.is_file()):
        inspect_router(path, as_json)
    else:
        inspect_model(name, router, threshold, prompt, dtype, folder, as_json)


def inspect_router(path: Path, as_json: bool) -> None:
    """What a router file is, for which model, its checkpoints, thresholds and certificate."""
    bank = RouterBank.load(path)
    facts = {
        "file": str(path), "bytes": path.stat().st_size, "fingerprint": bank.fingerprint or "none: fits any model",
        "num_layers": bank.num_layers, "hidden_size": bank.hidden_dim, "exit_strategy": bank.exit_strategy,
        "checkpoints": bank.layers,
    }  # fmt: skip
    if as_json:
        print_json({**facts, "thresholds": bank.thresholds, **bank.metadata})
        return
    shown = {**facts, "bytes": size_of(facts["bytes"])}
    shown |= {n: bank.metadata[n] for n in ("data", "texts", "tokens", "date") if n in bank.metadata}
    if not bank.thresholds:
        shown["thresholds"] = "none of its own: exit_threshold, or its default, holds at every checkpoint"
    console().print(_grid(shown))
    console().print(checkpoint_table(bank))
    headers, rows = reliability_rows(bank)
    if rows:
        table = Table(*headers, title="reliability (mean score: share that agrees of tokens)")
        for row in rows:
            table.add_row(*row)
        console().print(table)
    certificate = bank.metadata.get(CERTIFICATE)
    if isinstance(certificate, dict):
        trials = [
            f"{t['disagreement']:.2%} disagree, {t['layers saved']:.1%} of the layers saved, p = {t['p']:.2g}"
            for t in certificate["trials"]
        ]
        console().print(_grid({**certificate, "trials": "\n".join(trials)}, title="certificate"))


def inspect_model(
    name: str, router: str | None, threshold: float | None, prompt: str, dtype: str, folder: Path | None, as_json: bool
) -> None:
    """What the passes do with a model's graph; with ``folder``, compile it and write the dump."""
    chosen = check_dtype(dtype)
    check_folder("--dump", folder)
    check_router(router)
    with working(f"loading {name}"):
        config, tokenizer = load_config(name), load_tokenizer(name)
        inputs = encode(tokenizer, [prompt], chat=False)
        room_for(config, inputs["input_ids"].shape[1], _TOKENS)
        model = load_model(name, chosen)
        inputs = inputs.to(model.device)
        bank = None if threshold == 1 else find_bank_maybe(router, model)
    options = {"exit_threshold": threshold, "router": bank}
    found = explain(model, **inputs, options=options)
    written = [] if folder is None else write_dump(model, bank, threshold, inputs, folder)
    if as_json:
        print_json({"model": name, "dump": [str(d.folder) for d in written], **found.to_dict()})
        return
    console().print(f"{type(model).__name__}, {found}", markup=False, soft_wrap=True)
    for path in [*([folder / CONTENTS] if written else []), *(one.folder / INDEX for one in written)]:
        console().print(f"dump: {path}", markup=False, soft_wrap=True)


def write_dump(
    model: torch.nn.Module, bank: RouterBank | None, threshold: float | None, inputs: BatchEncoding, folder: Path
) -> list[GraphDump]:
    """Compile a prompt and decoding under ``dump``, then run them once more for the exits and times in the pictures."""
    engine = TIDE(model, bank, TIDEConfig(exit_threshold=1.0 if bank is None else threshold))
    arguments = {**inputs, "do_sample": False, "min_new_tokens": _TOKENS, "max_new_tokens": _TOKENS}
    with working("compiling"), dump(folder) as dumps:
        engine.generate(**arguments)
    with working("measuring"):
        rounds = [_ByPart() for _ in range(_ROUNDS)]
        for parts in rounds:
            engine.generate(**arguments, streamer=parts)
    for one in dumps:
        if one.report.error is None:
            part = "decoding" if one.report.shape[1] == "1" else "prompt"
            stats, times = rounds[0].measured[part][0], Times()
            for parts in rounds:
                for piece, seconds in parts.measured[part][1].seconds.items():
                    times.seconds.setdefault(piece, []).extend(seconds)
            one.draw(stats=stats, times=times, title=f"{type(model).__name__}: {part}")
    return dumps


class _ByPart(BaseStreamer):
    """Records exits and times of the prompt, and of decoding, apart from each other: ``generate`` hands on the prompt's
    ids before it runs it, and the first token after that."""

    def __init__(self) -> None:
        self.measured: dict[str, tuple[ExitStats, Times]] = {}
        self._stack = ExitStack()

    def put(self, value: Tensor) -> None:
        if len(self.measured) < 2:
            self._stack.close()
            both = self._stack.enter_context(record_exits()), self._stack.enter_context(record_times())
            self.measured["decoding" if self.measured else "prompt"] = both

    def end(self) -> None:
        self._stack.close()


def _grid(facts: dict[str, object], title: str | None = None) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in facts.items():
        if isinstance(value, dict):
            value = [f"{n}: {v}" for n, v in value.items()]
        table.add_row(name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    return table
