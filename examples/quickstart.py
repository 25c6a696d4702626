"""Quickstart: calibrate a model once, generate with it, see which layers were not needed.

    python examples/quickstart.py
    python examples/quickstart.py Qwen/Qwen2.5-0.5B-Instruct --threshold 0.9

Routers are kept in the router cache, by model: the second run does not calibrate. The first answer takes as long as
compiling does.
"""

from typing import Annotated

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import tide_compile as TIDE
from tide_compile.errors import NoRouterError


def main(
    model: Annotated[str, typer.Argument(help="Hub name or folder.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    prompt: str = "Explain how a bicycle stays upright:",
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    threshold: Annotated[float | None, typer.Option(help="Exit threshold; default: the routers' own.")] = None,
    texts: Annotated[str, typer.Option(help="To calibrate on: a data set, a .txt or .jsonl file, pydoc.")] = "wikitext",
    samples: Annotated[int, typer.Option(help="Texts to calibrate on.")] = 200,
) -> None:
    llm = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = TIDE.TIDEConfig(exit_threshold=threshold)
    try:
        engine = TIDE.TIDE(llm, config=config)
    except NoRouterError:
        TIDE.calibrate(llm, tokenizer, config, dataset=texts, num_samples=samples)
        engine = TIDE.TIDE(llm, config=config)

    inputs = tokenizer(prompt, return_tensors="pt")
    output = engine.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print()
    print(engine.last_stats.summary())


if __name__ == "__main__":
    typer.run(main)
