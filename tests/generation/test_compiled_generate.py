"""``generate`` of what ``torch.compile`` returns."""

import torch

import tide_compile
from tests.support.models import FEW, GENERATE, SETTINGS, prompt

DEPTH = FEW  # of the fixtures' model: what is tested here is around the layers


def test_the_trap(model, bank):
    """``torch.compile(model, backend="tide").generate`` reaches the backend; other backends are left alone."""
    options = {"router": bank, "exit_threshold": 0.0, **SETTINGS}
    compiled = torch.compile(model, backend="tide", options=options)
    with tide_compile.record_exits() as stats:
        out = compiled.generate(prompt(1)[0], cache_implementation="static", **GENERATE)
    assert stats.total_tokens == 9 + 5 and stats.exit_rate == 1
    del compiled
    with tide_compile.record_exits() as stats:
        torch.compile(model, backend="tide", options=options).generate(prompt(1)[0], **GENERATE)  # held by nobody
    assert stats.total_tokens == 9 + 5 and stats.exit_rate == 1
    stock = torch.compile(model, backend="eager")
    with tide_compile.record_exits() as stats:
        stock.generate(prompt(1)[0], **GENERATE)
    assert stats.total_tokens == 0
    model.compile(backend="tide", options=options)
    with tide_compile.record_exits() as stats:
        again = model.generate(prompt(1)[0], cache_implementation="static", **GENERATE)
    assert stats.exit_rate == 1 and torch.equal(out, again)
