"""Patches of torch's classes last as long as their block."""

import threading

import pytest

from tide_compile.torch_internals.patching import patched


class Owner:
    def plain(self, x):
        return x

    @classmethod
    def of_class(cls, x):
        return cls, x


def doubling(function):
    return lambda *args: function(*args[:-1], 2 * args[-1])


@pytest.mark.parametrize("name", ["plain", "of_class"])
def test_patches_are_undone(name):
    """Also behind an error, and by the last of blocks that overlap. Catches a wrapper around a wrapper, and one that
    stays."""
    before = vars(Owner)[name]

    def result():
        found = getattr(Owner(), name)(1)
        return found[-1] if isinstance(found, tuple) else found

    first, second = (patched(Owner, name, doubling) for _ in range(2))
    first.__enter__()
    second.__enter__()
    assert result() == 2
    first.__exit__(None, None, None)
    assert result() == 2
    second.__exit__(None, None, None)
    assert result() == 1 and vars(Owner)[name] is before
    with pytest.raises(KeyError), patched(Owner, name, doubling):
        raise KeyError
    assert vars(Owner)[name] is before


def test_a_patch_of_somebody_else_stays():
    """Catches one that is lost because ours was there before."""
    before = vars(Owner)["plain"]
    try:
        with patched(Owner, "plain", doubling):
            Owner.plain = theirs = lambda self, x: 5 * x
        assert vars(Owner)["plain"] is theirs
    finally:
        Owner.plain = before


def test_threads_share_a_patch():
    """Catches one thread that puts back what another still needs."""
    inside, leave = threading.Event(), threading.Event()

    def work():
        with patched(Owner, "plain", doubling):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    with patched(Owner, "plain", doubling):
        pass
    assert Owner().plain(1) == 2
    leave.set()
    thread.join()
    assert Owner().plain(1) == 1
