"""Files of texts: what they hold in every encoding, and what is said of those that hold something else."""

import json
import os

import pytest

from tide_compile.errors import CalibrationDataError
from tide_compile.text.local_file import texts_of_file
from tide_compile.text.sources import calibration_texts, count_texts, sources_of

TEXT = "Ein längerer Text, 长文本. " * 8


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings(tmp_path, encoding):
    """Catches a byte order mark that becomes part of the first text, or of the first object, which is no JSON then."""
    (tmp_path / "t.txt").write_text(f"{TEXT}\r\n \r\n{TEXT}", encoding=encoding)
    (tmp_path / "t.JSONL").write_text(
        f"\n{json.dumps({'text': TEXT})}\n\n{json.dumps({'text': None})}", encoding=encoding
    )
    assert [t for t in texts_of_file(tmp_path / "t.txt") if t] == [TEXT.strip()] * 2
    assert [t for t in texts_of_file(tmp_path / "t.JSONL") if t] == [TEXT.strip()]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("latin.txt", ("é" * 300).encode("latin-1"), r"latin.txt' is not in UTF-8 \(byte 0xe9.*iconv"),
        ("late.txt", ("e\n\n" * 3000 + "é").encode("latin-1"), r"late.txt' is not in UTF-8"),
        ("half.txt", "text".encode("utf-16") + b"\0", "half.txt' is not in UTF-16"),
        ("nulls.txt", b"text" * 99 + b"\0", "nulls.txt' is not a text"),
        ("zip.jsonl", b"PK\x03\x04\0\0", "zip.jsonl' is not a text"),
        ("empty.txt", b"", "empty.txt' holds no text"),
        ("mark.txt", b"\xef\xbb\xbf", "mark.txt' holds no text"),
        ("empty.jsonl", b"", "empty.jsonl' holds no text"),
        ("words.jsonl", b'{"text": "a"}\nwords', r"words.jsonl' is not JSON .* line 2: Expecting value"),
        ("list.json", b'[{"text": "a"},\n', "list.json' is not JSON .* line 2"),
        ("number.jsonl", b"1", "line 1 of .*number.jsonl' is no object"),
        ("other.json", b'[{"text": "a"}, {"body": "b"}]', r"object 2 of .*other.json' has \['body'\], and none"),
        ("dict.jsonl", b'{"text": {}}', "line 1 of .*dict.jsonl' has a 'text' that is no string"),
    ],
)
def test_what_is_no_text(tmp_path, name, content, why):
    """Every one is an error that names the file. Catches an error of Python's or of another package's."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationDataError, match=why):
        count_texts(str(path), 10_000)


@pytest.mark.parametrize("name", ["run[1]/texts.jsonl", "c++/a+b*.jsonl", "what?/é {0}.json", "~/**.txt"])
def test_names_that_are_patterns(tmp_path, monkeypatch, name):
    """Catches a name that is taken for a pattern of files, or for two sources."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / name.removeprefix("~/")
    path.parent.mkdir(exist_ok=True)
    path.write_text(TEXT if path.suffix == ".txt" else json.dumps({"text": TEXT}))
    source = name if name.startswith("~") else str(path)
    assert sources_of(f"self+{source}+pydoc") == ["self", source, "pydoc"]
    assert list(calibration_texts(source, 5)) == [TEXT.strip()]


def test_what_can_be_read_once_only(tmp_path):
    """Texts are read more than once: from a pipe the second time would wait for ever. And names too long to exist."""
    os.mkfifo(tmp_path / "pipe")
    for source, why in ((tmp_path / "pipe", "a device, a pipe or a socket"), ("/x" * 3000, "no calibration file")):
        with pytest.raises(CalibrationDataError, match=why):
            count_texts(str(source), 5)
    with pytest.raises(CalibrationDataError, match="text 1 is of type int"):
        count_texts(["a", 2], 5)
    assert count_texts("some/data-set", 5) is None
