import logging

import pytest

from tests.support.held import Held
from tests.support.tokenizers import byte_tokenizer, tiny_engine


@pytest.fixture(autouse=True)
def fresh():
    """In the place of the one above: one compiled engine serves the module."""


@pytest.fixture(scope="module")
def engine():
    return tiny_engine()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def held(engine):
    held = Held(engine)
    yield held
    held.gate.set()


@pytest.fixture
def logged(monkeypatch):
    """Warnings and errors of all loggers. (uvicorn removes the handlers of its own when it starts.)"""
    records, handle = [], logging.Logger.handle

    def noting(logger, record):
        if record.levelno >= logging.WARNING:
            records.append(record)
        handle(logger, record)

    monkeypatch.setattr(logging.Logger, "handle", noting)
    return records
