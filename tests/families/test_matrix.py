"""The matrix of ``python -m tests.families.matrix``: in CI one family for each thing that can go wrong."""

import pytest
import torch

from tests.families.configs import names
from tests.families.matrix import PASS, REFUSED, WRONG, examine
from tide_compile.runtime.executor import Executor

SLOW = {"ctrl", "dbrx", "gemma4_text", "mamba", "rwkv", "zamba2"}  # long ones; for graph breaks: test_find_layers.py
EXPECTED = {
    "dbrx": REFUSED,  # its experts break the graph: nothing may be compiled as if it had no layers
    "gemma3": PASS,  # a longer list of modules than the decoder's, which text does not run
    "gemma4_text": PASS,  # layers that share keys and values
    "hrm_text": REFUSED,  # runs its layers more than once for a token
    "mamba": PASS,  # vmap in the slices that fill skipped layers
    "ctrl": REFUSED,  # its mask is made before a graph break
    "mllama": PASS,  # layers of cross attention that text does not run
    "openai-gpt": PASS,  # layers return lists; norms follow
    "recurrent_gemma": PASS,  # carries padding on to real tokens
    "rwkv": PASS,  # takes no heed of the mask
    "xlnet": REFUSED,  # time comes before batch
    "zamba2": PASS,  # later layers read the embeddings as well
}


@pytest.fixture(autouse=True)
def limits():
    threads, limit = torch.get_num_threads(), torch._dynamo.config.fail_on_recompile_limit_hit
    yield
    torch.set_num_threads(threads)
    torch._dynamo.config.fail_on_recompile_limit_hit = limit
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "family", [pytest.param(n, marks=() if n in EXPECTED.keys() - SLOW else pytest.mark.slow) for n in names()]
)
def test_family(family):
    """Equal to the eager reference or refused by name: never silently wrong."""
    row = examine(family)
    assert row.verdict != WRONG, row.why
    if family in EXPECTED:
        assert row.verdict == EXPECTED[family], row.why


def test_a_wrong_result_is_seen(monkeypatch):
    """The matrix would be worth nothing if it could not fail."""
    right = Executor.__call__
    monkeypatch.setattr(Executor, "__call__", lambda self, *a: tuple(_spoilt(x) for x in right(self, *a)))
    row = examine("llama")
    assert row.verdict == WRONG and "largest difference" in row.why[0]


def _spoilt(value):
    return value + 1 if isinstance(value, torch.Tensor) and value.dim() == 3 else value
