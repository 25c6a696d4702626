"""The application's description in OpenAPI: bodies are read by ``read_request``, of which FastAPI knows nothing."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"


def request_body(kind: type[BaseModel]) -> dict[str, object]:
    """For ``openapi_extra`` of an endpoint."""
    schema = {"$ref": _REF.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def described_by(app: FastAPI, *kinds: type[BaseModel]) -> Callable[[], dict[str, object]]:
    """The ``openapi`` of an application whose endpoints read bodies of these kinds."""
    usual = app.openapi

    def openapi() -> dict[str, object]:
        described = usual()
        _, schemas = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REF)
        described["components"]["schemas"] |= schemas["$defs"]
        return described

    return openapi
