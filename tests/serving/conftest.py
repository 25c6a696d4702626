import pytest

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
