"""Any model: nothing is written for a model family; see what is found in one, and what its routers learn.

    python examples/any_model.py openai-community/gpt2
    python examples/any_model.py EleutherAI/pythia-160m --interval 3 --router pythia.safetensors

A model that cannot be served is an error that says why (``docs/families.md`` lists the families).
"""

from typing import Annotated

import typer
from tabulate import tabulate
from transformers import AutoModelForCausalLM, AutoTokenizer

import tide_compile as TIDE
from tide_compile.model.decoder import find_decoder

PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time")


def main(
    model: Annotated[str, typer.Argument(help="Hub name or folder.")] = "openai-community/gpt2",
    tokens: Annotated[int, typer.Option(help="New tokens at most, per prompt.")] = 32,
    threshold: Annotated[float | None, typer.Option(help="Exit threshold; default: the routers' own.")] = None,
    router: Annotated[str, typer.Option(help="File that the routers are written to.")] = "any_model.safetensors",
    interval: Annotated[int, typer.Option(help="Layers between checkpoints.")] = 4,
    texts: Annotated[str, typer.Option(help="To calibrate on: a data set, a .txt or .jsonl file, pydoc.")] = "wikitext",
    samples: Annotated[int, typer.Option(help="Texts to calibrate on.")] = 100,
) -> None:
    llm = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    decoder = find_decoder(llm)
    norm = "none" if decoder.norm is None else type(decoder.norm).__name__
    print(
        f"{type(llm).__name__}: {len(decoder.layers)} layers at {decoder.path}, width {decoder.hidden_dim}, norm {norm}"
    )

    config = TIDE.TIDEConfig(exit_threshold=threshold, checkpoint_interval=interval, min_layers=interval)
    bank = TIDE.calibrate(llm, tokenizer, config, save_path=router, dataset=texts, num_samples=samples)
    print(tabulate(bank.metadata["table"], "keys"))

    engine = TIDE.TIDE(llm, router, config)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = engine.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        print(f"\n{tokenizer.decode(output[0], skip_special_tokens=True)}")
        print(f"  {engine.last_stats.exit_rate:.0%} of the tokens left early")
    print(f"\n{engine.stats.summary()}")


if __name__ == "__main__":
    typer.run(main)
