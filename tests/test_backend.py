"""The backend by itself: gradients, options, and what happens to a graph that is no decoder."""

import logging

import pytest
import torch

from tests.support.compare import assert_close
from tests.support.models import FEW, SETTINGS, prompt
from tide_compile.errors import ConfigError, GradEnabledError, LayersNotFoundError, UnknownOptionError

DEPTH = FEW  # of the fixtures' model: what is tested here is around the layers


def test_gradients(model, bank):
    compiled = torch.compile(model, backend="tide", options={"router": bank, **SETTINGS})
    with pytest.raises(GradEnabledError, match=r"torch\.no_grad"):
        compiled(prompt(1)[0])
    with torch.inference_mode():
        compiled(prompt(1)[0])


def test_options(model):
    def run(**options):
        with torch.no_grad():
            torch.compile(model, backend="tide", options=options)(prompt(1)[0])

    with pytest.raises(UnknownOptionError, match=r"'exit_treshold'. Did you mean 'exit_threshold'\?"):
        run(exit_treshold=0.5)
    for bad in ({"exit_threshold": 1.5}, {"min_layers": 0}, {"kv_cache_strategy": "guess"}, {"router": 5}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            run(**bad)


def test_fallback_is_asked_for_and_logged(caplog):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with torch.no_grad():
        with pytest.raises(LayersNotFoundError):
            torch.compile(net, backend="tide")(torch.ones(2, 4))
        options = {"fallback": "inductor"}
        with caplog.at_level(logging.WARNING, "tide_compile"):
            out = torch.compile(net, backend="tide", options=options)(torch.ones(2, 4))
    assert_close(out, net(torch.ones(2, 4)).detach())
    assert "TIDE is off for this graph" in caplog.text
