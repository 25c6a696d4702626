"""python -m bench.quality: what exits save and what they cost, on prompts that calibration never saw.

Calibrates (or takes the router files of an earlier run), certifies thresholds for each ``--bounds`` on texts of
``--data`` that were not used before, and measures on the beginnings of the texts of ``--test``: the certified
thresholds, a frontier of others, and the same for the reference's recipe (cosine label, identity exits, a router that
sees the state only), with its own checkpoints and with these. Nothing is chosen on ``--test``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from bench.support.models import SMOLLM2, load_model
from bench.support.quality_page import HEADERS, TEXT_TOKENS, Tables, quality_page
from bench.support.report import show
from tide_compile import RouterBank, TIDEConfig, calibrate
from tide_compile.files import write_text
from tide_compile.model.decoder import find_decoder
from tide_compile.planning.frontier import Point, measure_point, perplexity
from tide_compile.text.corpus import Corpus, Row
from tide_compile.text.self_text import continue_prompts
from tide_compile.text.sources import calibration_texts
from tide_compile.thresholds.certify import CERTIFICATE, certify
from tide_compile.thresholds.price import prices_for, thresholds_at
from tide_compile.thresholds.sweep import sweep_prices

LEVELS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08)  # of disagreement at first sight, of the frontier
THRESHOLDS = (0.5, 0.85)  # of the reference's recipe
COSINES = (0.7, 0.98)  # that make its label; the first is not its own, but lets tokens leave where none comes so close
PROMPT_TOKENS = 32
SWEPT = 64  # prompts


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured, and as what is asked for."""

    model: nn.Module
    tokenizer: object
    config: TIDEConfig
    args: argparse.Namespace


@dataclass(frozen=True, slots=True)
class Contender:
    """``bound``: of disagreement, that the bank's thresholds are certified for; None: they are not."""

    name: str
    bank: RouterBank
    thresholds: dict[int, float]
    config: TIDEConfig
    bound: float | None = None


@dataclass(frozen=True, slots=True)
class HeldOut:
    """``prompts`` to generate after, ``texts`` for the perplexity (token ids), and the full model's perplexity."""

    prompts: list[list[int]]
    texts: list[list[int]]
    perplexity: float


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


