"""Calls of ``generate`` come to what they come to in stock transformers, or to an error of ours: some of the matrix of
``python -m tests.conformance``, and random calls."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.conformance.cases import CASES, undecided
from tests.conformance.matrix import MODELS, WAYS, Ways, cases_of
from tests.conformance.outcomes import WRONG
from tests.conformance.random_calls import random_calls

SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def limit():
    """Instead of going on without a compiler."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, accumulated_recompile_limit=10_000):
        yield


@pytest.fixture(scope="module")
def ways():
    yield Ways()
    torch._dynamo.reset()


def test_all_is_decided():
    """Catches a parameter or a field of a later transformers that nobody has thought about."""
    assert undecided() == []


@pytest.mark.parametrize(
    "index", [pytest.param(i, marks=() if i % 8 == 0 else SLOW, id=f"{c.covers[0]}-{i}") for i, c in enumerate(CASES)]
)
def test_engine(ways, index):
    """Of three rows, with exits; every eighth case in CI."""
    (row,) = ways.rows([CASES[index]], ("engine",), ("synthetic",), (3,))
    assert row.verdict != WRONG, str(row)


@SLOW
@pytest.mark.parametrize("model", MODELS)
def test_matrix(model):
    ways = Ways(**MODELS[model].arguments)
    wrong = [str(row) for index in cases_of(model) for row in ways.rows([CASES[index]]) if row.verdict == WRONG]
    assert not wrong, "\n".join(wrong)


def check_random(ways, data, way):
    case, batch, exits = data.draw(random_calls()), data.draw(st.sampled_from([1, 2, 3])), data.draw(EXITS)
    (row,) = ways.rows([case], (way,), (exits,), (batch,))
    assert row.verdict != WRONG, str(row)


EXITS = st.sampled_from(["off", "synthetic"])
QUIET = {
    "deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate],  # every call is compiled: nobody waits for a smaller one
}  # fmt: skip


@settings(max_examples=20, **QUIET)
@given(data=st.data())
def test_random_calls(ways, data):
    """Any arguments that go together, of any way, on one engine."""
    check_random(ways, data, "engine")


@SLOW
@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=500, **QUIET)
@given(data=st.data())
def test_more_random_calls(ways, data, way):
    check_random(ways, data, way)
