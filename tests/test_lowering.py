"""Products and attention of few rows take another form inside Inductor, and give the same numbers."""

import gc
import json
import logging
import threading
from collections import Counter
from concurrent.futures import Future

import pytest
import torch
from tide_compile.kernels import attention
from tide_compile.kernels.linear import can_multiply, drop_packed, has_template, template_linear
from tide_compile.passes.lower_attention import LowerAttention, attend_one
from tide_compile.passes.lower_linears import (
    TOGETHER,
    Linears,
    LowerLinears,
    find_linears,
    part_size,
    possible_forms,
    rows_like,
)  # fmt: skip
from torch import nn
from torch._inductor.async_compile import AsyncCompile
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import StaticCache

from tests.checks import assert_close
from tests.models import FEW, GENERATE, HIDDEN, SETTINGS, prompt, tiny
from tests.test_passes import capture
from tide_compile import TIDE, RouterBank, TIDEConfig, eager_reference, lowering, packed_bytes, record_times, tuning
from tide_compile.inductor_code import compiling_together

aten = torch.ops.aten
MEASURED = tuning._seconds  # before each test has its own
OPS = {"onednn": "linear", "onednn swapped": "linear", "packed": "packed_linear", "template": "template_linear"}
FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default


class Spy:
    """Counts the operators that the passes before it have left, and those of them that something uses."""

    def __call__(self, graph):
        self.graph = graph
        self.count = Counter(node.target for node in graph.nodes)
        graph.eliminate_dead_code()
        self.used = Counter(node.target for node in graph.nodes)

    def uuid(self):
        return None  # no cache: the pass has to run


def compiled_with(function, *passes):
    spy = Spy()
    torch._dynamo.reset()
    return torch.compile(function, options={"post_grad_custom_pre_pass": [*passes, spy]}), spy


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_streamed(rows, dtype):
    """Three products with one input, of which one has a bias, next to a product with a computed matrix and one
    that is not listed, which have to stay. Catches wrong parts, rows in the wrong order, a lost bias, and an input that
    is computed anew for each product."""
    x, q, k, v = (random(*s, dtype=dtype, seed=i) for i, s in enumerate([(1, rows, 48), (48, 48), (16, 48), (16, 48)]))
    bias, other = random(16, dtype=dtype), random(24, 48, dtype=dtype)

    def function(x):
        queries = linear(x, q)[0]
        return queries, linear(x, k, bias), linear(x, v), linear(queries, k.sin()), linear(x.cos(), other)

    forms = {Linears(rows, (16, 16, 48), 48, dtype, dtype): "stream"}
    run, spy = compiled_with(function, LowerLinears(forms))
    for got, want in zip(run(x), function(x), strict=True):
        assert_close(got, want)
    assert spy.count[aten.mm.default] == 2 and not spy.count[aten.addmm.default]
    assert spy.count[aten.sum.dim_IntList] == rows * (3 + 1 + 1)  # parts of 16 rows: all in one loop
    assert spy.count[torch.ops._inductor_test.realize.default] == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped(dtype, monkeypatch):
    """Rows of a number that only the run tells, beside a product that stays. Catches a result in the order of the
    weight, products in less than fp32, a lost bias, weights that are converted at once, and rows that are guarded."""
    monkeypatch.setattr("tide_compile.passes.lower_linears._TEMPORARY", 4 * 48 * 20)  # 20 rows of a weight
    x, q, k, other = (random(*s, dtype=dtype, seed=i) for i, s in enumerate([(2, 7, 48), (48, 48), (16, 48), (24, 48)]))
    bias = random(16, dtype=dtype)

    def function(x):
        return linear(x, k, bias), linear(x, q), linear(x.cos(), other)

    run, spy = compiled_with(function, LowerLinears({Linears(256, (16, 48), 48, dtype, dtype): "swapped"}))
    for length in (7, 9):
        given = x[:, :length] if length == 7 else random(2, 9, 48, dtype=dtype)
        torch._dynamo.mark_dynamic(given, 1)
        with torch._dynamo.config.patch(error_on_recompile=length != 7):
            results = run(given)
        for got, want in zip(results, function(given), strict=True):
            assert_close(got, want)
    assert spy.count[aten.mm.default] == (3 if dtype == torch.float32 else 5) and not spy.count[aten.addmm.default]
    products = {n.args[0].meta["val"].dtype for n in spy.graph.find_nodes(op="call_function", target=aten.mm.default)}
    assert products == {torch.float32, dtype}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["onednn", "onednn swapped", "packed", "template"])
