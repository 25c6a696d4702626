"""What is left of a layer that is skipped: the keys and values it would have written."""

import pytest

from tests.support.graphs import capture, count, decode_graph, passes, settings
from tests.support.models import prompt, tiny
from tide_compile.errors import KVNotFoundError
from tide_compile.passes.program import HIDDEN as STATE


def test_fill_keeps_only_keys_and_values():
    """Attention, its output projection and the MLP must be gone: they are what an exit saves."""
    program, _ = passes(decode_graph(1), settings([1], checkpoint_interval=2, min_layers=1))
    full, fill = program.segments[1].plain, program.segments[0].fill
    assert count(full, "scaled_dot_product_attention") == 2 and count(fill, "scaled_dot_product_attention") == 0
    assert count(full, "linear") == 2 * 7 and count(fill, "linear") == 2 * 2
    assert count(full, "index_copy_") == count(fill, "index_copy_") == 2 * 2
    assert count(full, "add_") == count(fill, "add_") == 2  # cumulative_length
    assert STATE in fill.inputs and STATE not in fill.outputs


def test_one_fill_for_all_segments():
    """Catches a call per segment, and a segment before the exit that is filled again."""
    program, _ = passes(decode_graph(1), settings([0, 1], checkpoint_interval=1, min_layers=1))
    writes = [count(segment.fill, "index_copy_") for segment in program.segments[:2]]
    assert writes == [2 * 3, 2 * 2] and not any(segment.fill for segment in program.segments[2:])


def test_zero_pad_fill_needs_no_weights():
    program, _ = passes(
        decode_graph(1), settings([1], checkpoint_interval=2, min_layers=1, kv_cache_strategy="zero_pad")
    )
    fill = program.segments[0].fill
    assert count(fill, "index_copy_") == 4
    assert not [n for n in fill.inputs if "norm" in n or "mlp" in n]


def test_zero_pad_without_known_attention():
    """Eager attention without a cache shows no K and V to zero: an error, not a silent 'propagate'."""
    model = tiny("rmsnorm-rope-gqa")
    model.config._attn_implementation = "eager"
    ids, _ = prompt(2)
    (gm,) = capture(model, ids, use_cache=False)
    with pytest.raises(KVNotFoundError, match="sdpa"):
        passes(gm, settings([0], kv_cache_strategy="zero_pad"))
