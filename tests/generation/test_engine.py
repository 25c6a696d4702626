"""The engine, on a tiny model with uncompiled pieces."""

import copy
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, TextGenerationPipeline, set_seed
from transformers.generation.streamers import BaseStreamer

import tide_compile
from tests.support.compare import assert_close
from tests.support.models import FEW, GENERATE, HIDDEN, LAYERS, SETTINGS, VOCABULARY, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig
from tide_compile.errors import ConfigError, GraphBreakError

DEPTH = FEW  # of the fixtures' model: what is tested here is around the layers


def reference_text(model, bank, config, ids, mask, **kwargs):
    with tide_compile.eager_reference(model, bank, config) as reference:
        out = model.generate(ids, attention_mask=mask, cache_implementation="static", **GENERATE, **kwargs)
    return out, reference


@pytest.mark.parametrize("batch", [1, 3])
def test_generate_equals_the_reference(batch):
    """The text, and the count of exits, of left-padded batches."""
    model, bank = tiny("rmsnorm-rope-gqa"), RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    config = TIDEConfig(exit_threshold=0.5, **SETTINGS)
    ids, mask = prompt(batch)
    engine = TIDE(model, bank, config)
    out = engine.generate(ids, attention_mask=mask, **GENERATE)
    want, reference = reference_text(model, bank, config, ids, mask)
    assert torch.equal(out, want)
    layers = torch.cat([e.flatten() for e in reference.exit_layers])
    counted = {i: int((layers == i).sum()) for i in range(LAYERS - 1)}
    assert engine.last_stats.exits_per_layer == {i: n for i, n in counted.items() if n}
    assert engine.last_stats.total_tokens == int((layers >= 0).sum())


def test_logits_and_off(model):
    engine = TIDE(model, config=TIDEConfig(exit_threshold=1.0, **SETTINGS))
    ids, mask = prompt(2)
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
    assert_close(engine(ids, mask)[mask.bool()], want[mask.bool()])
    assert engine.last_stats.exit_rate == 0


def test_one_cache_and_few_compilations(model, bank):
    """Catches a cache made anew, and a recompilation for every prompt length."""
    engine = TIDE(model, bank, TIDEConfig(exit_threshold=0.0, **SETTINGS))
    torch._dynamo.utils.counters.clear()
    caches = set()
    for length in (5, 9, 7, 12):
        engine.generate(prompt(1, length)[0], **GENERATE)
        caches.update(map(id, engine._caches._free))
    assert len(caches) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # prompts, decoding


def test_generation_arguments(model, bank):
    """Catches an engine that interprets what transformers should."""
    engine = TIDE(model, bank, TIDEConfig(exit_threshold=0.5, **SETTINGS))
    ids, mask = prompt(1)

    class Collect(BaseStreamer):
        tokens = ()

        def put(self, value):
            self.tokens = (*self.tokens, *value.flatten().tolist())

        def end(self):
            pass

    streamer = Collect()
    out = engine.generate(input_ids=ids, attention_mask=mask, streamer=streamer, **GENERATE)
    assert list(streamer.tokens) == out[0].tolist()
    assert torch.equal(engine.generate(ids, **{**GENERATE, "temperature": 0}), out)
    assert torch.equal(engine.generate(ids, **GENERATE, use_cache=False), out)
    assert torch.equal(engine.generate(ids, **GENERATE, cache_implementation="dynamic"), out)
    set_seed(0)
    rows = engine.generate(ids, **{**GENERATE, "do_sample": True}, num_return_sequences=3)
    assert rows.shape[0] == 3
    result = engine.generate(ids, **GENERATE, return_dict_in_generate=True)
    cache = result["cache"] if "cache" in result else result["past_key_values"]  # renamed in transformers 5.24
    kept = cache.layers[0].keys.clone()
    engine.generate(prompt(1, 5)[0], **GENERATE)
    assert torch.equal(cache.layers[0].keys, kept)  # the caller's cache is the caller's


def test_the_model_is_left_alone(model, bank):
    def attributes():
        copies = {n: dict(v) if isinstance(v, dict) else v for n, v in model.__dict__.items()}
        return {n: v for n, v in copies.items() if n != "_is_torch_compile"}  # set by any torch.compile

    before = set(model.state_dict()), attributes()
    engine = TIDE(model, bank, TIDEConfig(exit_threshold=0.0, **SETTINGS))
    engine.generate(prompt(1)[0], **GENERATE)
    assert (set(model.state_dict()), attributes()) == before
    assert model.generation_config.disable_compile is not True
    assert engine.model.lm_head is model.lm_head
    with tide_compile.record_exits() as stats, torch.no_grad():
        model(prompt(1)[0])
        copy.deepcopy(model)(prompt(1)[0])
    assert stats.total_tokens == 0


def test_pipeline(model, bank):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w1")
    engine = TIDE(model, bank, TIDEConfig(exit_threshold=0.0, **SETTINGS))
    pipeline = TextGenerationPipeline(model=engine.model, tokenizer=tokenizer)
    with tide_compile.record_exits() as stats:
        texts = pipeline(["w5 w6 w7", "w8"], max_new_tokens=4, do_sample=False)
    assert len(texts) == 2 and stats.exit_rate == 1


