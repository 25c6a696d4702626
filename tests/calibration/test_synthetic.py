"""Routers that let exact shares of tokens leave."""

import pytest
import torch

import tide_compile
from tests.support.models import COMPACT, prompt
from tide_compile import synthetic_routers
from tide_compile.errors import ConfigError


def test_synthetic_shares_are_exact(model):
    """Shares are of the tokens that reach a checkpoint, padding not counted."""
    ids, mask = prompt(4, 12)
    bank = synthetic_routers(model, ids, {0: 0.25, 2: 0.5}, attention_mask=mask)
    options = {"router": bank, **COMPACT, "lowering": "eager"}
    compiled = torch.compile(model, backend="tide", options=options)
    with torch.no_grad(), tide_compile.record_exits() as stats:
        compiled(ids, attention_mask=mask, use_cache=False)
    first = round(0.25 * mask.sum().item())
    assert stats.exits_per_layer == {0: first, 2: round(0.5 * (mask.sum().item() - first))}
    again = synthetic_routers(model, ids, {0: 0.25, 2: 0.5}, attention_mask=mask)
    assert torch.equal(again.routers[2].up.weight, bank.routers[2].up.weight)
    with pytest.raises(ConfigError, match="shares from 0 to 1"):
        synthetic_routers(model, ids, {0: 1.5})
