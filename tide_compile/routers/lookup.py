"""Which routers belong to a traced model: given, attached, or found in the cache folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from tide_compile.errors import ConfigError, NoRouterError, RouterMismatchError
from tide_compile.files import router_cache, user_path
from tide_compile.model.fingerprint import fingerprint
from tide_compile.routers.bank import RouterBank

_attached: WeakIdKeyDictionary = WeakIdKeyDictionary()
_attachments = 0


def attach(model: nn.Module, bank: RouterBank) -> None:
    """Tie routers to a model, so that ``torch.compile(model, backend="tide")`` finds them.

    The tie is to the model's Parameter objects, held weakly: nothing is written onto the model, and it goes with it.

    Args:
        model: a causal language model. bank: its routers, in place of those that were attached before; whose they are
            is not checked here.
    """
    global _attachments
    _attachments += 1
    for parameter in model.parameters():
        _attached[parameter] = bank


def find_bank(router: str | Path | RouterBank | None, parameters: Iterable[nn.Parameter]) -> RouterBank:
    """The routers for a traced model.

    1. ``router``, a bank or the path of one, if given;
    2. what ``attach`` or ``calibrate`` tied to one of the parameters;
    3. the router cache folder, by fingerprint.

    Raises:
        NoRouterError: none of these.
        RouterMismatchError: the given routers were made for another model.
        RouterFileError: the file cannot be read.
    """
    parameters = list(parameters)
    if router is not None:
        if not isinstance(router, str | Path | RouterBank):
            raise ConfigError(f"router={router!r} is not allowed: give a path or a RouterBank.")
        bank = router if isinstance(router, RouterBank) else RouterBank.load(router)
        if bank.fingerprint is not None and not any(_attached.get(p) is bank for p in parameters):
            _check(bank, fingerprint(parameters), router)
        return bank
    banks = {id(bank): bank for bank in (_attached.get(p) for p in parameters) if bank is not None}
    if len(banks) > 1:
        raise RouterMismatchError(
            f"{len(banks)} router banks are attached to parameters of this model (it shares some with another one). "
            "Say which to use with options={'router': ...}."
        )
    if banks:
        return next(iter(banks.values()))
    cached = cached_file(fingerprint(parameters))
    if os.path.isfile(cached):  # says no, and raises nothing, where one may not look
        return RouterBank.load(cached)
    raise NoRouterError(
        "this model has no routers. Make them once with tide_compile.calibrate(model, tokenizer), or pass "
        f"options={{'router': path}}, or exit_threshold=1.0 to run without exits. (Looked for {cached}.)"
    )


def cached_file(mark: str) -> Path:
    """Where the router cache has the routers of a model with this fingerprint."""
    return router_cache() / f"{mark}.safetensors"


def version_of(router: str | Path | RouterBank | None) -> object:
    """Changes when ``find_bank`` may give another answer: a new attachment, a file written anew. None: the answer of
    before stands (a bank, or a file that is gone)."""
    if isinstance(router, str | Path):
        try:
            status = os.stat(user_path(router))
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino
    return _attachments if router is None else None


def resolve_bank(router: str | Path | RouterBank | None, model: nn.Module) -> RouterBank:
    """As ``find_bank``, for a model at hand: reads ``router.pt`` files of tide-inference as well.

    The bank returned is known to fit this model and is not checked again.
    """
    if isinstance(router, str | Path):
        router = RouterBank.load(router, model=model)
    return replace(find_bank(router, model.parameters()), fingerprint=None)


def _check(bank: RouterBank, found: str, router: object) -> None:
    if bank.fingerprint != found:
        where = repr(str(router)) if isinstance(router, str | Path) else "this RouterBank"
        raise RouterMismatchError(
            f"{where} was calibrated for another model (fingerprint {bank.fingerprint[:12]}, this model has "
            f"{found[:12]}). Calibrate this model, or attach the bank on purpose with tide_compile.attach(model, bank)."
        )