def test_generate_from_threads(model, bank):
    """There is one cache: calls that ran at once would write over each other's keys."""
    engine = TIDE(model, bank, TIDEConfig(exit_threshold=0.5, **SETTINGS))
    prompts = [prompt(1, length)[0] for length in (5, 7, 9, 11)]
    want = [engine.generate(p, **GENERATE) for p in prompts]
    got = {}
    threads = [
        threading.Thread(target=lambda i=i, p=p: got.update({i: engine.generate(p, **GENERATE)}))
        for i, p in enumerate(prompts * 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], want[i % 4]) for i in range(8))


@torch._dynamo.config.patch(recompile_limit=2)
def test_many_engines(model, bank):
    """A sweep over thresholds must not run into Dynamo's limit of recompilations."""
    for step in range(4):
        engine = TIDE(model, bank, TIDEConfig(exit_threshold=step / 20, **SETTINGS))
        engine(prompt(1)[0], use_cache=False)
    assert engine.last_stats.total_tokens == 9


@torch._dynamo.config.patch(recompile_limit=2)
def test_many_kinds_of_call(model):
    """One engine serves more kinds of call than Dynamo compiles by default."""
    engine = TIDE(model, config=TIDEConfig(exit_threshold=1.0, lowering="eager"))
    ids, mask = prompt(2)
    torch._dynamo.utils.counters.clear()
    for arguments in ({"use_cache": False}, {}, {"attention_mask": mask}):
        engine(ids, **arguments)
    engine(ids[:1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 3


def test_few_sequences_have_code_of_their_own(model):
    """After a second batch size Dynamo compiles for any, and then products of few rows are as slow as those of many."""
    engine = TIDE(model, config=TIDEConfig(exit_threshold=1.0, lowering="eager"))
    torch._dynamo.utils.counters.clear()
    for rows, graphs in (1, 2), (3, 4), (2, 6), (5, 8), (6, 8), (3, 8):
        ids = prompt(1)[0].expand(rows, -1).contiguous()
        assert engine.generate(ids, max_new_tokens=3, do_sample=False).shape[0] == rows
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, rows


def test_inference_mode_and_embeddings(model, bank):
    """The cache survives a change of mode; embeddings in the place of ids are an input like any other."""
    engine = TIDE(model, bank, TIDEConfig(exit_threshold=0.5, **SETTINGS))
    ids, mask = prompt(1)
    with torch.inference_mode():
        out = engine.generate(ids, attention_mask=mask, **GENERATE)
    assert torch.equal(engine.generate(ids, attention_mask=mask, **GENERATE), out)
    embeddings = model.get_input_embeddings()(ids).detach()
    new = engine.generate(inputs_embeds=embeddings, attention_mask=mask, **GENERATE)
    assert torch.equal(new, out[:, ids.shape[1] :])


def test_rope_that_depends_on_positions():
    """Frequencies that are chosen as the text grows: by a tensor, as stock; by a branch, which no graph can hold, an
    error that says where and what to do, and doing it gives the stock text."""
    for kind, settings in (("longrope", {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}), ("dynamic", {})):
        model = tiny("rmsnorm-rope-gqa", layers=FEW)
        model.config.rope_parameters = {
            "rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 12, **settings
        }  # fmt: skip
        model.config.max_position_embeddings = 12
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        ids = prompt(1)[0]
        want = model.generate(ids, **GENERATE)
        config = TIDEConfig(exit_threshold=1.0, **SETTINGS)
        if kind == "dynamic":
            with pytest.raises(GraphBreakError, match=r"one graph: .*modeling_rope_utils\.py:\d+.*fallback='inductor'"):
                TIDE(model, config=config).generate(ids, **GENERATE)
            config = replace(config, fallback="inductor")
        assert torch.equal(TIDE(model, config=config).generate(ids, **GENERATE), want)


@pytest.mark.parametrize("name", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_compilation_switched_off(name):
    """For debugging: the stock text, and a line that nothing is skipped."""
    program = """
import torch
from tests.support.models import FEW, GENERATE, HIDDEN, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig
from tide_compile.errors import ConfigError, GraphBreakError
model = tiny("rmsnorm-rope-gqa", layers=FEW)
engine = TIDE(model, RouterBank.untrained(HIDDEN, FEW), TIDEConfig(exit_threshold=0.0))
ids = prompt(1)[0]
print(torch.equal(engine.generate(ids, **GENERATE), model.generate(ids, **GENERATE)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {name: "1"}, capture_output=True, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout == "True\n" and "every token runs all layers" in done.stderr, done.stderr


@torch._dynamo.config.patch(accumulated_recompile_limit=1)
def test_more_graphs_than_dynamo_expects(model):
    """Catches an error of Dynamo's in a process that has had many engines: it counts how often the functions of a
    model's class were compiled, for whom ever."""
    engine = TIDE(model, config=TIDEConfig(exit_threshold=1.0, lowering="eager"))
    for batch in (1, 2, 3):
        ids, mask = prompt(batch)
        want = model.generate(ids, attention_mask=mask, **GENERATE)
        assert torch.equal(engine.generate(ids, attention_mask=mask, **GENERATE), want)


@pytest.mark.parametrize("model", [None, "a name", 5])
def test_what_is_no_model(model):
    """Catches Python's AttributeError."""
    with pytest.raises(ConfigError, match="not a transformers model"):
        TIDE(model)
