"""python -m bench.quality: what exits save and what they cost, on prompts that calibration never saw.

Calibrates (or takes the router files of an earlier run), certifies thresholds for each ``--promise`` on texts of
``--data`` that were not used before, and measures on the beginnings of the texts of ``--test``: the certified
thresholds, a frontier of others, and the same for the reference's recipe (cosine label, identity exits, a router that
sees the state only), with its own checkpoints and with these. Nothing is chosen on ``--test``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

from bench.support.models import SMOLLM2, load_model, model_title
from bench.support.report import machine, show
from tide_compile import RouterBank, TIDEConfig
from tide_compile.calibration.calibrate import calibrate
from tide_compile.cli.router_tables import reliability_rows
from tide_compile.files import write_text
from tide_compile.model.decoder import find_decoder
from tide_compile.planning.frontier import Point, measure_point, perplexity
from tide_compile.text.corpus import Corpus, Row
from tide_compile.text.self_text import continue_prompts
from tide_compile.text.sources import calibration_texts
from tide_compile.thresholds.certify import certify
from tide_compile.thresholds.price import prices_for, thresholds_at
from tide_compile.thresholds.sweep import sweep_prices

LEVELS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08)  # of disagreement at first sight, of the frontier
THRESHOLDS = (0.5, 0.85)  # of the reference's recipe
COSINES = (0.7, 0.98)  # that make its label; the first is not its own, but lets tokens leave where none comes so close
HEADERS = ["", "exits by layer, % of tokens", "layers saved", "agreement", "perplexity"]
TEXT_TOKENS = 256
SCREENED = 64  # prompts


def reference_recipe(config: TIDEConfig, min_layers: int, cosine: float) -> TIDEConfig:
    """What tide-inference 0.2.1 does: label, exit and router."""
    return replace(
        config,
        calibration_label="cosine",
        convergence_threshold=cosine,
        exit_strategy="identity",
        router_kind="mlp",
        min_layers=min_layers,
        kv_cache_strategy="zero_pad",
    )


def routers(
    path: Path, model: nn.Module, tokenizer: object, config: TIDEConfig, args: argparse.Namespace
) -> RouterBank:
    """From the file, if an earlier run has left it there."""
    if path.is_file():
        return RouterBank.load(path)
    own = "" if config.calibration_label == "cosine" else "+self"  # the reference reads texts only
    return calibrate(model, tokenizer, config, path, dataset=f"{args.data}{own}", batch_size=16,
                     num_samples=args.samples if own else args.samples // 2)  # fmt: skip


def screened(
    bank: RouterBank, layers: list[int], model: nn.Module, prompts: list[list[int]], tokens: int
) -> RouterBank:
    """The bank with the checkpoints after ``layers`` only, and what their exits do to what the model writes after
    ``prompts``."""
    kept = bank.keep(layers)
    written = continue_prompts(model, prompts, tokens, sample=False)
    rows = [Row(ids, len(prompt), True) for ids, prompt in zip(written, prompts, strict=True)]
    kept.metadata["screen"] = sweep_prices(find_decoder(model), kept, TIDEConfig(), rows)
    return kept


def row(name: str, point: Point) -> list[str]:
    exits = ", ".join(f"{layer}: {share:.1%}" for layer, share in point.exits.items())
    change = f"{point.perplexity - 1:+.1%}"
    return [name, exits, f"{point.layers_saved:.1%}", f"{1 - point.disagreement:.2%}", change]


def quality_table(rows: Sequence[list[str]]) -> str:
    return tabulate(rows, HEADERS, "github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="smollm2, a hub name or a folder")
    parser.add_argument("--data", required=True, help="text file or data set to calibrate and certify on")
    parser.add_argument("--test", required=True, help="text file or data set to measure on")
    parser.add_argument("--routers", type=Path, required=True, help="folder of router files; those found are used")
    parser.add_argument("--samples", type=int, default=800, help="rows of calibration: half text, half the model's own")
    parser.add_argument("--distillation-steps", type=int, default=400)
    parser.add_argument("--min-layers", type=int, default=20)
    parser.add_argument("--checkpoint-interval", type=int, default=4)
    parser.add_argument("--checkpoints", type=int, nargs="*", default=[], help="of the routers; default: all")
    parser.add_argument("--promise", type=float, nargs="*", default=[0.02, 0.05])
    parser.add_argument("--certify-prompts", type=int, default=1000)
    parser.add_argument("--skip", type=int, default=0, help="texts behind those of calibration not to certify on")
    parser.add_argument("--prompts", type=int, default=128, help="to measure on")
    parser.add_argument("--tokens", type=int, default=64, help="generated after each prompt")
    parser.add_argument("--texts", type=int, default=32, help=f"of up to {TEXT_TOKENS} tokens, for the perplexity")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    args.routers.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(args.model)
    config = TIDEConfig(min_layers=args.min_layers, checkpoint_interval=args.checkpoint_interval,
                        distillation_steps=args.distillation_steps)  # fmt: skip
    bank = routers(args.routers / "router.safetensors", model, tokenizer, config, args)
    corpus = Corpus(f"{args.data}+self", model, tokenizer)
    seen = bank.metadata["config"]["calibration_samples"] + 2 * args.skip  # rows: half of them are texts
    of = "".join(f"-{layer}" for layer in args.checkpoints)
    if args.checkpoints:
        path = args.routers / f"router{of}-{args.skip}.safetensors"
        if not path.is_file():
            screened(bank, args.checkpoints, model, corpus.prompts(SCREENED, seen), args.tokens).save(path)
        bank = RouterBank.load(path)
    promised = {}
    for bound in args.promise:
        path = args.routers / f"promise-{bound}{of}-{args.skip}.safetensors"
        if not path.is_file():
            one = replace(bank, metadata=dict(bank.metadata))
            prompts = corpus.prompts(args.certify_prompts, seen + 2 * SCREENED)
            certify(model, one, prompts, bound, config=config, max_new_tokens=args.tokens)
            one.save(path)
        promised[bound] = RouterBank.load(path)

    test = [t for t in calibration_texts(args.test, args.prompts) if t]
    ids = tokenizer(test, truncation=True, max_length=TEXT_TOKENS)["input_ids"]
    prompts, texts = [row[:32] for row in ids], [row for row in ids if len(row) > 1][: args.texts]
    base = perplexity(model, texts)

    def measure_machine(bank: RouterBank, thresholds: dict[int, float], config: TIDEConfig) -> Point:
        return measure_point(model, bank, thresholds, config, prompts, texts=texts, full_perplexity=base,
                             max_new_tokens=args.tokens)  # fmt: skip

    rows, certificates = [], []

    def add(name: str, point: Point) -> None:
        """A row, printed and written at once: the whole takes long."""
        rows.append(row(name, point))
        print(rows[-1], flush=True)
        if args.markdown:
            write_text(args.markdown, document(args, bank, rows, certificates, base, len(prompts), len(texts)))

    for bound, one in promised.items():
        found = one.metadata["certificate"]
        point = measure_machine(one, one.thresholds, config)
        kept = point.disagreement <= bound
        certificates.append(
            [f"{bound:.0%}", found["prompts"], f"{found['measured'] or 0:.2%}", f"{found['layers saved']:.1%}",
             f"{point.disagreement:.2%}", f"{point.layers_saved:.1%}", "yes" if kept else "no"]
        )  # fmt: skip
        add(f"certified: at most {bound:.0%} disagree", point)
    for price in prices_for(bank.metadata["screen"], LEVELS):
        add(f"price {price:.3g}", measure_machine(bank, thresholds_at(price, bank.layers, bank.num_layers), config))
    for layers, cosine in (*((args.min_layers, cosine) for cosine in COSINES), (8, COSINES[-1])):
        recipe = reference_recipe(config, layers, cosine)
        path = args.routers / f"reference-{layers}-{cosine}.safetensors"
        other, name = routers(path, model, tokenizer, recipe, args), f"min_layers {layers}, cosine {cosine}"
        for threshold in THRESHOLDS:
            point = measure_machine(other, dict.fromkeys(other.layers, threshold), recipe)
            add(f"reference's recipe, {name}, threshold {threshold}", point)
    title = f"quality, {args.model}, float32, {len(prompts)} prompts x {args.tokens} greedy tokens"
    show(title, HEADERS, rows, args.json, certificates=certificates, perplexity=base)


def document(
    args: argparse.Namespace, bank: RouterBank, rows: list, certificates: list, base: float, prompts: int, texts: int
) -> str:
    """docs/quality.md."""
    names = {n: Path(getattr(args, n)).name for n in ("data", "test")}
    command = " ".join(
        [
            f"python -m bench.quality --data {names['data']} --test {names['test']} --routers routers",
            f"--samples {args.samples} --certify-prompts {args.certify_prompts} --prompts {args.prompts}",
            f"--tokens {args.tokens} --texts {args.texts} --distillation-steps {args.distillation_steps}",
            f"--min-layers {args.min_layers} --checkpoint-interval {args.checkpoint_interval}",
            *([f"--checkpoints {' '.join(map(str, args.checkpoints))}"] if args.checkpoints else []),
            *([f"--skip {args.skip}"] if args.skip else []),
        ]
    )
    chosen_on = (
        "what the model writes after paragraphs between the two" if args.checkpoints else "held-out calibration tokens"
    )
    promise_headers = ["promise", "prompts", "disagreement there", "layers saved there", f"on {names['test']}",
                       "layers saved", "kept"]  # fmt: skip
    curve_headers, curves = reliability_rows(bank)
    checkpoints = {name: [r.get(name) for r in bank.metadata["table"]] for name in bank.metadata["table"][0]}
    return "\n".join(
        [
            "# What exits save, and what they cost",
            "",
            f"{model_title(args.model)}, {bank.num_layers} layers, float32. {machine()}. Calibrated on {args.samples} "
            f"rows, half paragraphs of {names['data']} (WikiText-2), half the model's own continuations of them; "
            f"certified on paragraphs of {names['data']} that come after those; measured on {prompts} beginnings "
            f"of 32 tokens of paragraphs of {names['test']}, which had no part in anything before, "
            f"{args.tokens} greedy tokens each.",
            "",
            f"    {command}",
            "",
            "Agreement is the share of generated tokens that the full model would have chosen after the same prefix. "
            "Layers saved is the share of layer passes of generated tokens. Perplexity is on the first "
            f"{TEXT_TOKENS} tokens of {texts} of these paragraphs, where prompt tokens leave early, too; the full "
            f"model's is {base:.2f}. A price sets the thresholds of all checkpoints (`tide_compile/screen.py`); prices "
            f"were chosen on {chosen_on}.",
            "",
            quality_table(rows),
            "",
            "## Promises",
            "",
            tabulate(certificates, promise_headers, "github", disable_numparse=True),
            "",
            "## Checkpoints, on held-out calibration tokens",
            "",
            tabulate([[n, *values] for n, values in checkpoints.items()], tablefmt="github", headers=[""] * 2),
            "",
            "Reliability, by score; in a cell: mean score: share that agrees of how many tokens.",
            "",
            tabulate(curves, curve_headers, "github", disable_numparse=True),
            "",
        ]
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.manual_seed(0)
    main()
