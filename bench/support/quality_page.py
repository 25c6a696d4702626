"""quality_page: docs/quality.md, from what ``bench.quality`` has measured so far."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from bench.support.models import model_title
from bench.support.page import markdown_table, page
from bench.support.report import machine
from tide_compile import RouterBank
from tide_compile.cli.router_tables import reliability_rows

HEADERS = ["", "exits by layer, % of tokens", "layers saved", "agreement", "perplexity"]
TEXT_TOKENS = 256  # that the perplexity is of


@dataclass(slots=True)
class Tables:
    """``perplexity`` of the full model, numbers of ``prompts`` and ``texts``, and the rows that are there so far."""

    perplexity: float
    prompts: int
    texts: int
    rows: list[list[str]] = field(default_factory=list)
    certificates: list[list[object]] = field(default_factory=list)


def quality_page(args: argparse.Namespace, bank: RouterBank, tables: Tables) -> str:
    """The page in Markdown. ``args``: of ``bench.quality``."""
    data, test = Path(args.data).name, Path(args.test).name
    chosen_on = (
        "what the model writes after paragraphs between the two" if args.checkpoints else "held-out calibration tokens"
    )
    certificate_headers = ["certified for at most", "prompts", "disagreement there", "layers saved there", f"on {test}",
                           "layers saved", "kept"]  # fmt: skip
    checkpoints = [[name, *(row.get(name) for row in bank.metadata["table"])] for name in bank.metadata["table"][0]]
    curve_headers, curves = reliability_rows(bank)
    return page(
        "What exits save, and what they cost",
        f"{model_title(args.model)}, {bank.num_layers} layers, float32. {machine()}. Calibrated on {args.samples} "
        f"rows, half paragraphs of {data} (WikiText-2), half the model's own continuations of them; "
        f"certified on paragraphs of {data} that come after those; measured on {tables.prompts} beginnings "
        f"of 32 tokens of paragraphs of {test}, which had no part in anything before, "
        f"{args.tokens} greedy tokens each.",
        f"    {_command(args, data, test)}",
        "Agreement is the share of generated tokens that the full model would have chosen after the same prefix. "
        "Layers saved is the share of layer passes of generated tokens. Perplexity is on the first "
        f"{TEXT_TOKENS} tokens of {tables.texts} of these paragraphs, where prompt tokens leave early, too; the full "
        f"model's is {tables.perplexity:.2f}. A price sets the thresholds of all checkpoints "
        f"(`tide_compile/thresholds/price.py`); prices were chosen on {chosen_on}.",
        markdown_table(tables.rows, HEADERS),
        "## Certificates",
        markdown_table(tables.certificates, certificate_headers),
        "## Checkpoints, on held-out calibration tokens",
        markdown_table(checkpoints, [""] * 2, align_numbers=True),
        "Reliability, by score; in a cell: mean score: share that agrees of how many tokens.",
        markdown_table(curves, curve_headers),
    )


def _command(args: argparse.Namespace, data: str, test: str) -> str:
    return " ".join(
        [
            f"python -m bench.quality --data {data} --test {test} --routers routers",
            f"--samples {args.samples} --certify-prompts {args.certify_prompts} --prompts {args.prompts}",
            f"--tokens {args.tokens} --texts {args.texts} --distillation-steps {args.distillation_steps}",
            f"--min-layers {args.min_layers} --checkpoint-interval {args.checkpoint_interval}",
            *([f"--checkpoints {' '.join(map(str, args.checkpoints))}"] if args.checkpoints else []),
            *([f"--skip {args.skip}"] if args.skip else []),
        ]
    )
