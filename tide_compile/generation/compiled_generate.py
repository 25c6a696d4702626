"""compiled_generate: ``torch.compile(model, backend="tide").generate()`` runs the compiled model.

``OptimizedModule`` hands every unknown attribute to the module it wraps, so its ``generate`` is the original model's
and calls the original forward: no backend is ever reached, and nothing says so. Only ``model.compile(...)`` is free of
this. Importing this package's backend (which ``torch.compile(backend="tide")`` does by itself) therefore makes
``generate`` of modules compiled for tide, and of no others, run through the compiled forward.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import StoppingCriteriaList

from tide_compile.errors import ConfigError
from tide_compile.generation.generate_call import current_call, generate_call
from tide_compile.torch_internals.dynamo import OptimizedModule, backend_name, original_of, replace_attribute
from tide_compile.torch_internals.switches import enabled

_ORIGINAL = "_tide_original"  # in a twin
_EARLY_EXIT = "assistant_early_exit"
_TWIN = "_tide_twin"  # in the OptimizedModule's own __dict__: its __setattr__ would write to the user's model


def install() -> None:
    """Teach modules that are compiled for tide, and no others, about ``generate``; once per process."""
    if "compiled_generate" in enabled():
        replace_attribute("generate", _generate_of)


def _generate_of(compiled: OptimizedModule) -> Callable[..., object] | None:
    return routed_through(compiled).generate if backend_name(compiled) in ("tide", "tide_backend") else None


def routed_through(compiled: OptimizedModule) -> nn.Module:
    """A twin of the wrapped model whose calls run ``compiled``; always the same one.

    Raises:
        ConfigError: the model is a wrapper whose ``generate`` calls the model inside, past what is compiled.
    """
    if _TWIN not in compiled.__dict__:
        model = original_of(compiled)
        if not isinstance(model, GenerationMixin):
            raise ConfigError(
                f"{type(model).__name__}.generate calls the model inside it, which is not the compiled one. Use "
                "tide_compile.TIDE(model), or compile the transformers model inside."
            )
        compiled.__dict__[_TWIN] = twin_of(model, compiled.__call__)
    return compiled.__dict__[_TWIN]


def twin_of(model: PreTrainedModel, call: Callable[..., object]) -> PreTrainedModel:
    """A model that shares all modules, parameters and buffers with ``model``, which stays as it is, and whose calls run
    ``call``. transformers' own compilation of static-cache decoding, which would put plain Inductor in the place of
    tide, is switched off in it."""
    twin = copy.copy(model)
    twin._compiled_call_impl = functools.partial(_forward, twin, call)
    twin._get_stopping_criteria = functools.partial(_stopping_criteria, twin)
    twin._valid_auto_compile_criteria = lambda *_: False
    twin.generate = functools.partial(_generate, twin)
    vars(twin)[_ORIGINAL] = model
    twin.__reduce_ex__ = model.__reduce_ex__  # copies and pickles are those of the model, not compiled
    return twin


def arguments(model: PreTrainedModel, args: tuple, kwargs: dict[str, object]) -> dict[str, object]:
    """Those of a ``generate`` of the model, by name.

    Raises:
        ConfigError: the prompts hold no tokens, or the model would be another one while it drafts.
    """
    names = [*inspect.signature(type(model).generate).parameters][1:]
    asked = {**dict(zip(names, args, strict=False)), **kwargs}
    prompts = (asked.get(name) for name in ("inputs", "input_ids"))
    if asked.get("inputs_embeds") is None and any(isinstance(p, Tensor) and p.numel() == 0 for p in prompts):
        raise ConfigError("The prompts hold no tokens. Give at least one, or none at all to begin with bos_token_id.")
    places = (asked.get("generation_config"), model.generation_config)
    if any(getattr(place, _EARLY_EXIT, None) for place in places) or asked.get(_EARLY_EXIT):
        raise ConfigError(
            f"{_EARLY_EXIT} drafts with the first layers of a model that is compiled with all of them. Call "
            "generate of the model that is not compiled."
        )
    return asked


def _generate(twin: PreTrainedModel, *args: object, **kwargs: object) -> object:
    arguments(twin, args, kwargs)
    with generate_call(twin):
        return type(twin).generate(twin, *args, **kwargs)


def _forward(twin: PreTrainedModel, call: Callable[..., object], *args: object, **kwargs: object) -> object:
    current = current_call(twin)
    return call(*args, **(kwargs if current is None else current.rows.hidden(kwargs)))


def _stopping_criteria(
    twin: PreTrainedModel, generation_config: GenerationConfig, *args: object, **kwargs: object
) -> StoppingCriteriaList:
    criteria = type(twin)._get_stopping_criteria(twin, generation_config, *args, **kwargs)
    current = current_call(twin)
    beams = (generation_config.num_beams or 1) > 1
    goes_on = not any(
        hasattr(criterion, "eos_token_id") for criterion in criteria
    )  # then rows that are done get tokens
    return criteria if current is None or beams or goes_on else current.rows.watched(criteria)


def generating_model(model: nn.Module) -> nn.Module:
    """The transformers model itself, or the one inside a wrapper (adapters, ``torch.compile``, an engine's twin).

    Raises:
        ConfigError: there is none, the wrapper does more than call it, or dropout is active.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"this is a {type(model).__name__} and not a transformers model. Pass the model itself.")
    model = original_of(model)
    dropout = next((name for name, module in model.named_modules() if _drops(module)), None)
    if dropout is not None:
        raise ConfigError(f"{dropout} is in training mode and drops states at random. Call model.eval() first.")
    if isinstance(model, GenerationMixin):
        return vars(model).get(_ORIGINAL, model)
    inner = next((m for m in model.modules() if isinstance(m, GenerationMixin)), None)
    if inner is None:
        raise ConfigError(f"{type(model).__name__} holds no transformers model that generates. Pass one.")
    ids = torch.zeros(1, 2, dtype=torch.long, device=inner.device)
    with torch.no_grad():
        whole, part = (m(input_ids=ids, use_cache=False).logits for m in (model, inner))
    if not torch.equal(whole, part):
        raise ConfigError(
            f"{type(model).__name__} does more than call the {type(inner).__name__} inside it (tokens or states of "
            "its own), and generation with exits would leave that out. Merge it into the model first."
        )
    return inner


def _drops(module: nn.Module) -> bool:
    """Whether a module drops states, as ``nn.Dropout`` or by a rate that it hands to a function."""
    rates = (v for n, v in vars(module).items() if "drop" in n or (n == "p" and "Dropout" in type(module).__name__))
    return module.training and any(isinstance(rate, float) and rate > 0 for rate in rates)
