"""python -m bench.dtypes: a real model in every dtype and quantisation that people load models in.

For each: calibrate on text that comes with Python, compile with Inductor, run a prompt and then some tokens with a
static cache, and compare with the eager reference on the same tokens: the share of tokens that leave after the same
layer, and the largest difference of the logits relative to the largest logit, up to the first token whose layer
differs (the caches differ from there on). Beside it, as the measure of what the dtype allows, the same figure for stock
Inductor without exits against the eager model. SmolLM2 comes as a GGUF file, dequantised on loading. Quantised weights
are torchao's (int8 weight-only; int4 weight-only with its CPU kernels).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn
from transformers import StaticCache

import tide_compile
from bench.support.models import SMOLLM2, load_model
from bench.support.report import show, timed
from tide_compile import RouterBank, TIDEConfig

PROMPT = "The history of the city begins with a small settlement on the river, where"


def int8(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), _in_layers)
    return model


def int4(model: nn.Module) -> nn.Module:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=64, set_inductor_config=False), _in_layers)
    return model


def _in_layers(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "layers" in name


KINDS: dict[str, tuple[torch.dtype, Callable[[nn.Module], nn.Module] | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "int8": (torch.bfloat16, int8),
    "int4": (torch.bfloat16, int4),
}


@torch.no_grad()
def run(model: nn.Module, call: Callable, ids: torch.Tensor, prompt: int) -> list[torch.Tensor]:
    """Logits [1, S, V] of the prompt, then of each token after it."""
    cache = StaticCache(config=model.config, max_cache_len=128)
    steps = [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]
    return [call(step, past_key_values=cache).logits for step in steps]


def measure(model: nn.Module, bank: RouterBank, config: TIDEConfig, ids: torch.Tensor, prompt: int) -> list[str]:
    with tide_compile.eager_reference(model, bank, config) as reference:
        want = run(model, model, ids, prompt)
    torch._dynamo.reset()
    options = {"router": bank, **config.to_dict()}
    compiled = torch.compile(model, backend="tide", options=options, fullgraph=True)
    cold = timed(lambda: run(model, compiled, ids, prompt))
    with tide_compile.record_exits(per_token=True) as stats:
        got = run(model, compiled, ids, prompt)
    calls = [(a == b).float().mean().item() for a, b in zip(stats.exit_layers, reference.exit_layers, strict=True)]
    tokens = [len(e.flatten()) for e in stats.exit_layers]
    same = sum(c * n for c, n in zip(calls, tokens, strict=True)) / sum(tokens)
    alike = next((i for i, c in enumerate(calls) if c < 1), len(calls))
    torch._dynamo.reset()
    stock = distance(run(model, torch.compile(model), ids, prompt), run(model, model, ids, prompt))
    ours = distance(got[:alike], want[:alike])
    return [f"{stats.exit_rate:.0%}", f"{stats.mean_depth:.1f}", f"{same:.1%}", ours, stock, f"{cold:.0f}"]


def distance(got: list[torch.Tensor], want: list[torch.Tensor]) -> str:
    """The largest difference of two runs' logits relative to the largest logit."""
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True)]
    return f"{max(errors):.1e}" if errors else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--model", default=SMOLLM2, help="smollm2, a hub name or a folder")
    parser.add_argument("--texts", type=int, default=10, help="calibration texts")
    parser.add_argument("--tokens", type=int, default=32, help="tokens after the prompt")
    parser.add_argument("--json", help="write the table to this file")
    args = parser.parse_args()

    rows = []
    for kind in args.kinds or KINDS:
        dtype, quantise = KINDS[kind]
        model, tokenizer = load_model(args.model, dtype)
        if quantise is not None:
            model = quantise(model)
        config = TIDEConfig(
            exit_threshold=0.5, min_layers=10, checkpoint_interval=10, calibration_dataset="pydoc",
            calibration_samples=args.texts,
        )  # fmt: skip
        banks: list[RouterBank] = []
        seconds = timed(lambda m=model, t=tokenizer, c=config, b=banks: b.append(tide_compile.calibrate(m, t, c)))
        prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
        ids = model.generate(prompt, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False)
        rows.append([kind, f"{seconds:.0f}", *measure(model, banks[0], config, ids, prompt.shape[1])])
        print(rows[-1], flush=True)
    headers = ["weights", "calibrate s", "exits", "mean depth", "same layer", "logits error", "stock error", "cold s"]
    show(f"{args.model}, {args.tokens} tokens after the prompt, against the eager reference", headers, rows, args.json)


if __name__ == "__main__":
    main()
