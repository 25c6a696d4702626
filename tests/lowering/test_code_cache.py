"""Folders in which Inductor is to keep its code: one sentence where that cannot be."""

import os
import shutil
import subprocess
import sys

import pytest

from tide_compile.errors import OutputFileError
from tide_compile.lowering.code_cache import check_code_cache


def test_folders(tmp_path, monkeypatch):
    """Catches torch's errors after a minute of tracing: of a file in the way, a full disk, a name with blanks."""
    (tmp_path / "file").touch()
    with pytest.raises(OutputFileError, match=r"cannot be written.*TORCHINDUCTOR_CACHE_DIR"):
        check_code_cache(tmp_path / "file" / "code", True)
    check_code_cache(tmp_path / "code é", False)
    with pytest.raises(OutputFileError, match="blanks"):
        check_code_cache(tmp_path / "code é", True)
    usage = shutil.disk_usage(tmp_path)._replace(free=5 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputFileError, match="5 MB are free"):
        check_code_cache(tmp_path / "full", True)
    assert os.listdir(tmp_path / "full") == []


@pytest.mark.slow
def test_a_name_that_is_not_ascii(tmp_path):
    """The whole way, with caches of tide's and of Inductor's in folders with other letters, and tide's with blanks."""
    code = (
        "import torch; from tests.support.models import FEW, GENERATE, prompt, tiny; from tide_compile import *;"
        "m = tiny('rmsnorm-rope-gqa', layers=FEW); c = TIDEConfig(exit_threshold=1.0); ids = prompt(2)[0];"
        "assert torch.equal(TIDE(m, None, c).generate(ids, **GENERATE), m.generate(ids, **GENERATE))"
    )
    folders = {"TIDE_CACHE": str(tmp_path / "a b é"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "é长")}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | folders, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
