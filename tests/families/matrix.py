"""python -m tests.families.matrix: tide against the eager reference on every causal language model of transformers.

Each family is built tiny with random weights and run on two rows, one of them padded on the left: a prompt, then four
decoded tokens with a static cache; where the model or tide cannot do that, with a dynamic cache or the model's own,
else without, and the reason is told. Tide without exits must give the stock model's logits. With some and with all
tokens leaving early, every token must leave after the layer after which it leaves in the eager reference, and the
logits must be equal. Graphs are interpreted (``lowering="eager"``): what differs between families is in the graph, not
in Inductor.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from tabulate import tabulate
from torch._dynamo.exc import FailOnRecompileLimitHit as RecompileError
from tqdm import tqdm
from transformers import PreTrainedModel

from bench.support.report import machine
from tests.families.configs import build, names
from tests.support.compare import assert_close, check_each, threshold_between
from tests.support.models import SETTINGS, logits_of
from tide_compile import RouterBank
from tide_compile.errors import TideError
from tide_compile.files import write_text
from tide_compile.model.decoder import find_decoder

PASS, REFUSED, NOT_BUILT, WRONG = "pass", "named error", "not built", "WRONG"
BEST_FIRST = ("static", "dynamic", "own", "none")


@dataclass(slots=True)
class Row:
    """What was seen of a family; ``cache`` is the best one that it ran with."""

    family: str
    model: str = ""
    layers: int = 0
    cache: str = ""
    verdict: str = NOT_BUILT
    why: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        return [self.family, self.model, str(self.layers or ""), self.cache, self.verdict, "; ".join(self.why)]


def examine(family: str) -> Row:
    """Build a family and compare everything with the eager reference; never raises."""
    torch.set_num_threads(1)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # instead of going on without a compiler
    transformers.logging.set_verbosity_error()
    row = Row(family)
    try:
        model = build(family)
        row.model = type(model).__name__
        logits_of(model, model, "none", 2)
    except Exception as error:
        row.why.append(f"stock model: {_said(error)}")
        return row
    try:
        decoder = find_decoder(model)
    except TideError as error:
        row.verdict = REFUSED
        row.why.append(_said(error))
        return row
    row.layers = len(decoder.layers)
    idle = len(model.get_submodule(decoder.path)) - row.layers
    if idle:
        row.why.append(f"{idle} further layers run only with other inputs than text")
    config = model.config.get_text_config(decoder=True)
    expected = {getattr(config, name, None) for name in ("num_hidden_layers", "num_layers")} - {None}
    if row.layers + idle not in expected:
        row.verdict = WRONG
        row.why.append(f"{row.layers} layers found, the config says {sorted(expected)}")
        return row
    bank = RouterBank.untrained(decoder.hidden_dim, row.layers, bottleneck_dim=16)
    padding = 3 if _heeds_the_mask(model) else 0
    if not padding:
        row.why.append("takes no heed of attention_mask, so run without padding")
    reasons: dict[str, list[str]] = {}
    for cache in BEST_FIRST:
        row.verdict, reason = _compare(model, bank, cache, padding)
        if row.verdict not in (PASS, WRONG) and cache == "static" and not model._can_compile_fullgraph:
            reason = "the class says that it does not support it (_can_compile_fullgraph)"
        if reason:
            reasons.setdefault(reason, []).append(cache)
        if row.verdict in (PASS, WRONG):
            row.cache = cache
            break
    row.why += [f"{', '.join(caches)} cache: {reason}" for reason, caches in reasons.items()]
    return row


def _compare(model: PreTrainedModel, bank: RouterBank, cache: str, padding: int) -> tuple[str, str]:
    try:
        stock = logits_of(model, model, cache, 2, padding=padding)
    except Exception as error:
        return NOT_BUILT, f"stock model: {_said(error)}"
    try:
        try:
            _compare_with(model, bank, cache, padding, stock, fullgraph=True)
        except torch._dynamo.exc.TorchDynamoException as error:
            if isinstance(error, TideError):
                raise
            _compare_with(model, bank, cache, padding, stock, fullgraph=False)
    except Exception as error:
        return (REFUSED if isinstance(error, TideError | RecompileError) else WRONG), _said(error)
    return PASS, ""


def _compare_with(
    model: PreTrainedModel, bank: RouterBank, cache: str, padding: int, stock: list[torch.Tensor], fullgraph: bool
) -> None:
    torch._dynamo.reset()  # each comparison has all of Dynamo's limit of recompilations
    options = {"exit_threshold": 1.0, "lowering": "eager"}
    off = torch.compile(model, backend="tide", options=options, fullgraph=fullgraph)
    for ours, theirs in zip(logits_of(model, off, cache, 2, padding=padding), stock, strict=True):
        assert_close(ours, theirs)
    some = threshold_between(model, bank, 0.4, cache, 2, padding, **SETTINGS)
    torch._dynamo.reset()
    stats = check_each(model, bank, cache, 2, [some, 0.0], fullgraph, padding, **SETTINGS)
    for rate, low, high in ((stats[0].exit_rate, 0.01, 0.99), (stats[1].exit_rate, 1, 1)):
        assert low <= rate <= high, f"exit rate {rate}, expected {low} to {high}"


@torch.no_grad()
def _heeds_the_mask(model: PreTrainedModel) -> bool:
    """Whether a masked first token changes what the model says; otherwise it takes padding for text."""
    ids = torch.arange(3, 9).unsqueeze(0)
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    return not torch.equal(
        model(ids, attention_mask=mask, use_cache=False).logits[:, -1], model(ids, use_cache=False).logits[:, -1]
    )


def _said(error: Exception) -> str:
    """The kind of an error and its first sentence."""
    text = re.sub(r"0x[0-9a-f]+", "0x...", " ".join(str(error).split()).replace("|", "/"))
    return f"{type(error).__name__}: {re.split(r'(?<=[a-z])[.:] (?=[A-Z])', text)[0][:200]}"


def _compact(compaction: str) -> None:
    """Set for this process what happens to rows that have left."""
    SETTINGS.update(compaction=compaction)


def examine_all(families: list[str], processes: int, path: Path | None, compaction: str = "auto") -> list[Row]:
    """``examine`` in some processes at a time, each used for ten families.

    Rows are printed and appended to the file ``path`` (JSON lines) as they come; a family that is there already is not
    run again, so a run that was cut short goes on where it was.
    """
    known = {}
    if path is not None and path.is_file():
        known = {row.family: row for row in (Row(**json.loads(line)) for line in path.read_text().splitlines())}
    left = [family for family in families if family not in known]
    with get_context("spawn").Pool(processes, _compact, (compaction,), maxtasksperchild=10) as pool:
        for row in tqdm(pool.imap_unordered(examine, left), total=len(left), unit="family", disable=None):
            known[row.family] = row
            tqdm.write("  ".join(filter(None, row.cells())))
            if path is not None:
                with path.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
    return [known[family] for family in families]


def summary(rows: list[Row]) -> str:
    """The counts, in words."""
    counts = Counter(r.verdict for r in rows)
    built = len(rows) - counts[NOT_BUILT]
    share = f"{counts[PASS] / built:.0%}" if built else "none"
    return (
        f"{built} of {len(rows)} can be built tiny from their config: {counts[PASS]} pass ({share}), "
        f"{counts[REFUSED]} are refused with a named error, {counts[WRONG]} are wrong."
    )


def write_markdown(rows: list[Row], path: Path, command: str) -> None:
    """The matrix as a page of documentation, written at once or not at all."""
    headers = ["family", "class", "layers", "cache", "result", "remarks"]
    table = tabulate(
        [r.cells() for r in rows], headers=headers, tablefmt="github", disable_numparse=True, stralign=None
    )
    title, about = __doc__.split(":", 1)[1].strip().split("\n\n", 1)
    text = f"# Families: {title}\n\n{about}\n\n`{command}` on {machine()}.\n\n{summary(rows)}\n\n{table}\n"
    write_text(path, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types (default: all)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=Path, help="keep results in this file (JSON lines) and do not run those in it")
    parser.add_argument("--markdown", type=Path, help="write the matrix to this file")
    parser.add_argument("--compaction", default="auto", choices=["auto", "always", "never"], help="see TIDEConfig")
    arguments = parser.parse_args()
    rows = examine_all(arguments.families or names(), arguments.processes, arguments.rows, arguments.compaction)
    print(f"\n{machine()}\n{summary(rows)}")
    if arguments.markdown:
        write_markdown(rows, arguments.markdown, "python -m tests.families.matrix --markdown docs/families.md")


if __name__ == "__main__":
    main()
