"""Attention takes another form inside Inductor, and gives the same numbers."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.support.aten_graphs import compiled_with, random
from tests.support.compare import assert_close
from tide_compile.kernels.cpu import attention
from tide_compile.passes.aten.lower_attention import LowerAttention, attend_one

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default


@torch.no_grad()
def test_attention_with_a_mask_for_all():
    """[1, L], without dimensions for sequences and heads."""
    query, key, value = (random(2, 4, n, 16, seed=n) for n in (1, 7, 7))
    mask = torch.where(torch.arange(7) < 4, 0.0, float("-inf")).unsqueeze(0)
    run, spy = compiled_with(lambda q: scaled_dot_product_attention(q, key, value, attn_mask=mask), LowerAttention())
    assert_close(run(query), scaled_dot_product_attention(query, key, value, attn_mask=mask))
    assert not spy.count[FLASH]


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
    monkeypatch.setattr("tide_compile.kernels.cpu.attention.ROWS", 8)
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
