"""Products take another form inside Inductor, and give the same numbers."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import StaticCache

from tests.support.aten_graphs import compiled_with, random
from tests.support.compare import assert_close
from tests.support.graphs import capture
from tests.support.models import SETTINGS, prompt, tiny
from tide_compile import TIDE, TIDEConfig, packed_bytes
from tide_compile.kernels.cpu.linear import template_linear
from tide_compile.kernels.cpu.onednn import can_multiply
from tide_compile.kernels.cpu.packed_weights import drop_packed
from tide_compile.lowering import lower
from tide_compile.passes.aten.gemm_forms import (
    TOGETHER,
    Linears,
    find_linears,
    has_template,
    part_size,
    possible_forms,
    rows_like,
)
from tide_compile.passes.aten.lower_linears import LowerLinears

aten = torch.ops.aten
OPS = {"onednn": "linear", "onednn swapped": "linear", "packed": "packed_linear", "template": "template_linear"}


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
    monkeypatch.setattr("tide_compile.passes.aten.gemm_forms._TEMPORARY", 4 * 48 * 20)  # 20 rows of a weight
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
    monkeypatch.setattr(lower, "fastest_forms", lambda found, *_: dict.fromkeys(found, form))
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
    programs = []

    def noting(program, config, *_):
        programs.append(program)
        return lower.lower(program, replace(config, lowering="eager"))

    monkeypatch.setattr("tide_compile.backend.lower", noting)
    config = TIDEConfig(exit_threshold=0.5, compaction="always", **SETTINGS)
    TIDE(model, bank, config)(torch.ones(8, 1, dtype=torch.long), past_key_values=StaticCache(model.config, 16))
    (program,) = programs
    segment = program.segments[1]
    for piece, rows in ((segment.plain, {8}), (segment.compact, {8, 256})):
        found = find_linears(piece.graph.graph)
        assert sum(len(linears.outs) for linears in found) >= 5, piece.name
        assert {linears.rows for linears in found} == rows


def test_parts_divide_all_products():
    """Inductor makes one loop only of sums of the same size."""
    assert part_size([576, 192, 192]) == 192 and part_size([1536, 1536]) == 768
    assert part_size([50257]) == 50257 // 4  # a prime number: some rows are left over
