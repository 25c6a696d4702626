"""Tune the threshold: what each costs in agreement with the full model, and what it saves.

    python examples/tune_threshold.py
    python examples/tune_threshold.py MODEL --prompts my_prompts.txt

The full model writes a reply to every prompt. Then every threshold reads these replies and predicts each next token
(the same token: it would have gone on like the full model), and writes replies of its own, which are timed. One engine
does it all: another threshold compiles nothing.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from tabulate import tabulate
from transformers import AutoModelForCausalLM, AutoTokenizer

import tide_compile as TIDE
from tide_compile.errors import NoRouterError

PROMPTS = (
    "What is photosynthesis?",
    "Write a Python function that sorts a list.",
    "The three laws of thermodynamics are",
    "The difference between TCP and UDP is",
)


def main(
    model: Annotated[str, typer.Argument(help="Hub name or folder.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    prompts: Annotated[
        Path | None, typer.Option(help="File with a prompt per line; yours, for numbers of use.")
    ] = None,
    thresholds: Annotated[str, typer.Option(help="Separated by commas.")] = "0.95,0.9,0.85,0.8,0.7,0.5",
    tokens: Annotated[int, typer.Option(help="Of a reply.")] = 48,
    texts: Annotated[str, typer.Option(help="To calibrate on: a data set, a .txt or .jsonl file, pydoc.")] = "wikitext",
    samples: Annotated[int, typer.Option(help="Texts to calibrate on.")] = 200,
) -> None:
    llm = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = TIDE.TIDEConfig(exit_threshold=0.85)
    try:
        engine = TIDE.TIDE(llm, config=config)
    except NoRouterError:
        TIDE.calibrate(llm, tokenizer, config, dataset=texts, num_samples=samples)
        engine = TIDE.TIDE(llm, config=config)

    lines = PROMPTS if prompts is None else prompts.read_text().splitlines()
    inputs = [tokenizer(line, return_tensors="pt") for line in lines if line.strip()]
    engine.warmup(max_new_tokens=max(i["input_ids"].shape[1] for i in inputs) + tokens)
    with TIDE.exit_threshold(1.0):
        full = [(i["input_ids"].shape[1], write(engine, i, tokens)) for i in inputs]
        want = [engine(reply).argmax(-1)[:, start - 1 :] for start, reply in full]
    rows = []
    for threshold in (1.0, *map(float, thresholds.split(","))):
        with TIDE.exit_threshold(threshold), TIDE.record_exits() as stats:
            got = [engine(reply).argmax(-1)[:, start - 1 :] for start, reply in full]
            milliseconds = statistics.median(seconds_per_token(engine, i, tokens) for i in inputs) * 1e3
        same = torch.cat([(a == b).flatten() for a, b in zip(got, want, strict=True)]).float().mean().item()
        saved = f"{stats.layers_saved:.0%}"
        rows.append([threshold, f"{stats.exit_rate:.0%}", saved, f"{same:.1%}", f"{milliseconds:.1f}"])
    headers = ["threshold", "tokens that leave", "layers saved", "same next token", "ms per token"]
    print(tabulate(rows, headers, disable_numparse=True))


def write(engine: TIDE.TIDE, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    return engine.generate(**inputs, max_new_tokens=tokens, min_new_tokens=2, do_sample=False)


def seconds_per_token(engine: TIDE.TIDE, inputs: dict[str, torch.Tensor], tokens: int) -> float:
    """Of a reply, its prompt included."""
    started = time.perf_counter()
    output = write(engine, inputs, tokens)
    return (time.perf_counter() - started) / (output.shape[1] - inputs["input_ids"].shape[1])


if __name__ == "__main__":
    typer.run(main)
