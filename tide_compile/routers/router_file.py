"""router_file: router files: safetensors with a header in JSON, or a ``router.pt`` of tide-inference."""

from __future__ import annotations

import json
import os
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tide_compile.errors import RouterFileError
from tide_compile.files import write_tensors
from tide_compile.model.decoder import find_decoder
from tide_compile.model.fingerprint import fingerprint
from tide_compile.model.norm import Norm
from tide_compile.routers.networks import TokenRouter

FORMAT = "tide-routers-2"
_PICKLED = (b"PK", b"\x80")  # first bytes of what torch.save writes, and wrote before 1.6


def write_router_file(path: str | Path, tensors: dict[str, Tensor], header: dict[str, object]) -> Path:
    """Write tensors by name, in fp32, and a header of plain values; atomically."""
    whole = {n: t.float().cpu().contiguous() for n, t in tensors.items()}
    return write_tensors(path, whole, {"tide": json.dumps({"format": FORMAT, **header})})


def read_router_file(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors and the header of a file.

    Raises:
        RouterFileError: no such file, not readable, or of another format.
    """
    try:
        with safe_open(path, "pt") as file:
            header = dict(json.loads((file.metadata() or {}).get("tide", "{}")))
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise RouterFileError(f"{str(path)!r} is not a readable router file ({error}). Calibrate again.") from error
    found = header.pop("format", None)
    if found != FORMAT:
        raise RouterFileError(
            f"{str(path)!r} is a safetensors file, but not a router file of format {FORMAT!r} (found {found!r}). "
            "Calibrate again."
        )
    return tensors, header


def is_tide_inference(path: Path) -> bool:
    """Whether this is a file of tide-inference, a pickle of ``torch.save``, whatever its name.

    Raises:
        RouterFileError: no such file, or not readable.
    """
    _require(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise RouterFileError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    return head[8:] != b"{" and head.startswith(_PICKLED)  # a safetensors file: its header's length, and JSON


def read_tide_inference(path: Path, model: nn.Module | None) -> tuple[dict[int, TokenRouter], Norm, int, str]:
    """Routers by layer from a ``router.pt`` of tide-inference, and what that lacks: the norm, the number of layers and
    the fingerprint of the model.

    Raises:
        RouterFileError: no such file, not readable, for another hidden size, or there is no ``model``.
    """
    if model is None:
        raise RouterFileError(
            f"{str(path)!r} is a router file of tide-inference, which lacks the model's norm. Load it with "
            "tide_compile.TIDE(model, router_path=...), or convert it once: "
            "RouterBank.load(path, model=model).save('router.safetensors')."
        )
    hidden_dim, routers = _unpickled(path)
    decoder = find_decoder(model)
    if decoder.hidden_dim != hidden_dim:
        raise RouterFileError(
            f"{str(path)!r} is for models of hidden size {hidden_dim}, this one has {decoder.hidden_dim}."
        )
    return routers, decoder.final_norm(), len(decoder.layers), fingerprint(model.parameters())


def check_router_file(path: Path) -> None:
    """Find out whether there are routers in a file, of either kind, as far as that can be known without a model.

    Raises:
        RouterFileError: there are none.
    """
    if is_tide_inference(path):
        _unpickled(path)
    else:
        read_router_file(path)


def _unpickled(path: Path) -> tuple[int, dict[int, TokenRouter]]:
    """H and the routers by layer."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        routers = {}
        for layer, weights in state["router_layers"].items():
            routers[int(layer)] = TokenRouter(state["hidden_dim"], state["bottleneck_dim"])
            routers[int(layer)].load_state_dict(weights)
    except Exception as error:  # torch.load raises many kinds for a bad file
        known = not isinstance(error, UnpicklingError)  # torch's text of that one advises to run what is in the file
        why = str(error).partition("\n")[0] if known else "it holds something else than tensors and numbers"
        raise RouterFileError(f"{str(path)!r} is not a readable tide-inference router file ({why}).") from error
    return state["hidden_dim"], routers


def _require(path: Path) -> None:
    if os.path.isdir(path):
        raise RouterFileError(f"{str(path)!r} is a folder: name the router file in it.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise RouterFileError(f"{str(path)!r} is a device, a pipe or a socket: name a router file.")
    if not os.path.isfile(path):  # says no, and raises nothing, where one may not look
        raise RouterFileError(
            f"no router file at {str(path)!r}. Make one with tide_compile.calibrate(model, tokenizer, save_path=...)."
        )
