"""What lowering measures, compiles and waits for."""

import json
import logging
import threading
from concurrent.futures import Future

import pytest
import torch
from torch._inductor.async_compile import AsyncCompile
from transformers import StaticCache

from tests.support.compare import assert_close
from tests.support.models import FEW, GENERATE, HIDDEN, SETTINGS, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig, eager_reference, record_times, synthetic_routers
from tide_compile.lowering import lower as lowering
from tide_compile.lowering import measure_forms as tuning
from tide_compile.lowering.hooks import compiling_together
from tide_compile.passes.aten.gemm_forms import Linears

aten = torch.ops.aten
MEASURED = tuning._seconds  # before each test has its own


@pytest.mark.parametrize("outs", [(1,), (7,), (50257,), (3, 5, 1)])
def test_weights_of_any_size_are_measured(outs, monkeypatch):
    """Catches sizes that the parts of the measured loop do not divide."""
    monkeypatch.setattr(tuning, "_seconds", MEASURED)
    monkeypatch.setattr(tuning, "_LEAST", 0.0)
    few, many = (Linears(rows, outs, 16, torch.bfloat16, torch.bfloat16) for rows in (2, 64))
    for pack_weights, copied in ((False, ()), (True, ("packed", "template"))):
        forms = tuning.fastest_forms({few, many}, pack_weights)
        assert forms[few] in ("aten", "stream", "swapped")
        assert forms[many] in ("aten", "swapped", "onednn swapped", *copied)


def test_forms_that_fail(monkeypatch, caplog):
    """A form that raises is not tried; ATen's is what remains, and products in fp64 have no other."""
    monkeypatch.setattr(tuning, "_seconds", MEASURED)
    monkeypatch.setitem(tuning.ALONE, "swapped", lambda *_: 1 / 0)
    product = Linears(2, (64,), 64, torch.float32, torch.float32)
    with caplog.at_level(logging.WARNING, "tide_compile"):
        assert tuning.fastest_forms({product})[product] in ("aten", "stream")
    assert "division by zero" in caplog.text
    double = Linears(2, (64,), 64, torch.float64, torch.float64)
    assert tuning.known_forms({double}) == {double: "aten"}


def test_forms_are_measured_once(monkeypatch, tmp_path, caplog):
    """The second process finds the result; a broken file is measured anew; one that cannot be written is no error."""
    measured = []
    fake = {"aten": 1.0, "stream": 2.0}
    monkeypatch.setattr(tuning, "_seconds", lambda products, linears: measured.append(linears) or fake)
    product = Linears(4, (8,), 16, torch.float32, torch.float32)
    assert tuning.fastest_forms({product}) == {product: "aten"}
    count = len(measured)
    assert tuning.fastest_forms({product}) == {product: "aten"} and len(measured) == count
    (path,) = tmp_path.rglob("linears.json")
    assert count == 1 and list(json.loads(path.read_text()).values()) == [
        {f"{product} as aten, stream, swapped": "aten"}
    ]
    path.write_text("{")
    tuning.fastest_forms({product})
    assert len(measured) == 2 * count
    monkeypatch.setenv("TIDE_CACHE", "/proc/nowhere")  # cannot be written
    with caplog.at_level(logging.WARNING, "tide_compile"):
        assert tuning.fastest_forms({product}) == {product: "aten"}
    assert "not kept" in caplog.text


@pytest.mark.parametrize("fastest", ["stream", "aten"])
def test_wrong_assumption(model, bank, fastest, monkeypatch):
    """Products that were never measured are taken for streamed. Catches pieces that stay so where another form is
    faster, are compiled again where they are right, or are compiled from a graph that is used up."""
    compiled = []
    monkeypatch.setattr(lowering, "fastest_forms", lambda found, _: dict.fromkeys(found, fastest))
    original = lowering.compile_piece
    monkeypatch.setattr(lowering, "compile_piece", lambda *args: compiled.append(args) or original(*args))
    engine = TIDE(model, bank, TIDEConfig(exit_threshold=1.0, **{**SETTINGS, "lowering": "inductor"}))
    ids = prompt(1)[0][:, :1]
    with torch.no_grad():
        assert_close(engine(ids, use_cache=False), model(ids, use_cache=False).logits)
    streamed = [bool(patches["post_grad_custom_pre_pass"][0].forms) for _, patches in compiled]
    assert len({id(piece.graph) for piece, _ in compiled}) == len(compiled)
    assert streamed == [True, False, True, *([] if fastest == "stream" else [False, False])]  # the second: no products


def test_warmup_compiles_everything(caplog):
    """Catches a piece that is compiled while a user waits: after warmup neither Dynamo nor a piece has to be. And what
    only compiled code gets wrong when rows are left out: the text and the exits are the eager reference's."""
    ids, mask = prompt(4, padding=0)
    model = tiny("rmsnorm-rope-gqa", layers=FEW)
    bank = synthetic_routers(model, ids, {0: 0.5})
    config = TIDEConfig(min_layers=1, checkpoint_interval=1, compaction="always")
    engine = TIDE(model, bank, config)
    assert engine.warmup(batch_size=4) > 0
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with caplog.at_level(logging.INFO, "tide_compile"), record_times() as times:
        text = engine.generate(ids, attention_mask=mask, **GENERATE)
    with eager_reference(model, bank, config) as reference:
        assert torch.equal(text, model.generate(ids, attention_mask=mask, **GENERATE, cache_implementation="static"))
    left = torch.cat([layers.flatten() for layers in reference.exit_layers])
    assert engine.last_stats.exits_per_layer == {0: int((left == 0).sum())}
    assert any(d.compact and d.kept < d.rows for d in engine.last_stats.decisions.values())
    assert not [r for r in caplog.messages if "compiled" in r]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    ran = times.seconds
    assert "segment_1.compact" in ran and len(ran["executor"]) == len(ran["epilogue"]) == GENERATE["max_new_tokens"]
    assert all(s > 0 for seconds in ran.values() for s in seconds)


def test_what_is_compiled_late_leaves_no_marks():
    """A piece that is compiled when somebody leaves first, for sizes that are not constants, reads the caller's cache.
    Catches marks on its tensors: guards see them, so everything would be compiled again, or ``generate`` be refused."""
    model = tiny("rmsnorm-rope-gqa", layers=FEW)
    options = {"router": RouterBank.untrained(HIDDEN, FEW), "exit_threshold": 0.0, **SETTINGS, "lowering": "inductor"}
    compiled = torch.compile(model, backend="tide", dynamic=True, options=options)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        for length in (4, 1):
            compiled(torch.ones(2, length, dtype=torch.long), past_key_values=cache)
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    assert not [t for t in tensors if hasattr(t, "_has_dynamo_dim_marking")]


@torch._inductor.config.patch(compile_threads=2)
def test_compilers_are_waited_for_together():
    """At the end of the block, and only by the thread that is in it. Catches kernels that are never put in place, and
    those of another thread that are not there when it runs them."""
    made, scopes = Future(), [{}, {}, {}]
    made.set_result("kernel")
    for scope in scopes:
        scope["run"] = made
    with compiling_together():
        AsyncCompile().wait(scopes[0])
        other = threading.Thread(target=AsyncCompile().wait, args=(scopes[1],))
        other.start()
        other.join()
        assert scopes[0]["run"] is made and scopes[1]["run"] == "kernel"
    AsyncCompile().wait(scopes[2])
    assert [scope["run"] for scope in scopes] == ["kernel"] * 3
