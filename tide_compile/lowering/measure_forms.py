"""measure_forms: which form of a product is fastest here, measured once per shape and kept in the cache folder."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tide_compile.errors import OutputFileError
from tide_compile.files import cache_folder, write_text
from tide_compile.kernels.cpu.linear import packed_linear, template_linear
from tide_compile.kernels.few_rows import FEW_ROWS
from tide_compile.lowering.compile_piece import compile_graph
from tide_compile.lowering.machine_name import machine_name
from tide_compile.passes.aten.gemm_forms import (
    ALONE,
    CHUNKS,
    TOGETHER,
    Form,
    Linears,
    possible_forms,
    stream,
)
from tide_compile.torch_internals.fx import FakeTensorMode, alone

log = logging.getLogger("tide_compile")

Candidate = Callable[[Tensor, Tensor, Sequence[Tensor]], object]  # takes x, a weight, and the same weight in parts

WORKING_SET = 1 << 28  # bytes of weights that are read in turn, so that they come from memory, as in a model
_PARTS = 2 * CHUNKS  # a step of a loop for any size has more to do, so that it needs more parts for the same speed
ROUNDS, _LEAST = 5, 0.2  # rounds, and seconds for all of them: a short disturbance must not decide
_OPERATIONS = 2e9  # of one product, and of those that are measured in turn: beyond that multiplying takes the time
_FAR = 1.5  # times as long as another form: it need not be measured again
_CALL = 10e-6  # seconds that a call between the loops of a segment costs, apart from what it computes


def known_forms(found: Iterable[Linears], pack_weights: bool = False, template: bool = True) -> dict[Linears, Form]:
    """The fastest forms of those products that were measured before, or that have one form only."""
    known = _load().get(machine_name(), {})
    forms = {}
    for linears in found:
        possible = possible_forms(linears, pack_weights, template)
        form = possible[0] if len(possible) == 1 else known.get(_key(linears, possible))
        if form in possible:
            forms[linears] = form
    return forms


def begin_measuring(found: Iterable[Linears]) -> None:
    """Compile what measuring these products needs, together with what else is being compiled."""
    for linears in found:
        if linears.rows <= FEW_ROWS:
            _streamed(linears.rows, linears.dtype, linears.stored)


def fastest_forms(found: Iterable[Linears], pack_weights: bool = False, template: bool = True) -> dict[Linears, Form]:
    """The fastest form of products on this machine's CPU, measured in some 0.3 s each unless it is known
    (with ``pack_weights`` 2 s: a template is compiled).

    Results are kept in ``linears.json`` in the cache folder, by processor, threads and torch version.

    Args:
        pack_weights: whether copies of the weights may be kept.
        template: whether Inductor's template is tried for them.
    """
    found = set(found)
    forms, measured = known_forms(found, pack_weights, template), {}
    calls = {"stream": 0} | dict.fromkeys(TOGETHER, 1)  # others: one for each weight
    for linears in sorted(found - forms.keys(), key=str):
        possible = possible_forms(linears, pack_weights, template)
        seconds = seconds_of(candidates(linears, possible), linears)
        fastest = min(seconds, key=lambda form: seconds[form] + _CALL * calls.get(form, len(linears.outs)))
        forms[linears] = measured[_key(linears, possible)] = fastest
        log.debug("%s: %s", linears, ", ".join(f"{form} {s * 1e6:.0f} us" for form, s in seconds.items()))
    if measured:
        known = _load()
        known[machine_name()] = known.get(machine_name(), {}) | measured
        try:
            write_text(_path(), json.dumps(known, indent=1, sort_keys=True))
        except OutputFileError as error:
            _say_once(f"what was measured is not kept for the next process: {error}")
    return forms


def _key(linears: Linears, possible: Sequence[Form]) -> str:
    return f"{linears} as {', '.join(possible)}"


def candidates(linears: Linears, possible: Sequence[Form]) -> dict[Form, Candidate]:
    """What computes a product in each of these forms."""

    def one_by_one(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, _: Tensor, parts: Sequence[Tensor]) -> None:
        for weight in parts:
            product(x, weight).contiguous()  # as whatever reads the result may want it

    def candidate(form: Form) -> Candidate:
        if form == "stream":
            streamed = _streamed(linears.rows, linears.dtype, linears.stored)
            return lambda x, weight, _: streamed(x, weight)
        if form == "template":
            return lambda x, _, parts: _templated(x.shape[0], tuple(w.shape[0] for w in parts), linears)(x, *parts)
        if form == "packed":
            return lambda x, _, parts: packed_linear(x, parts)
        return functools.partial(one_by_one, ALONE.get(form, _aten))

    return {form: candidate(form) for form in possible}


def _aten(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight.to(x.dtype))


@functools.cache
def _streamed(rows: int, dtype: torch.dtype, stored: torch.dtype) -> Callable[[Tensor, Tensor], object]:
    """``stream`` compiled for weights of any size, in ``_PARTS``."""
    example = torch.ones(rows, 8 * _PARTS, dtype=dtype), torch.ones(16 * _PARTS, 8 * _PARTS).to(stored)

    def product(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        size = weight.shape[0] // _PARTS
        return (stream(x, [weight.narrow(0, i * size, size) for i in range(_PARTS)]),)

    with alone():  # else the sizes become symbols of the model that is being compiled
        graph = make_fx(product, tracing_mode="symbolic")(*example)
    for node in graph.graph.nodes:
        node.type = None  # an annotation as text, which AOTAutograd's cache takes for a class
    return compile_graph(graph, [n.meta["val"] for n in graph.graph.find_nodes(op="placeholder")])


@functools.cache
def _templated(rows: int, outs: tuple[int, ...], linears: Linears) -> Callable[..., object]:
    """``template_linear`` compiled for weights of these sizes."""
    with FakeTensorMode():
        fakes = [torch.empty(n, linears.ins, dtype=linears.dtype) for n in (rows, *outs)]
    with alone():
        graph = make_fx(lambda *given: (template_linear(given[0], given[1:]),))(*fakes)
    return compile_graph(graph, fakes)


def seconds_of(
    products: dict[Form, Candidate], linears: Linears, of: Callable[[list[float]], float] = min
) -> dict[Form, float]:
    """``of`` the rounds of each product, in which they take turns: the least compares them, because whatever else the
    machine does adds; the median is what to expect. Of very large weights a part will do."""
    total, per_row = sum(linears.outs), linears.ins * linears.stored.itemsize
    most = min(WORKING_SET / (2 * per_row), _OPERATIONS / (2 * linears.rows * linears.ins))
    outs = min(total, int(most)) // _PARTS * _PARTS or _PARTS
    operations = 2 * linears.rows * linears.ins * outs
    count = max(2, min(256, WORKING_SET // (outs * per_row), int(_OPERATIONS // operations)))
    x = torch.ones(linears.rows, linears.ins, dtype=linears.dtype)
    ends = [sum(linears.outs[:i]) * outs // total for i in range(1, len(linears.outs))]  # in their proportions
    whole = torch.ones(count, outs, linears.ins, dtype=linears.stored).unbind()
    weights = [(weight, weight.tensor_split(ends)) for weight in whole]
    for form, product in list(products.items()):
        try:
            once(product, x, weights if form in TOGETHER else weights[:1])
        except Exception as error:  # of a library, or of Inductor's template
            if form == "aten":
                raise
            log.warning("%s is not tried as %s, which failed: %s", linears, form, error)
            del products[form]
    seconds: dict[Form, list[float]] = {form: [once(product, x, weights)] for form, product in products.items()}
    while max(map(len, seconds.values())) < ROUNDS or sum(map(sum, seconds.values())) < _LEAST:
        least = min(map(min, seconds.values()))
        for form, product in products.items():
            if min(seconds[form]) < _FAR * least:
                seconds[form].append(once(product, x, weights))
    return {form: of(rounds) / count * total / outs for form, rounds in seconds.items()}


def once(product: Callable[..., object], x: Tensor, others: Iterable[tuple]) -> float:
    started = time.perf_counter()
    for operands in others:
        product(x, *operands)
    return time.perf_counter() - started


def _path() -> Path:
    return cache_folder() / "linears.json"


def _load() -> dict[str, dict[str, Form]]:
    """Forms by product, by machine."""
    try:
        known = json.loads(_path().read_text(encoding="utf-8"))
        return {machine: {name: form for name, form in forms.items()} for machine, forms in known.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, AttributeError) as error:  # of a file with other things in it, too
        _say_once(f"{str(_path())!r} cannot be read, and products are measured anew: {error}")
        return {}


@functools.cache
def _say_once(what: str) -> None:
    log.warning("%s", what)
