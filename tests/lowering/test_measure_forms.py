"""Forms of a product are measured once, whatever its size."""

import json
import logging

import pytest
import torch

from tide_compile.lowering import measure_forms
from tide_compile.passes.aten.gemm_forms import Linears

MEASURED = measure_forms.seconds_of  # before each test has its own


@pytest.mark.parametrize("outs", [(1,), (7,), (50257,), (3, 5, 1)])
def test_weights_of_any_size_are_measured(outs, monkeypatch):
    """Catches sizes that the parts of the measured loop do not divide."""
    monkeypatch.setattr(measure_forms, "seconds_of", MEASURED)
    monkeypatch.setattr(measure_forms, "_LEAST", 0.0)
    few, many = (Linears(rows, outs, 16, torch.bfloat16, torch.bfloat16) for rows in (2, 64))
    for pack_weights, copied in ((False, ()), (True, ("packed", "template"))):
        forms = measure_forms.fastest_forms({few, many}, pack_weights)
        assert forms[few] in ("aten", "stream", "swapped")
        assert forms[many] in ("aten", "swapped", "onednn swapped", *copied)


def test_forms_that_fail(monkeypatch, caplog):
    """A form that raises is not tried; ATen's is what remains, and products in fp64 have no other."""
    monkeypatch.setattr(measure_forms, "seconds_of", MEASURED)
    monkeypatch.setitem(measure_forms.ALONE, "swapped", lambda *_: 1 / 0)
    product = Linears(2, (64,), 64, torch.float32, torch.float32)
    with caplog.at_level(logging.WARNING, "tide_compile"):
        assert measure_forms.fastest_forms({product})[product] in ("aten", "stream")
    assert "division by zero" in caplog.text
    double = Linears(2, (64,), 64, torch.float64, torch.float64)
    assert measure_forms.known_forms({double}) == {double: "aten"}


def test_forms_are_measured_once(monkeypatch, tmp_path, caplog):
    """The second process finds the result; a broken file is measured anew; one that cannot be written is no error."""
    measured = []
    fake = {"aten": 1.0, "stream": 2.0}
    monkeypatch.setattr(measure_forms, "seconds_of", lambda products, linears: measured.append(linears) or fake)
    product = Linears(4, (8,), 16, torch.float32, torch.float32)
    assert measure_forms.fastest_forms({product}) == {product: "aten"}
    count = len(measured)
    assert measure_forms.fastest_forms({product}) == {product: "aten"} and len(measured) == count
    (path,) = tmp_path.rglob("linears.json")
    assert count == 1 and list(json.loads(path.read_text()).values()) == [
        {f"{product} as aten, stream, swapped": "aten"}
    ]
    path.write_text("{")
    measure_forms.fastest_forms({product})
    assert len(measured) == 2 * count
    monkeypatch.setenv("TIDE_CACHE", "/proc/nowhere")  # cannot be written
    with caplog.at_level(logging.WARNING, "tide_compile"):
        assert measure_forms.fastest_forms({product}) == {product: "aten"}
    assert "not kept" in caplog.text
