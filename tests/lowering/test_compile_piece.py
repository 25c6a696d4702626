"""What Inductor is told about a piece."""

import functools

import pytest
import torch

from tests.support.graphs import decode_graph, passes, settings
from tests.support.models import HIDDEN, logits_of
from tide_compile.lowering import compile_piece
from tide_compile.torch_internals.switches import enabled


def test_mode_reaches_inductor(monkeypatch, bank, model):
    """``mode="reduce-overhead"`` asks Inductor for CUDA graphs in every piece."""
    asked = []
    for module in ("lower", "lazy_piece"):
        target = f"tide_compile.lowering.{module}.compile_piece"
        monkeypatch.setattr(target, lambda piece, patches, _: (asked.append(patches), piece.graph)[1])
    options = {"router": bank, "exit_threshold": 0.5, "min_layers": 2, "checkpoint_interval": 1}
    call = torch.compile(model, backend="tide", options={**options, "mode": "reduce-overhead"})
    logits_of(model, call, "static", 1, steps=1)
    assert len(asked) >= 4 and all(patches["triton.cudagraphs"] for patches in asked)


def test_inductor_knows_what_stays_where_it_is(monkeypatch):
    """Weights and caches. Catches weights that would be copied before every replay of a CUDA graph, and writes to a
    cache that would forbid graphs."""
    seen = []

    def inner(gm, example_inputs, static_input_idxs=(), **kwargs):
        seen.append((set(static_input_idxs), [tuple(getattr(x, "shape", ())) for x in example_inputs]))
        raise RuntimeError("seen enough")

    monkeypatch.setattr(compile_piece, "compile_fx", functools.partial(compile_piece.compile_fx, inner_compile=inner))
    program, _ = passes(decode_graph(1), settings((1,), min_layers=2))
    shapes = {"weight": (96, HIDDEN), "cache": (1, 2, 16, 16), "state": (1, 1, HIDDEN)}
    found = dict.fromkeys(shapes, 0)
    for piece in program.pieces():
        uncached = torch._inductor.config.patch(force_disable_caches=True)
        with torch.no_grad(), uncached, pytest.raises(Exception, match="seen enough"):
            compile_piece.compile_piece(piece, {"triton.cudagraphs": True}, enabled())
        static, inputs = seen[-1]
        for i, shape in enumerate(inputs):
            for kind in (k for k, s in shapes.items() if s == shape):
                assert (i in static) == (kind != "state"), (piece.name, kind)
                found[kind] += 1
    assert all(found.values())
