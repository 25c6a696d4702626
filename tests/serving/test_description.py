"""Requests made from the application's own description in OpenAPI."""

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.serve import serving
from tests.support.tokenizers import byte_tokenizer, tiny_engine
from tide_compile.serving.app import build_app

schemathesis = pytest.importorskip("schemathesis")
PATHS = {
    "/v1/completions": "POST", "/v1/chat/completions": "POST", "/v1/models": "GET", "/v1/models/{model}": "GET",
    "/health": "GET", "/metrics": "GET",
}  # fmt: skip


@pytest.fixture(scope="module")
def schema():
    app = build_app(tiny_engine(), byte_tokenizer(), "tiny", total_tokens=32, max_bytes=4000, warmup=False)
    with serving(app) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_all_is_described(schema):
    """Catches an endpoint that the description leaves out, and requests that it knows nothing of."""
    described = httpx.get(schema.location).json()
    assert {path: method.upper() for path, methods in described["paths"].items() for method in methods} == PATHS
    for name in ("CompletionRequest", "ChatRequest"):
        request = described["components"]["schemas"][name]
        assert not request["additionalProperties"] and request["properties"]["n"] == {"enum": [1, None]}
        assert "user" in request["properties"] and "temperature" in request["properties"]


RIGHT, WRONG = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
CASES = [*((path, RIGHT) for path in PATHS), *((path, WRONG) for path in PATHS if PATHS[path] == "POST")]


@pytest.mark.parametrize(("path", "mode"), CASES)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_request_breaks_the_server(schema, path, mode, data):
    """Catches an error of the server's, and a wrong request that is served as if it were another one."""
    case = data.draw(schema[path][PATHS[path]].as_strategy(generation_mode=mode))
    reply = case.call(timeout=300)  # the first ones compile
    assert reply.status_code < 500 and (mode == RIGHT or reply.status_code >= 400), (case.body, reply.text)
