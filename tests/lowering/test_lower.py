"""Which pieces are compiled, and when."""

import pytest
import torch
from transformers import StaticCache

from tests.support.compare import assert_close
from tests.support.models import FEW, HIDDEN, SETTINGS, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig
from tide_compile.lowering import lower


@pytest.mark.parametrize("fastest", ["stream", "aten"])
def test_wrong_assumption(model, bank, fastest, monkeypatch):
    """Products that were never measured are taken for streamed. Catches pieces that stay so where another form is
    faster, are compiled again where they are right, or are compiled from a graph that is used up."""
    compiled = []
    monkeypatch.setattr(lower, "fastest_forms", lambda found, *_: dict.fromkeys(found, fastest))
    original = lower.compile_piece
    monkeypatch.setattr(lower, "compile_piece", lambda *args: compiled.append(args) or original(*args))
    engine = TIDE(model, bank, TIDEConfig(exit_threshold=1.0, **{**SETTINGS, "lowering": "inductor"}))
    ids = prompt(1)[0][:, :1]
    with torch.no_grad():
        assert_close(engine(ids, use_cache=False), model(ids, use_cache=False).logits)
    streamed = [bool(patches["post_grad_custom_pre_pass"][0].forms) for _, patches, _ in compiled]
    assert len({id(piece.graph) for piece, *_ in compiled}) == len(compiled)
    assert streamed == [True, False, True, *([] if fastest == "stream" else [False, False])]  # the second: no products


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