def test_forms_for_many_rows(form, dtype):
    """Rows of a number that only the run tells, and sizes that are no multiple of anything. Catches columns of another
    product, a lost bias, what blocks are filled up with, and products that stay as they were."""
    linears = Linears(256, (16, 19, 48), 48, dtype, dtype)
    if form not in (*possible_forms(linears, pack_weights=True), *(["onednn"] if can_multiply(dtype) else [])):
        pytest.skip(f"{form} is not for {dtype} on this processor")
    k, q, v, other = (random(n, 48, dtype=dtype, seed=n) for n in (19, 48, 16, 24))
    bias = random(19, dtype=dtype)

    def function(x):
        return linear(x, k, bias), linear(x, q), linear(x, v), linear(x.cos(), other)

    run, spy = compiled_with(function, LowerLinears({linears: form}))
    for length in (7, 9):
        given = random(2, length, 48, dtype=dtype, seed=length)
        torch._dynamo.mark_dynamic(given, 1)
        for got, want in zip(run(given), function(given), strict=True):
            assert_close(got, want)
    assert spy.count[getattr(torch.ops.tide, OPS[form]).default] == (1 if form in TOGETHER else 3)
    assert spy.count[aten.mm.default] == 1 and not spy.count[aten.addmm.default]


@torch.no_grad()
@pytest.mark.skipif(not has_template(torch.float32), reason="Inductor has no inner loops for this processor")
def test_blocks_are_kept():
    """Results as large as a copy. Catches code that takes the memory of a copy for a temporary of its own, and columns
    that blocks were filled up with."""
    a, c, x = random(48, 48), random(19, 48), random(48, 48, seed=1)

    def function(product):
        return lambda x: product(product(product(x, a).cos(), a).sin(), c)

    options = {"fx_graph_cache": False}  # it does not see other code of a lowering
    run = torch.compile(function(lambda x, weight: template_linear(x, [weight])), options=options)
    for _ in range(2):
        assert_close(run(x), function(linear)(x))


