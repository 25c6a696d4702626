"""The mark by which routers are found."""

from tests.support.models import tiny
from tide_compile.model.fingerprint import fingerprint


def test_fingerprint():
    """The same for another dtype, another for other weights; and the traced graph's equals the module's."""
    model = tiny("rmsnorm-rope-gqa")
    mark = fingerprint(model.parameters())
    assert fingerprint(reversed(list(model.parameters()))) == mark
    assert fingerprint(tiny("rmsnorm-rope-gqa", seed=1).parameters()) != mark
    assert fingerprint(model.bfloat16().parameters()) == mark
