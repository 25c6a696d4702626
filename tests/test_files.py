"""Files: what cannot be written is known before the work, what is written is whole, and a cache is never needed."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from tide_compile import files
from tide_compile.errors import OutputFileError
from tide_compile.files import cache_folder, check_writable, replacing, write_tensors, write_text


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("folder", "it is a folder"),
        ("file/new", "is not a folder"),
        ("file/deep/new", "is not a folder"),
        ("pipe", "a device, a pipe or a socket"),
        ("/dev/full", "a device, a pipe or a socket"),
        ("link to a device", "a device, a pipe or a socket"),
        ("a" * 300, "too long"),
        ("new/" + "é" * 200 + "/file", "too long"),
        ("nu\0ll", "null character"),
        ("new/", "the name of a folder"),
    ],
)
def test_what_cannot_be_written_is_known_before(tmp_path, name, why):
    """Catches a minute of work for a file that cannot be written, and a check that leaves something behind."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link to a device").symlink_to("/dev/full")
    there = sorted(os.listdir(tmp_path))
    with pytest.raises(OutputFileError, match=f"cannot be written: .*{why}"):
        check_writable(os.path.join(tmp_path, name))
    assert sorted(os.listdir(tmp_path)) == there


def test_full_disk(tmp_path, monkeypatch):
    """Catches a file for which there is no room, and an error in the middle of writing that is not named or leaves
    half a file."""
    usage = shutil.disk_usage(tmp_path)._replace(free=999)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    check_writable(tmp_path / "small", 999)
    with pytest.raises(OutputFileError, match="takes up to 1,000 bytes, and 999 are free"):
        check_writable(tmp_path / "large", 1000)
    (tmp_path / "old").write_text("old")

    def full(tensors, path, metadata):
        Path(path).write_text("half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OutputFileError, match=r"old' cannot be written: No space left"):
        write_tensors(tmp_path / "old", {}, {})
    assert os.listdir(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"


def test_devices_are_not_replaced(tmp_path):
    """A file that is renamed over ``/dev/full`` would be the device from then on. Here a pipe stands for it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputFileError, match="a device, a pipe or a socket"), replacing(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_links_modes_and_names(tmp_path, monkeypatch):
    """Catches a link that becomes a file, a private file that everybody may read afterwards, and a temporary file
    whose name is too long although the file's is not."""
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and target.stat().st_mode & 0o777 == 0o600
    longest = tmp_path / ("é" * 127)
    check_writable(longest)
    write_text(longest, "half of a pair: \ud83d")
    assert longest.read_text(encoding="utf-8").startswith("half of a pair: ")
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tensors("~/deep er/t", {"x": torch.ones(1)}, {})
    assert (tmp_path / "deep er" / "t").is_file()


def test_cache_folder(tmp_path, monkeypatch):
    """Of users with a home, without one, and without an account. Catches an error where only a cache is missing, a
    folder named ``~``, and files of somebody else that are taken for one's own."""
    for name in ("TIDE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "tide_compile"
    monkeypatch.setenv("TIDE_CACHE", "~/my cachë")
    assert cache_folder() == tmp_path / "my cachë"
    monkeypatch.delenv("TIDE_CACHE")
    monkeypatch.setenv("HOME", "/dev/null")
    assert cache_folder() == Path("/dev/null/.cache/tide_compile")  # nothing is kept there, and nothing fails

    def nobody(user):
        raise KeyError(user)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files._homeless_cache.cache_clear()
    mine = cache_folder()
    assert mine == cache_folder() == tmp_path / f"tide_compile_{os.getuid()}" and mine.stat().st_mode & 0o777 == 0o700
    mine.rmdir()
    mine.symlink_to("/")
    files._homeless_cache.cache_clear()
    monkeypatch.setattr("os.getuid", lambda: 12345)
    (tmp_path / "tide_compile_12345").mkdir()  # of another user
    other = cache_folder()
    assert other.parent == tmp_path and other.name != "tide_compile_12345"
    files._homeless_cache.cache_clear()


def test_who_may_read_a_file(tmp_path):
    """As the user's umask says, or the file that was there. Catches routers that a group cannot share."""
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "t", {"x": torch.ones(1)}, {})
        write_text(tmp_path / "s", "text")
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in "ts"} == {0o640}