@torch.no_grad()
@pytest.mark.parametrize("form", ["packed", "template"])
def test_copies_of_weights(form, monkeypatch):
    """Catches copies that are made for every call, that outlive their weights, or of values that are gone."""
    if form not in possible_forms(Linears(256, (64,), 64, torch.float32, torch.float32), pack_weights=True):
        pytest.skip(f"{form} is not for this processor")
    monkeypatch.setattr(lowering, "fastest_forms", lambda found, _: dict.fromkeys(found, form))
    model, before = tiny("rmsnorm-rope-gqa", layers=2), packed_bytes()
    options = {"exit_threshold": 1.0, "pack_weights": True, **SETTINGS, "lowering": "inductor"}
    run = torch.compile(model, backend="tide", options=options)
    ids, sizes = torch.cat([prompt(1)[0]] * 2, dim=1), []
    attention = model.model.layers[1].self_attn
    for change in ("none", "none", "in place", "parameter", "data", "data in place"):
        for product in (model.lm_head, attention.v_proj):
            weight = product.weight
            if change == "in place":
                weight.mul_(0.5)
            elif change == "parameter":
                product.weight = nn.Parameter(-weight)
            elif change == "data":
                weight.data = 3 * weight.data
            elif change == "data in place":
                weight.data.mul_(0.5)
                drop_packed()
            del weight
        assert_close(run(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        sizes.append(packed_bytes() - before)
    assert len(set(sizes)) == 1 and sizes[0] >= sum(p.nbytes for p in model.model.layers.parameters() if p.dim() == 2)
    del model, run, attention, product
    torch._dynamo.reset()
    gc.collect()
    assert packed_bytes() == before


def test_rows_that_are_measured_for_others():
    assert [rows_like(n) for n in (1, 4, 5, 8, 9, 64, 65, 300, 5000)] == [1, 4, 8, 8, 16, 64, 128, 256, 256]


@torch.no_grad()
def test_rows_are_left_over():
    """37 rows in parts of 9."""
    x, w, bias = random(2, 48), random(37, 48), random(37)
    run, spy = compiled_with(
        lambda x: linear(x, w, bias), LowerLinears({Linears(2, (37,), 48, x.dtype, x.dtype): "stream"})
    )
    assert_close(run(x), linear(x, w, bias))
    assert spy.count[aten.sum.dim_IntList] == 2 * 5


@torch.no_grad()
def test_product_of_a_product():
    """Catches an input that was a product itself and is gone when its turn comes."""
    x, a, b = random(1, 48), random(16, 48), random(48, 16)
    forms = dict.fromkeys((Linears(1, (16,), 48, x.dtype, x.dtype), Linears(1, (48,), 16, x.dtype, x.dtype)), "stream")
    run, spy = compiled_with(lambda x: linear(linear(x, a), b), LowerLinears(forms))
    assert_close(run(x), linear(linear(x, a), b))
    assert not spy.count[aten.mm.default]


@torch.no_grad()
def test_attention_with_a_mask_for_all():
    """[1, L], without dimensions for sequences and heads."""
    query, key, value = (random(2, 4, n, 16, seed=n) for n in (1, 7, 7))
    mask = torch.where(torch.arange(7) < 4, 0.0, float("-inf")).unsqueeze(0)
    run, spy = compiled_with(lambda q: scaled_dot_product_attention(q, key, value, attn_mask=mask), LowerAttention())
    assert_close(run(query), scaled_dot_product_attention(query, key, value, attn_mask=mask))
    assert not spy.count[FLASH]


@torch.no_grad()
def test_prompts_of_any_length_stay():
    """The number of rows is a symbol there."""
    x, w = random(9, 48), random(32, 48)
    run, spy = compiled_with(lambda x: linear(x, w), LowerLinears({Linears(1, (32,), 48, x.dtype, x.dtype): "stream"}))
    torch._dynamo.mark_dynamic(x, 0)
    assert_close(run(x), linear(x, w))
    assert spy.count[aten.mm.default] == 1


@torch.no_grad()
def test_quantised_weights_are_streamed():
    """int8 weights (torchao) are read as int8: they must not be written out in the dtype of the model first."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 32, bias=False)).to(torch.bfloat16)
    quantize_(model, Int8WeightOnlyConfig())
    x = random(1, 64, dtype=torch.bfloat16)
    (graph,) = capture(model, x)
    found = find_linears(graph.graph)
    assert found == {Linears(1, (32,), 64, torch.bfloat16, torch.int8)}
    run, spy = compiled_with(model, LowerLinears(dict.fromkeys(found, "stream")))
    assert_close(run(x), model(x))
    assert not spy.count[aten.mm.default] and spy.count[aten.sum.dim_IntList]


def test_products_of_chosen_rows_are_found(model, bank, monkeypatch):
    """In segments that leave rows out, which are traced anew. Catches products that stay as they are there: queries and
    what follows attention on chosen rows, keys and values on all."""
    programs, lower = [], lowering.lower
    monkeypatch.setattr("tide_compile.backend.lower", lambda *args: programs.append(args[0]) or lower(args[0], "eager"))
    config = TIDEConfig(exit_threshold=0.5, compaction="always", **SETTINGS)
    TIDE(model, bank, config)(torch.ones(8, 1, dtype=torch.long), past_key_values=StaticCache(model.config, 16))
    (program,) = programs
    for name in ("segment_1", "segment_1.compact"):
        found = find_linears(program.pieces[name].graph.graph)
        assert sum(len(linears.outs) for linears in found) >= 5, name
        assert {linears.rows for linears in found} == ({8} if name == "segment_1" else {8, 256})


def test_parts_divide_all_products():
    """Inductor makes one loop only of sums of the same size."""
    assert part_size([576, 192, 192]) == 192 and part_size([1536, 1536]) == 768
    assert part_size([50257]) == 50257 // 4  # a prime number: some rows are left over


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_one_query(masked, dtype):
    """Groups of queries share keys; attention of two queries without a mask has to stay."""
    query, key, value = (random(2, heads, 7, 16, dtype=dtype, seed=heads) for heads in (4, 2, 1))
    value = value.expand(2, 2, 7, 16)
    mask = torch.where(random(2, 1, 2, 7) > 0, 0.0, float("-inf")).to(dtype)
    mask[..., 0] = 0

    def attend(query, key, value, rows):
        key, value = (x.repeat_interleave(2, 1) for x in (key, value))
        chosen = mask[:, :, :rows] if masked else None
        return scaled_dot_product_attention(query[:, :, :rows], key, value, attn_mask=chosen, scale=0.3)

    def function(query, key, value):
        return attend(query, key, value, 1), attend(query, key, value, 2)

    run, spy = compiled_with(function, LowerAttention())
    for got, want in zip(run(query, key, value), function(query, key, value), strict=True):
        assert_close(got, want)
    assert spy.count[FLASH] == (0 if masked else 1) and spy.count[torch.ops.tide.attend.default] == int(masked)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_prompt(dtype, monkeypatch):
    """In a cache that is longer, behind padding, in several blocks, one of which sees nothing. Catches keys that are
    left out of a block although one row of it, or one sequence, sees them, and a mask for other rows."""
    monkeypatch.setattr("tide_compile.kernels.attention.ROWS", 8)
    query, key, value = (random(2, n, m, 16, dtype=dtype, seed=n) for n, m in ((6, 21), (3, 40), (2, 40)))
    key, at = key[:, :2], torch.arange(40)
    mask = (at <= torch.arange(21)[:, None] + 4) & (at >= torch.tensor([0, 17])[:, None, None])
    mask = torch.where(mask[:, None], 0.0, -torch.inf).to(dtype)
    mask[:, :, 8:16] = -torch.inf
    want = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    assert_close(attention.attend(query, key, value, mask, None), want)
    mask = torch.where(random(2, 6, 21, 40) > 1, random(2, 6, 21, 40), -torch.inf).to(dtype)
    mask[..., 0] = 0
    for chosen in (mask, mask[0, 0], mask[:, :1, :1], mask[:1, :1, :, :1]):
        want = scaled_dot_product_attention(query, key, value, attn_mask=chosen, scale=0.3, enable_gqa=True)
        got = attention.attend(query, key, value, chosen, 0.3)
        assert_close(got, want)
        assert got.stride() == attention._empty(query, key, value, chosen, 0.3).stride()


@pytest.mark.parametrize(("heads", "groups", "length"), [(6, 2, 5), (9, 3, 96), (18, 1, 64), (4, 4, 127)])
def test_attention_of_one_query_with_grouped_keys(heads, groups, length):
    """Keys in one part or several, for few heads or more than one loop takes. Catches keys given to the wrong heads of
    queries, and a mask to the wrong keys."""
    query, key, value = (random(2, n, m, 8, seed=n) for n, m in ((heads, 1), (groups, length), (groups, length)))
    mask = torch.where(random(2, heads, 1, length) > 0, 0.0, float("-inf"))
    mask[..., 0] = 0
    for chosen in (None, mask, mask[:, :1]):
        want = scaled_dot_product_attention(query, key, value, attn_mask=chosen, enable_gqa=True)
        assert_close(attend_one(query, key, value, chosen, scale=None), want)


@torch.no_grad()
def test_keys_are_not_repeated():
    """As transformers repeats them for groups of queries. Catches loops that read every key once for each query."""
    query, key, value = (random(2, n, m, 16, seed=n) for n, m in ((6, 1), (2, 64), (2, 64)))

    def function(query, key, value):
        repeated = (x[:, :, None].expand(2, 2, 3, 64, 16).reshape(2, 6, 64, 16) for x in (key, value))
        return scaled_dot_product_attention(query, *repeated)

    run, spy = compiled_with(function, LowerAttention())
    assert_close(run(query, key, value), function(query, key, value))
    assert not spy.count[FLASH] and not spy.used[aten.expand.default]


@pytest.mark.parametrize("outs", [(1,), (7,), (50257,), (3, 5, 1)])
def test_weights_of_any_size_are_measured(outs, monkeypatch):
    """Catches sizes that the parts of the measured loop do not divide."""
    monkeypatch.setattr(tuning, "_seconds", MEASURED)
    monkeypatch.setattr(tuning, "_LEAST", 0.0)
    few, many = (Linears(rows, outs, 16, torch.bfloat16, torch.bfloat16) for rows in (2, 64))
    for pack_weights in (False, True):
        forms = tuning.fastest_forms({few, many}, pack_weights)
        assert all(forms[linears] in possible_forms(linears, pack_weights) for linears in (few, many))


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
    bank = RouterBank.synthetic(model, ids, {0: 0.5})
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