def routers(subject: Subject, config: TIDEConfig, name: str) -> RouterBank:
    """From the file of this name, if an earlier run has left it there."""
    args, path = subject.args, subject.args.routers / name
    if path.is_file():
        return RouterBank.load(path)
    own = "" if config.calibration_label == "cosine" else "+self"  # the reference reads texts only
    return calibrate(subject.model, subject.tokenizer, config, path, dataset=f"{args.data}{own}", batch_size=16,
                     num_samples=args.samples if own else args.samples // 2)  # fmt: skip


def with_checkpoints(subject: Subject, bank: RouterBank, corpus: Corpus, seen: int) -> RouterBank:
    """The bank with the checkpoints that are asked for only, swept on what the model writes after prompts that nothing
    has read: rows of the corpus behind the first ``seen``. Kept in a file, too."""
    layers, path = subject.args.checkpoints, subject.args.routers / f"router{_suffix(subject.args)}.safetensors"
    if not path.is_file():
        kept, prompts = bank.keep(layers), corpus.prompts(SWEPT, seen)
        written = continue_prompts(subject.model, prompts, subject.args.tokens, sample=False)
        rows = [Row(ids, len(prompt), True) for ids, prompt in zip(written, prompts, strict=True)]
        kept.metadata["screen"] = sweep_prices(find_decoder(subject.model), kept, TIDEConfig(), rows)
        kept.save(path)
    return RouterBank.load(path)


def certified(subject: Subject, bank: RouterBank, corpus: Corpus, seen: int) -> dict[float, RouterBank]:
    """By bound, the bank with thresholds that keep it, certified on rows behind those of the sweep."""
    args, found = subject.args, {}
    for bound in args.bounds:
        path = args.routers / f"certified-{bound}{_suffix(args)}.safetensors"
        if not path.is_file():
            one = replace(bank, metadata=dict(bank.metadata))
            prompts = corpus.prompts(args.certify_prompts, seen + 2 * SWEPT)
            certify(subject.model, one, prompts, bound, config=subject.config, max_new_tokens=args.tokens)
            one.save(path)
        found[bound] = RouterBank.load(path)
    return found


def _suffix(args: argparse.Namespace) -> str:
    """Of the files of a run: which checkpoints, and which texts were passed over."""
    return "".join(f"-{layer}" for layer in args.checkpoints) + f"-{args.skip}"


def held_out(subject: Subject) -> HeldOut:
    args = subject.args
    test = [t for t in calibration_texts(args.test, args.prompts) if t]
    ids = subject.tokenizer(test, truncation=True, max_length=TEXT_TOKENS)["input_ids"]
    texts = [row for row in ids if len(row) > 1][: args.texts]
    return HeldOut([row[:PROMPT_TOKENS] for row in ids], texts, perplexity(subject.model, texts))


def contenders(subject: Subject, bank: RouterBank, certified: Mapping[float, RouterBank]) -> Iterator[Contender]:
    """Certified thresholds, a frontier, and the reference's recipe, whose routers are made when it is their turn."""
    config, least = subject.config, subject.args.min_layers
    for bound, one in certified.items():
        yield Contender(f"certified: at most {bound:.0%} disagree", one, one.thresholds, config, bound)
    for price in prices_for(bank.metadata["screen"], LEVELS):
        yield Contender(f"price {price:.3g}", bank, thresholds_at(price, bank.layers, bank.num_layers), config)
    for layers, cosine in (*((least, cosine) for cosine in COSINES), (8, COSINES[-1])):
        recipe = reference_recipe(config, layers, cosine)
        other = routers(subject, recipe, f"reference-{layers}-{cosine}.safetensors")
        for threshold in THRESHOLDS:
            name = f"reference's recipe, min_layers {layers}, cosine {cosine}, threshold {threshold}"
            yield Contender(name, other, dict.fromkeys(other.layers, threshold), recipe)


def quality_row(name: str, point: Point) -> list[str]:
    exits = ", ".join(f"{layer}: {share:.1%}" for layer, share in point.exits.items())
    change = f"{point.perplexity - 1:+.1%}"
    return [name, exits, f"{point.layers_saved:.1%}", f"{1 - point.disagreement:.2%}", change]


def certificate_row(contender: Contender, point: Point) -> list[object]:
    """What was certified, and what came out on other texts."""
    bound, found = contender.bound, contender.bank.metadata[CERTIFICATE]
    return [
        f"{bound:.0%}", found["prompts"], f"{found['measured'] or 0:.2%}", f"{found['layers saved']:.1%}",
        f"{point.disagreement:.2%}", f"{point.layers_saved:.1%}", "yes" if point.disagreement <= bound else "no",
    ]  # fmt: skip


def measure(subject: Subject, bank: RouterBank, candidates: Iterable[Contender], test: HeldOut) -> Tables:
    """Rows are printed and written at once: the whole takes long."""
    args, tables = subject.args, Tables(test.perplexity, len(test.prompts), len(test.texts))
    for contender in candidates:
        point = measure_point(
            subject.model, contender.bank, contender.thresholds, contender.config, test.prompts, texts=test.texts,
            full_perplexity=test.perplexity, max_new_tokens=args.tokens,
        )  # fmt: skip
        if contender.bound is not None:
            tables.certificates.append(certificate_row(contender, point))
        tables.rows.append(quality_row(contender.name, point))
        print(tables.rows[-1], flush=True)
        if args.markdown:
            write_text(args.markdown, quality_page(args, bank, tables))
    return tables


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
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
    parser.add_argument("--bounds", metavar="BOUND", type=float, nargs="*", default=[0.02, 0.05],
                        help="of disagreement to certify")  # fmt: skip
    parser.add_argument("--certify-prompts", type=int, default=1000)
    parser.add_argument("--skip", type=int, default=0, help="texts behind those of calibration not to certify on")
    parser.add_argument("--prompts", type=int, default=128, help="to measure on")
    parser.add_argument("--tokens", type=int, default=64, help="generated after each prompt")
    parser.add_argument("--texts", type=int, default=32, help=f"of up to {TEXT_TOKENS} tokens, for the perplexity")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--json", help="also write the results to this file")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    args.routers.mkdir(parents=True, exist_ok=True)
    config = TIDEConfig(min_layers=args.min_layers, checkpoint_interval=args.checkpoint_interval,
                        distillation_steps=args.distillation_steps)  # fmt: skip
    subject = Subject(*load_model(args.model), config, args)
    bank = routers(subject, config, "router.safetensors")
    corpus = Corpus(f"{args.data}+self", subject.model, subject.tokenizer)
    seen = bank.metadata["config"]["calibration_samples"] + 2 * args.skip  # rows: half of them are texts
    if args.checkpoints:
        bank = with_checkpoints(subject, bank, corpus, seen)
    kept = certified(subject, bank, corpus, seen)
    test = held_out(subject)
    tables = measure(subject, bank, contenders(subject, bank, kept), test)
    title = f"quality, {args.model}, float32, {len(test.prompts)} prompts x {args.tokens} greedy tokens"
    show(title, HEADERS, tables.rows, args.json, certificates=tables.certificates, perplexity=test.perplexity)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.manual_seed(0)
    main()
