"""Tokens without guards: a change between two calls counts, one inside a call is an error."""

import warnings

import pytest
import torch
from torch._dynamo.eval_frame import OptimizedModule
from transformers import LogitsProcessor, LogitsProcessorList, StaticCache

from tests.support.compare import assert_close
from tests.support.models import FEW, LONG, SETTINGS, prompt, tiny
from tide_compile import TIDE, TIDEConfig
from tide_compile.errors import ModelChangedError

OFF = TIDEConfig(exit_threshold=1.0, **SETTINGS)


def replaced(model):
    projection = model.model.layers[1].mlp.down_proj
    projection.weight = torch.nn.Parameter(-projection.weight.detach())


def replaced_data(model):
    projection = model.model.layers[1].mlp.down_proj
    projection.weight.data = -projection.weight.data


def loaded(model):
    model.load_state_dict({n: 1.3 * t for n, t in model.state_dict().items()})


def assigned(model):
    model.load_state_dict({n: 1.3 * t for n, t in model.state_dict().items()}, assign=True)


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, arguments, output: -output)


def hooked_at_the_top(model):
    def double(module, arguments, output):
        output.logits = 2 * output.logits
        return output

    model.register_forward_hook(double)


def other_dtype(model):
    model.double()


def other_module(model):
    model.model.layers[1].mlp = torch.nn.Identity()


def other_attribute(model):
    model.model.layers[1].self_attn.scaling *= 2


def other_forward(model):
    model.model.layers[1].mlp.forward = lambda x: 2 * x


def adapted(model):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False), model)


CHANGES = [
    replaced, replaced_data, loaded, assigned, hooked_at_the_top, other_dtype, other_module, other_attribute, adapted,
    *(pytest.param(change, marks=pytest.mark.slow) for change in (hooked, other_forward)),
]  # fmt: skip


def logits(model, batch=1, length=9, **kwargs):
    """Of every token of a generation: [T, B, V]."""
    ids, mask = prompt(batch, length)
    result = model.generate(
        ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **LONG, **kwargs
    )
    return torch.stack(result.logits)


@pytest.fixture
def guarded(monkeypatch):
    """The calls for which Dynamo evaluated its guards."""
    calls = []
    original = OptimizedModule.__call__
    monkeypatch.setattr(OptimizedModule, "__call__", lambda *a, **k: (calls.append(k), original(*a, **k))[1])
    return calls


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_calls_counts(change):
    if change is adapted:
        pytest.importorskip("peft")
    model = tiny("rmsnorm-rope-gqa", layers=FEW)
    engine = TIDE(model, config=OFF)
    before = logits(engine)
    assert_close(before, logits(model))
    change(model)
    want = logits(model)
    assert not torch.equal(want, before.to(want.dtype))
    assert_close(logits(engine), want)


@pytest.mark.parametrize("change", [other_dtype, hooked_at_the_top], ids=lambda change: change.__name__)
def test_a_change_counts_where_the_engine_is_called(change):
    """Catches code that was compiled before it, in a call that is no ``generate``."""
    model = tiny("rmsnorm-rope-gqa", layers=FEW)
    engine = TIDE(model, config=OFF)
    ids, mask = prompt(2)
    engine(ids, mask)
    change(model)
    with torch.no_grad():
        got, want = engine(ids, mask), model(ids, attention_mask=mask).logits
    assert got.dtype == want.dtype
    assert_close(got[mask.bool()].float(), want[mask.bool()].float())


class Changing(LogitsProcessor):
    """Changes the model when it sees a length."""

    def __init__(self, change, length):
        self.change, self.length = change, length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.length:
            self.change()
        return scores


@pytest.mark.parametrize(
    "change", [other_attribute, other_module, other_dtype, adapted, replaced, assigned], ids=lambda c: c.__name__
)
def test_a_change_within_a_call_is_an_error(change):
    if change is adapted:
        pytest.importorskip("peft")
    model = tiny("rmsnorm-rope-gqa", layers=FEW)
    engine = TIDE(model, config=OFF)
    processors = LogitsProcessorList([Changing(lambda: change(model), 16)])
    with pytest.raises(ModelChangedError, match="between two calls"):
        engine.generate(prompt(1)[0], **LONG, logits_processor=processors)
    assert_close(logits(engine), logits(model))


