"""What a call came to, and whether two calls came to the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._dynamo.exc import TorchRuntimeError
from transformers import Cache
from transformers.utils import ModelOutput

from tests.conformance.cases import Setup
from tests.support.compare import assert_close
from tide_compile.errors import TideError

EQUAL, NAMED, WRONG = "equal", "named error", "WRONG"


@dataclass(frozen=True, slots=True)
class Outcome:
    """``value``: what was returned, or None and the ``error``."""

    value: object
    setup: Setup
    error: Exception | None = None


def outcome(run: Callable[[], object], setup: Setup) -> Outcome:
    """Of a call that starts from the same seed as all others."""
    torch.manual_seed(0)
    try:
        return Outcome(run(), setup)
    except Exception as error:
        return Outcome(None, setup, error)


def verdict(got: Outcome, want: Outcome) -> tuple[str, str]:
    """What is to be told of a call, and why. ``want``: stock transformers, or the eager reference. All that is asked of
    the logits of a row that has ended is that they are numbers."""
    if got.error is not None:
        if isinstance(got.error, TideError):
            return NAMED, _first_line(got.error)
        if want.error is not None and (type(got.error) is type(want.error) or _while_traced(got.error, want.error)):
            return EQUAL, f"both raise {_first_line(want.error)}"
        return WRONG, f"raises {_first_line(got.error)}"
    if want.error is not None:
        return WRONG, f"does not raise {_first_line(want.error)}"
    if got.setup.seen != want.setup.seen:
        return WRONG, f"callbacks saw {got.setup.seen}, not {want.setup.seen}"
    try:
        _compare(got.value, want.value, want.setup)
    except AssertionError as error:
        return WRONG, _first_line(error)
    return EQUAL, ""


def _while_traced(error: BaseException, plain: BaseException) -> bool:
    """Whether Dynamo met an error that the model would raise."""
    return isinstance(error, TorchRuntimeError) and str(plain).partition("\n")[0] in str(error)


def _first_line(error: BaseException) -> str:
    line = re.sub(r"\S*/site-packages/", "", str(error).partition("\n")[0])
    return f"{type(error).__name__}: {line}"[:200]


def _compare(got: object, want: object, setup: Setup) -> None:
    if isinstance(want, list | tuple):
        assert isinstance(got, list | tuple) and len(got) == len(want), f"{got} is not {want}"
        for ours, theirs in zip(got, want, strict=True):
            _compare(ours, theirs, setup)
    elif isinstance(want, dict):
        assert list(got) == list(want), f"returns {list(got)}, not {list(want)}"
        assert_tokens(got.sequences, want.sequences)
        for name, theirs in want.items():
            if isinstance(theirs, Cache):
                assert type(got[name]) is type(theirs), f"{name} is {type(got[name]).__name__}"
                assert got[name].get_seq_length() == theirs.get_seq_length(), f"other length of {name}"
            elif isinstance(theirs, tuple | Tensor) and name != "sequences":
                alive = list(_alive(want, setup))
                _compare_steps(name, got[name], theirs, alive)
    else:
        assert_tokens(got, want)


def assert_tokens(got: object, want: Tensor) -> None:
    """The same text."""
    assert isinstance(got, Tensor) and torch.equal(got, want), f"text {got}, not {want}".replace("\n", " ")


def _alive(result: ModelOutput, setup: Setup) -> Iterator[Tensor]:
    """For every generated token, the rows [B] bool that had not ended before; all, where beams change places."""
    new = result.sequences[:, setup.ids.shape[1] :]
    alive = torch.ones(len(new), dtype=torch.bool)
    for step, column in enumerate(new.T):
        yield alive if "beam_indices" in result else alive & (new[:, step:] != setup.pad).any(1)
        if "beam_indices" not in result:
            alive = alive & ~torch.tensor([int(token) in setup.ends for token in column])


def _compare_steps(name: str, got: object, want: object, alive: list[Tensor]) -> None:
    if isinstance(want, Tensor):
        _assert_close(name, got, want)
        return
    assert len(got) == len(want), f"{len(got)} {name}, not {len(want)}"
    for step, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        rows = alive[step] if step < len(alive) else None
        flat = [(ours, theirs)] if isinstance(theirs, Tensor) else list(zip(ours, theirs, strict=True))
        for a, b in flat:
            if rows is None or len(b) != len(rows):
                _assert_close(name, a, b)
            else:
                assert not a.isnan().any(), f"{name} of step {step} have NaN"
                _assert_close(name, a[rows], b[rows])


def _assert_close(name: str, got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    if not want.is_floating_point():
        assert torch.equal(got, want), f"{name} {got.tolist()}, not {want.tolist()}"
        return
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{name}: other infinities"
    if finite.any():
        try:
            assert_close(got[finite], want[finite])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
