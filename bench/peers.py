"""python -m bench.peers: ways to decode the same tokens of the same weights, one after the other in one process.

Contenders take turns, four tokens each behind one that does not count (those that only have ``generate``: the time of 5
tokens less that of 1): eager, stock Inductor, tide without exits, tide with all tokens leaving after N/3 of the layers,
transformers' ``assistant_early_exit`` there, with ``--router FILE`` tide with the thresholds of that file (tokens take
as long as they need, so look at its mean), and, where they are installed, ``tide-inference`` 0.2.1 from PyPI
(untrained routers, threshold 1: nobody leaves) and llama.cpp (llama-cpp-python, the same weights written in the dtype
of the run). ``engine``: as the engine's ``generate`` runs it; all other compiled ones are plain ``torch.compile``, with
Dynamo's guards for every token. ``same``: of the first 32 greedy tokens, how many come before the first that differs
from eager's.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import StaticCache

from bench.decode import in_engine
from bench.support.models import SMOLLM2, load_model
from bench.support.report import Timing, interleave, show, timed
from tide_compile import RouterBank
from tide_compile.cli.demo_model import demo_model_file
from tide_compile.thresholds.certify import CERTIFICATE

CONTEXT, CACHE, TOKENS, PIECE = 64, 256, 32, 4


@dataclass(frozen=True, slots=True)
class Contender:
    """``prefill`` runs a prompt; ``decode`` gives the next ``n`` greedy tokens behind one, on and on or, if it
    ``restarts``, from the prompt every time."""

    prefill: Callable[[list[int]], object] | None
    decode: Callable[[int], list[int]]
    restarts: bool = False


def compiled(model: nn.Module, call: Callable, ids: torch.Tensor) -> Contender:
    """A contender that is called like the model."""
    caches = {n: StaticCache(config=model.config, max_cache_len=CACHE) for n in ("prompt", "text")}
    state: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def prefill(tokens: list[int]) -> None:
        caches["prompt"].reset()
        given = torch.tensor([tokens])
        torch._dynamo.maybe_mark_dynamic(given, 1)
        call(given, past_key_values=caches["prompt"], logits_to_keep=1)

    @torch.no_grad()
    def decode(count: int) -> list[int]:
        if not state or state["length"] + count >= CACHE:
            caches["text"].reset()
            logits = model(ids, past_key_values=caches["text"], logits_to_keep=1).logits
            state.update(ids=logits[:, -1].argmax(-1, keepdim=True), length=ids.shape[1])
        found = []
        for _ in range(count):
            found.append(int(state["ids"]))
            logits = call(state["ids"], past_key_values=caches["text"]).logits
            state["ids"] = logits[:, -1].argmax(-1, keepdim=True)
        state["length"] += count
        return found

    with torch.no_grad():
        model(ids[:, :8], past_key_values=caches["prompt"])
    return Contender(prefill, decode)


def early_exit_assistant(model: nn.Module, ids: torch.Tensor) -> Contender:
    def decode(count: int) -> list[int]:
        out = model.generate(
            ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0,
            assistant_early_exit=model.config.num_hidden_layers // 3,
        )  # fmt: skip
        return out[0, ids.shape[1] :].tolist()

    return Contender(None, decode, restarts=True)


def tide_inference(model: nn.Module, ids: torch.Tensor) -> Contender:
    from TIDE.config import TIDEConfig
    from TIDE.router import RouterCheckpoint, TokenRouter
    from TIDE.runtime import TIDERuntime

    layers = range(7, model.config.num_hidden_layers, 4)
    routers = {i: TokenRouter(model.config.hidden_size) for i in layers}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "router.pt"
        RouterCheckpoint(routers, hidden_dim=model.config.hidden_size, bottleneck_dim=128).save(path)
        runtime = TIDERuntime(model, path, TIDEConfig(exit_threshold=1.0))

    def decode(count: int) -> list[int]:
        return runtime.generate(ids, max_new_tokens=count, temperature=0.0)[0, ids.shape[1] :].tolist()

    @torch.no_grad()
    def prefill(tokens: list[int]) -> None:
        runtime(torch.tensor([tokens]))

    return Contender(prefill, decode, restarts=True)


def llama_cpp(dtype: torch.dtype, ids: torch.Tensor, folder: str) -> Contender:
    from llama_cpp import Llama

    path = str(Path(folder) / "model.gguf")
    write_gguf(demo_model_file(), path, dtype)
    arguments = {"n_ctx": CACHE, "n_threads": torch.get_num_threads(), "n_threads_batch": torch.get_num_threads()}
    prompt_model, llama = (Llama(path, **arguments, n_batch=512, verbose=False) for _ in range(2))
    state = {"length": CACHE}

    def prefill(tokens: list[int]) -> None:
        prompt_model.reset()
        prompt_model.eval(tokens)

    def decode(count: int) -> list[int]:
        if state["length"] + count >= CACHE:
            llama.reset()
            llama.eval(ids[0].tolist())
            state["length"] = ids.shape[1]
        found = []
        for _ in range(count):
            found.append(llama.sample(temp=0.0, repeat_penalty=1.0))
            llama.eval(found[-1:])
        state["length"] += count
        return found

    return Contender(prefill, decode)


def write_gguf(source: Path, target: str, dtype: torch.dtype) -> None:
    """The same model in F32, F16 or BF16."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize, quantize

    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    kind = GGMLQuantizationType[kind]
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    skipped = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for name, entry in reader.fields.items():
        if not name.startswith(skipped):
            inner = entry.types[1] if entry.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, entry.contents(), entry.types[0], sub_type=inner)
    for tensor in reader.tensors:
        data = dequantize(tensor.data, tensor.tensor_type)
        chosen = kind if data.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quantize(data, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def routed(model: nn.Module, ids: torch.Tensor, path: str) -> tuple[str, Contender]:
    """A router file as a contender, named by its certificate."""
    bank = RouterBank.load(path)
    certificate = bank.metadata.get(CERTIFICATE)
    name = f"tide certified {certificate['bound']:.0%}" if certificate else f"tide {Path(path).stem}"
    return name, compiled(model, torch.compile(model, backend="tide", options={"router": bank}), ids)


def contenders(
    model: nn.Module, ids: torch.Tensor, folder: str, is_smollm2: bool, routers: Sequence[str] = ()
) -> dict[str, Contender]:
    n = model.config.num_hidden_layers
    bank = RouterBank.untrained(model.config.hidden_size, n)
    forced = {"router": bank, "exit_threshold": 0.0, "min_layers": n // 3, "checkpoint_interval": n // 3}
    found = {
        "eager": compiled(model, model, ids),
        "inductor": compiled(model, torch.compile(model), ids),
        "tide off": compiled(model, torch.compile(model, backend="tide", options={"exit_threshold": 1.0}), ids),
        "tide off, engine": compiled(model, in_engine(model, {"exit_threshold": 1.0}), ids),
        f"tide exit {n // 3}": compiled(model, torch.compile(model, backend="tide", options=forced), ids),
        f"tide exit {n // 3}, engine": compiled(model, in_engine(model, forced), ids),
        **dict(routed(model, ids, path) for path in routers),
        "assistant_early_exit": early_exit_assistant(model, ids),
    }
    if importlib.util.find_spec("TIDE"):
        found["tide-inference"] = tide_inference(model, ids)
    if importlib.util.find_spec("llama_cpp") and is_smollm2:
        found["llama.cpp"] = llama_cpp(model.dtype, ids, folder)
    return found


def decoding(contender: Contender) -> Callable[[], float]:
    """A step that returns the seconds of one token: the mean of ``PIECE``, behind one that finds the processor's caches
    full of what the others ran."""
    whole, piece, first = (lambda n=n: timed(lambda: contender.decode(n)) for n in (PIECE + 1, PIECE, 1))

    def step() -> float:
        spent = first()
        return (whole() - spent if contender.restarts else piece()) / PIECE

    return step


def same_tokens(found: list[int], wanted: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b), len(wanted))


def table(timings: dict[str, Timing], extra: dict[str, str]) -> list[list[object]]:
    base = timings["inductor"].median
    return [
        [n, *t.cells(), f"{t.median / base:.2f}", f"{t.mean * 1e3:.1f}", extra.get(n, "")] for n, t in timings.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="smollm2, a hub name or a folder (llama.cpp: smollm2 only)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--router", action="append", default=[], help="router file to run as well; more than once: each"
    )
    parser.add_argument("--rounds", type=int, default=12, help=f"turns of {PIECE} tokens")
    parser.add_argument("--prompt", type=int, default=192, help="tokens of the prompt that is timed, 0: none")
    parser.add_argument("--json", help="also write the results to <json>.decode and <json>.prefill")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch._dynamo.config.recompile_limit = 32
    model, tokenizer = load_model(args.model, getattr(torch, args.dtype))
    text = "The history of the steam engine begins long before the first railway was built, when people"
    ids = tokenizer(text * 8, return_tensors="pt").input_ids[:, :CONTEXT]
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(10, model.config.vocab_size - 1, (max(args.prompt, 2),), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as folder:
        found = contenders(model, ids, folder, args.model == SMOLLM2, args.router)
        tokens = {name: contender.decode(TOKENS) for name, contender in found.items()}
        same = {name: f"{same_tokens(t, tokens['eager'])} of {TOKENS}" for name, t in tokens.items()}
        timings = interleave({name: decoding(contender) for name, contender in found.items()}, args.rounds)
        headers = ["", "ms per token", "quartiles", "to inductor", "mean", "same"]
        title = f"decode, {args.model}, {args.dtype}, batch 1, context {CONTEXT} to {CACHE}"
        show(title, headers, table(timings, same), args.json and f"{args.json}.decode")
        if args.prompt:
            steps = {n: lambda c=c: timed(lambda: c.prefill(prompt)) for n, c in found.items() if c.prefill is not None}
            for step in steps.values():
                step()  # compiles
            timings = interleave(steps, max(3, args.rounds // 4))
            title = f"prefill of {args.prompt} tokens, {args.model}, {args.dtype}, batch 1"
            show(title, ["", "ms", *headers[2:5], ""], table(timings, {}), args.json and f"{args.json}.prefill")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
