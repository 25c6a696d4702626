"""GraphReplay: the graph of a call that is like the ones before it runs with the inputs that they looked up.

The code that Dynamo puts around a graph finds every weight and cache of the model by name, and makes the result: for 30
layers 2,000 steps of the interpreter, through memory that is in none of the processor's caches once a token has read
all weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from types import CodeType, FunctionType
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import Cache
from transformers.utils import ModelOutput

from tide_compile.torch_internals.dynamo import GRAPH

_unchanging: WeakKeyDictionary[CodeType, bool] = WeakKeyDictionary()  # what was found out about code


@dataclass(frozen=True, slots=True)
class _Observed:
    """One call: its arguments, the graph's inputs and results, and what was returned."""

    arguments: dict[str, object]
    inputs: tuple[object, ...]
    results: tuple[object, ...]
    returned: object


class _Looked(Exception):
    """Carries the inputs of a graph that is not to run."""


class GraphReplay:
    """A function of a model in code that Dynamo made of it, with one graph inside.

    The first two calls run that code. If every input of the graph was the same tensor in both of them or one of the
    call's arguments, every field of the result one of the graph's results or the same object in both, and the model and
    its cache keep nothing that the code has changed, further calls run the graph alone. ``is_valid`` tells whether the
    code would still have found the same inputs.
    """

    def __init__(self, code: CodeType, function: FunctionType, replays: bool = True) -> None:
        graphs = [name for name in code.co_names if name.startswith(GRAPH)]
        scope = dict(function.__globals__)
        self._observing = replays and len(graphs) == 1
        if self._observing:
            self._graph: Callable[..., tuple] = scope[graphs[0]]
            scope[graphs[0]] = self._run_graph
        self._code = FunctionType(code, scope, None, function.__defaults__, function.__closure__)
        self._code.__kwdefaults__ = function.__kwdefaults__
        self._looking, self._seen = False, ((), ())
        self._first: _Observed | None = None
        self._plan: _ReplayPlan | None = None

    def __call__(self, model: nn.Module, arguments: dict[str, object]) -> object:
        """The function of a model and its arguments, which are like those of all calls before."""
        if self._plan is not None:
            return self._plan(self._graph, arguments)
        if not self._observing:
            return self._code(model, **arguments)
        if self._first is None:
            returned = self._code(model, **arguments)
            self._first = _Observed(arguments, *self._seen, returned)
        else:
            returned, unchanged = self._watched(model, arguments)
            if unchanged:
                self._plan = _ReplayPlan.of(self._first, _Observed(arguments, *self._seen, returned))
            self._observing, self._first = False, None
        self._seen = (), ()
        return returned

    def _watched(self, model: nn.Module, arguments: dict[str, object]) -> tuple[object, bool]:
        """The result of a call, and whether it left the model and its cache as they were, but for what tensors hold."""
        code = self._code.__code__
        before = None if code in _unchanging else _state(model, arguments)
        returned = self._code(model, **arguments)
        if before is not None:
            after = _state(model, arguments)
            _unchanging[code] = len(before) == len(after) and all(map(is_, before, after))
        return returned, _unchanging[code]

    def is_valid(self, model: nn.Module, arguments: dict[str, object]) -> bool:
        """Whether the model's weights and caches are still those that the graph was given."""
        if self._plan is None:
            return True
        self._looking = True
        try:
            self._code(model, **arguments)
        except _Looked as looked:
            return self._plan.has(looked.args)
        finally:
            self._looking = False
        return False

    def _run_graph(self, *inputs: object) -> tuple:
        if self._looking:
            raise _Looked(*inputs)
        results = self._graph(*inputs)
        self._seen = inputs, results
        return results


@dataclass(frozen=True, slots=True)
class _ReplayPlan:
    """``steady``: the graph's inputs, None for those that are arguments, whose names are in ``own`` by position.
    ``fields``: of the result, the position among the graph's results; ``constants``: those that stay as they are."""

    steady: tuple[object, ...]
    own: dict[int, str]
    kind: type[ModelOutput]
    fields: dict[str, int]
    constants: dict[str, object]

    @classmethod
    def of(cls, first: _Observed, second: _Observed) -> _ReplayPlan | None:
        """What two calls have in common, if it tells all of a third."""
        steady, own = [], {}
        for position, (before, now) in enumerate(zip(first.inputs, second.inputs, strict=True)):
            name = next((n for n, value in second.arguments.items() if value is now), None)
            if name is not None and first.arguments[name] is before:
                own[position] = name
            elif not (isinstance(now, Tensor) and now is before):
                return None
            steady.append(None if position in own else now)
        if not isinstance(second.returned, ModelOutput):
            return None
        fields, constants = {}, {}
        for name, value in second.returned.items():
            before = first.returned.get(name)
            position = next((i for i, result in enumerate(second.results) if result is value), None)
            if position is not None and before is first.results[position]:
                fields[name] = position
            elif value is before:
                constants[name] = value
            else:
                return None
        return cls(tuple(steady), own, type(second.returned), fields, constants)

    def __call__(self, graph: Callable[..., tuple], arguments: dict[str, object]) -> ModelOutput:
        inputs = list(self.steady)
        for position, name in self.own.items():
            inputs[position] = arguments[name]
        results = graph(*inputs)
        return self.kind(**{name: results[position] for name, position in self.fields.items()}, **self.constants)

    def has(self, inputs: tuple[object, ...]) -> bool:
        """Whether these are the graph's inputs, but for the arguments of the call."""
        return all(
            position in self.own or now is before
            for position, (now, before) in enumerate(zip(inputs, self.steady, strict=True))
        )


def _state(model: nn.Module, arguments: dict[str, object]) -> list[object]:
    """All that the attributes of the model's modules and of its cache are, or hold as lists and dicts."""
    caches = [value for value in arguments.values() if isinstance(value, Cache)]
    owners = [*model.modules(), *caches, *(layer for cache in caches for layer in cache.layers)]
    found = []
    for value in (value for owner in owners for value in vars(owner).values()):
        found.append(value)
        if isinstance(value, dict | list):
            found += value.values() if isinstance(value, dict) else value
    return found
