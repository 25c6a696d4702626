"""Where texts come from, and what is said when there are none."""

import json

import pytest

from tide_compile.errors import CalibrationDataError
from tide_compile.text.sources import calibration_texts


def test_texts(tmp_path):
    assert len(list(calibration_texts("pydoc", 7))) == 7
    assert list(calibration_texts(["a", "", "b", "c"], 2)) == ["a", "b"]
    long = "words " * 30
    (tmp_path / "t.txt").write_text(f"{long}\n\nshort\n\n" + "wrapped at a few columns\n" * 6)
    assert [len(t) for t in calibration_texts(str(tmp_path / "t.txt"), 9)] == [len(long.strip()), 6 * 25 - 1]
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": long}) + "\n")
    assert list(calibration_texts(tmp_path / "t.jsonl", 9)) == [long.strip()]
    (tmp_path / "u.jsonl").write_text(json.dumps({"body": long}) + "\n")
    for bad, why in (
        (tmp_path / "none.txt", "no calibration file"),
        (str(tmp_path / "u.jsonl"), "none is called 'text'"),
        ([], "holds no text"),
        ("wikitext", "cannot be read"),  # no hub is reachable in the tests
    ):
        with pytest.raises(CalibrationDataError, match=f"{why}.*pydoc"):
            list(calibration_texts(bad, 5))
