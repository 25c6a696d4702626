"""What people put around a model: other outputs, labels, adapters, streamers, beams, copies; on a tiny model."""

import copy
import gc
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, TextIteratorStreamer

import tide_compile
from tests.support.compare import assert_close
from tests.support.models import FEW, GENERATE, HIDDEN, LAYERS, SETTINGS, logits_of, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig
from tide_compile.errors import ConfigError

DEPTH = FEW  # of the fixtures' model: what is tested here is around the layers


def reference_text(model, bank, config, ids, **kwargs):
    with tide_compile.eager_reference(model, bank, config):
        return model.generate(ids, cache_implementation="static", **GENERATE, **kwargs)


@pytest.mark.parametrize("thresholds", [(1.0,), (0.5, 0.0)])  # without routers in the graph, and with
@pytest.mark.parametrize(
    "asked",
    [
        {"logits_to_keep": 1},
        {"logits_to_keep": torch.tensor([2, 5])},
        {"output_hidden_states": True},
        {"return_dict": False},
        {"labels": prompt(2)[0]},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_other_outputs(asked, thresholds):
    """Everything a forward can return: shapes, order and values as in the reference, and so in the stock model. Catches
    a graph that is cut where transformers hangs its hooks for outputs into a model, which the first call does."""
    model, bank = tiny("rmsnorm-rope-gqa"), RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    ids, mask = prompt(2)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False, **asked}
    options = {"router": bank, "exit_threshold": thresholds[0], **SETTINGS}
    compiled = torch.compile(model, backend="tide", options=options)
    for threshold in thresholds:
        config = TIDEConfig(exit_threshold=threshold, **SETTINGS)
        with torch.no_grad(), tide_compile.exit_threshold(threshold):
            got = compiled(**inputs)
            with tide_compile.eager_reference(model, bank, config):
                want = model(**inputs)
        got, want = (value if isinstance(value, tuple) else value.to_tuple() for value in (got, want))
        for ours, theirs in zip(flat(got), flat(want), strict=True):
            assert_close(ours, theirs)


def flat(values):
    for value in values:
        yield from flat(value) if isinstance(value, tuple | list) else (value,)


def test_hidden_states_from_the_engine(model, bank):
    """Catches code that is compiled anew because transformers has hung its hooks for outputs into the model."""
    engine = TIDE(model, bank, TIDEConfig(exit_threshold=0.0, **SETTINGS))
    with torch.no_grad():
        states = engine.model(prompt(1)[0], output_hidden_states=True).hidden_states
    assert len(states) == FEW + 1


def test_adapters(model, bank):
    """A LoRA-wrapped model generates through its own wrapper, past any compiled code: the engine must not."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    config = TIDEConfig(exit_threshold=0.5, **SETTINGS)
    ids, _ = prompt(1)
    engine = TIDE(wrapped, bank, config)
    out = engine.generate(ids, **GENERATE)
    inner = wrapped.base_model.model
    assert torch.equal(out, reference_text(inner, bank, config, ids))
    assert engine.last_stats.total_tokens > 0
    bare = wrapped.unload()
    assert not torch.equal(out, bare.generate(ids, **GENERATE))
    with pytest.raises(ConfigError, match="generate"):
        torch.compile(wrapped, backend="tide", options={"router": bank}).generate(ids)


def test_wrapper_with_tokens_of_its_own(model, bank):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with pytest.raises(ConfigError, match="does more than"):
        TIDE(wrapped, bank, TIDEConfig(**SETTINGS))


@pytest.mark.parametrize("where", ["module", "rate"])
def test_dropout(model, where):
    """A model, or a new adapter, in training mode: nothing would be said twice. Catches an engine that draws states."""
    layer = model.model.layers[1]
    if where == "module":
        layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.1).train())
    else:
        layer.self_attn.attention_dropout = 0.1
        layer.train()
    with pytest.raises(ConfigError, match=r"layers\.1.*in training mode.*model\.eval\(\)"):
        TIDE(model, config=TIDEConfig(exit_threshold=1.0, **SETTINGS))
    model.eval()
    assert TIDE(model, config=TIDEConfig(exit_threshold=1.0, **SETTINGS)).generate(prompt(1)[0], **GENERATE).shape


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beam_search(model, bank, kwargs):
    """Beams reorder the cache between calls."""
    config = TIDEConfig(exit_threshold=0.5, **SETTINGS)
    ids, _ = prompt(1)
    engine = TIDE(model, bank, config)
    assert torch.equal(engine.generate(ids, **GENERATE, **kwargs), reference_text(model, bank, config, ids, **kwargs))


def test_iterator_streamer(model, bank):
    """Text arrives while another thread generates."""

    class Numbers:
        def decode(self, tokens, **kwargs):
            return "".join(f"{int(t)} " for t in tokens)

    engine = TIDE(model, bank, TIDEConfig(exit_threshold=0.5, **SETTINGS))
    ids, _ = prompt(1)
    want = engine.generate(ids, **GENERATE)[0]
    streamer = TextIteratorStreamer(Numbers(), timeout=60)
    thread = threading.Thread(target=engine.generate, args=(ids,), kwargs={"streamer": streamer, **GENERATE})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == [str(int(t)) for t in want]


def test_recompilations_are_bounded(model, bank):
    """Prompts of ten lengths and batches of three sizes: 2 graphs for each batch size, no matter how many lengths."""
    engine = TIDE(model, bank, TIDEConfig(exit_threshold=0.5, **SETTINGS))
    torch._dynamo.utils.counters.clear()
    for batch in (1, 2, 4):
        for length in range(3, 13):
            ids, mask = prompt(batch, length, padding=1)
            engine.generate(ids, attention_mask=mask, **{**GENERATE, "max_new_tokens": 2})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


def test_memory_of_many_generations(model, bank):
    """200 calls of generate leave no tensors behind."""
    engine = TIDE(model, bank, TIDEConfig(exit_threshold=0.5, **SETTINGS))

    def run(times):
        for i in range(times):
            engine.generate(prompt(1, 4 + i % 5)[0], **{**GENERATE, "max_new_tokens": 2})
        gc.collect()
        return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())

    before = run(10)
    assert run(200) <= before + 5


def test_copies_and_files(model, bank, tmp_path):
    """A compiled model can be copied, saved and loaded as if nothing had happened."""
    keys = list(model.state_dict())
    stock = logits_of(model, model, "none", 1)[0]
    options = {"router": bank, "exit_threshold": 0.0, **SETTINGS}
    model.compile(backend="tide", options=options)
    want = logits_of(model, model, "none", 1)[0]
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    assert_close(logits_of(twin, twin, "none", 1)[0], stock)  # torch leaves compiled code behind when it copies
    twin.compile(backend="tide", options=options)
    assert_close(logits_of(twin, twin, "none", 1)[0], want)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert list(loaded.state_dict()) == keys
    assert_close(logits_of(loaded, torch.compile(loaded, backend="tide", options=options), "none", 1)[0], want)
