"""Existing transformers code: four ways in which it uses a model, and the line that changes in each.

python examples/huggingface_pipeline.py
"""

from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline

import tide_compile as TIDE
from tide_compile.errors import NoRouterError


def main(
    model: Annotated[str, typer.Argument(help="Hub name or folder.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    tokens: Annotated[int, typer.Option(help="New tokens at most, per prompt.")] = 32,
    threshold: Annotated[float | None, typer.Option(help="Exit threshold; default: the routers' own.")] = None,
    texts: Annotated[str, typer.Option(help="To calibrate on: a data set, a .txt or .jsonl file, pydoc.")] = "wikitext",
    samples: Annotated[int, typer.Option(help="Texts to calibrate on.")] = 200,
) -> None:
    llm = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = TIDE.TIDEConfig(exit_threshold=threshold)
    try:
        engine = TIDE.TIDE(llm, config=config)
    except NoRouterError:
        TIDE.calibrate(llm, tokenizer, config, dataset=texts, num_samples=samples)
        engine = TIDE.TIDE(llm, config=config)

    print("--- generate, with a streamer")
    inputs = tokenizer("The moon is", return_tensors="pt")
    # llm.generate(**inputs, ...) becomes
    engine.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=TextStreamer(tokenizer))
    tell(engine)

    print("--- pipeline")
    # pipeline("text-generation", model=llm, ...) becomes
    writer = pipeline("text-generation", model=engine.model, tokenizer=tokenizer)
    print(writer("Three things to pack for a hike:", max_new_tokens=tokens, do_sample=False)[0]["generated_text"])
    tell(engine)

    print("--- logits: which sentence is likelier?")
    for text in ("The cat sat on the mat.", "The cat sat mat the on."):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        # llm(ids).logits becomes
        logits = engine(ids)
        score = -torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item()
        print(f"{score:7.2f}  {text}")
    tell(engine)

    print("--- a batch, padded on the left")
    batch = tokenizer(["Python is", "The internet was first", "Bread"], return_tensors="pt", padding=True)
    # llm.generate(**batch, ...) becomes
    output = engine.generate(**batch, max_new_tokens=tokens, do_sample=False)
    print("\n".join(repr(text) for text in tokenizer.batch_decode(output, skip_special_tokens=True)))
    tell(engine)


def tell(engine: TIDE.TIDE) -> None:
    stats = engine.last_stats
    print(
        f"    {stats.exit_rate:.0%} of {stats.total_tokens} tokens left early, layers saved: {stats.layers_saved:.0%}\n"
    )


if __name__ == "__main__":
    typer.run(main)