@pytest.mark.parametrize("change", [replaced_data, loaded], ids=lambda c: c.__name__)
def test_new_values_within_a_call_count(change):
    """Weights are read for every token: nothing is compiled into the code but their shapes."""
    texts = []
    for wrap in (lambda model: model, lambda model: TIDE(model, config=OFF)):
        model = tiny("rmsnorm-rope-gqa", layers=FEW)
        processors = LogitsProcessorList([Changing(lambda model=model: change(model), 16)])
        texts.append(wrap(model).generate(prompt(1)[0], **LONG, logits_processor=processors))
    assert torch.equal(*texts)


def default_dtype():
    torch.set_default_dtype(torch.bfloat16)


def threads():
    torch.set_num_threads(3)


@pytest.mark.parametrize("change", [default_dtype, threads], ids=lambda change: change.__name__)
def test_settings_of_the_process_may_change(change):
    """Another thread loads a model meanwhile, say. Catches a finished text that becomes an error."""
    model = tiny("rmsnorm-rope-gqa", layers=FEW)
    engine, ids = TIDE(model, config=OFF), prompt(1)[0]
    want = engine.generate(ids, **LONG)
    before = torch.get_num_threads()
    try:
        processors = LogitsProcessorList([Changing(change, 16)])
        assert torch.equal(engine.generate(ids, **LONG, logits_processor=processors), want)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(before)
    assert torch.equal(engine.generate(ids, **LONG), want)


def test_another_cache_within_a_call_is_an_error():
    """Catches a graph that goes on with the tensors it was first given."""
    model = tiny("rmsnorm-rope-gqa", layers=FEW)
    engine = TIDE(model, config=OFF)
    cache = StaticCache(config=model.config, max_cache_len=40)

    def change():
        cache.layers[0].keys = cache.layers[0].keys.clone()

    processors = LogitsProcessorList([Changing(change, 16)])
    with pytest.raises(ModelChangedError, match="between two calls"):
        engine.generate(prompt(1)[0], past_key_values=cache, **LONG, logits_processor=processors)


def test_few_guards_and_no_recompilation(guarded):
    """Dynamo is asked for the prompt and one token; nothing is compiled that was before."""
    engine = TIDE(tiny("rmsnorm-rope-gqa", layers=FEW), config=OFF)
    ids, mask = prompt(1)
    engine.generate(ids, attention_mask=mask, **LONG)
    guarded.clear()
    torch._dynamo.utils.counters.clear()
    engine.generate(ids, attention_mask=mask, **LONG)
    assert len(guarded) == 2  # the prompt, one token
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_shapes_in_turn():
    """Other batches, prompts and caches between the calls of one kind."""
    model = tiny("rmsnorm-rope-gqa", layers=FEW)
    engine = TIDE(model, config=OFF)
    for batch, length in ((1, 9), (3, 9), (1, 1), (1, 9)):
        ids, mask = prompt(batch, length)
        want = model.generate(ids, attention_mask=mask, **LONG)
        assert torch.equal(engine.generate(ids, attention_mask=mask, **LONG), want)
        cache = StaticCache(config=model.config, max_cache_len=40)
        assert torch.equal(engine.generate(ids, attention_mask=mask, past_key_values=cache, **LONG), want)
        assert torch.equal(engine.generate(ids, attention_mask=mask, use_cache=False, **LONG), want)


def test_a_call_within_a_call():
    """What a callback asks the engine in the meantime is another kind of call."""
    model = tiny("rmsnorm-rope-gqa", layers=FEW)
    engine = TIDE(model, config=OFF)
    ids, _ = prompt(1)
    want = model.generate(ids, **LONG)
    processors = LogitsProcessorList([Changing(lambda: engine(ids[:, :1]), length) for length in (14, 15, 18)])
    assert torch.equal(engine.generate(ids, **LONG, logits_processor=processors), want)


def test_windows_keep_their_guards(guarded):
    """Their cache counts tokens in Python, which only guards notice."""
    model = tiny("sliding-window")
    engine = TIDE(model, config=OFF)
    ids, mask = prompt(1, 5)
    out = engine.generate(ids, attention_mask=mask, **LONG)
    assert torch.equal(out, model.generate(ids, attention_mask=mask, **LONG))
    assert len(guarded) == LONG["max_new_tokens"]


def test_dynamo_switched_off_stays_off():
    engine = TIDE(tiny("rmsnorm-rope-gqa", layers=FEW), config=OFF)
    out = engine.generate(prompt(1)[0], **LONG)
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(engine.generate(prompt(1)[0], **LONG), out)
        assert engine.last_stats.total_tokens == 0
