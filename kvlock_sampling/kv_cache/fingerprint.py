"""Fingerprints (SHA-256) of a model and of content, the same in every process and on every machine."""

import dataclasses
import enum
import functools
import hashlib
import json
import logging
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from inspect import getattr_static
from numbers import Number
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..types import KVCacheError
from ..utils.modules import reachable_modules, unhooked

SAMPLED = 64  # numbers of each weight, evenly spread: they show the order of numbers, which sums do not
BLOCK = 8192  # words of 8 bytes that are summed together

_PLAIN = (Number, str, bytes, bytearray, range, enum.Enum, torch.dtype, torch.device, np.generic, PurePath)


@torch.inference_mode(False)  # where a tensor subclass, such as a quantized weight, cannot be detached
def content_fingerprint(content: Any) -> str:
    """Take the fingerprint of tensors, arrays and plain values in nested mappings, sequences, sets and dataclasses.

    Every byte, shape and dtype counts. The order of keys, the device and the memory layout do not. Raises KVCacheError
    for an object without content that could be compared in another run, e.g. a function.
    """
    text, tensors = hashlib.sha256(), list[Tensor]()
    _add(text, tensors, content, "")
    parts = dict(enumerate(x.detach().contiguous().view(-1).view(torch.uint8) for x in tensors))
    # Those on a device come together, as each transfer waits for all of its work.
    for device in {part.device for part in parts.values()} - {torch.device("cpu")}:
        there = {i: len(part) for i, part in parts.items() if part.device == device}
        parts |= zip(there, torch.cat([parts[i] for i in there]).cpu().split([*there.values()]), strict=True)
    for part in parts.values():
        text.update(part.numpy().data)
    return text.hexdigest()


@torch.inference_mode(False)
def model_fingerprint(model: Any, networks: Iterable[nn.Module] = ()) -> str:
    """Take the fingerprint of a denoiser: class, configuration, settings, adapters, and every weight and saved buffer;
    of hooks, functions, and classes that are no library's also their code, what they close over, and the globals of
    their module that they read. Attributes whose names begin with an underscore do not count.

    A weight counts with its name, shape, dtype, a sample of its numbers and sums over all bytes, which takes as long as
    reading it once. Those offloaded to the meta device have no numbers. `networks` need not be found in the denoiser.
    Raises KVCacheError if no torch module is found in the model.
    """
    modules = list(dict.fromkeys([*reachable_modules(model), *(m for network in networks for m in network.modules())]))
    if not modules:
        raise KVCacheError(
            f"no torch module was found in {type(model).__name__}, so its K/V could not be told from another model's.\n"
            "  Wrap the network in a torch.nn.Module, or leave kv_cache= away."
        )
    seen = {(id(module), True): i for i, module in enumerate(modules)}
    about = f"{type(model).__module__}.{type(model).__qualname__}", _described(model, seen)
    return content_fingerprint([about, [_module(module, seen) for module in modules]])


def _module(module: nn.Module, seen: dict[tuple[int, bool], int]) -> list[Any]:
    """Everything of a module but its submodules."""
    config = getattr(module, "config", None)
    library = sys.modules.get(type(module).__module__.partition(".")[0])
    about: list[Any] = [type(module).__qualname__, module.extra_repr(), str(getattr(library, "__version__", ""))]
    if isinstance(config, Mapping):
        about.append(json.dumps({k: str(v) for k, v in config.items() if not k.startswith("_")}, sort_keys=True))
    # Which adapter (peft) is active is neither a weight nor a public attribute; its scale is one.
    found = {name: getattr(module, name, None) for name in ("active_adapters", "disable_adapters")}
    about += [f"{name}={value}" for name, value in found.items() if isinstance(value, (dict, list, str, bool))]
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    own = __name__.partition(".")[0]  # a probe's hooks are no part of the model, and may be another thread's
    hooks = [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith(own)]
    about += [_class(type(module), seen), *(_described(hook, seen) for hook in hooks), *_settings(vars(module), seen)]
    # A library's module computes alike in both modes, unless it drops or keeps statistics.
    drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    if drops or isinstance(module, nn.modules.batchnorm._NormBase) or not _of_library(type(module)):
        about.append(module.training)
    # A buffer that is not saved is derived from the weights, or is a cache that fills up while the model runs.
    derived = module._non_persistent_buffers_set
    hook = getattr(module, "_hf_hook", None)
    away = [m for h in getattr(hook, "hooks", [hook]) if (m := getattr(h, "weights_map", None))]  # by accelerate
    weights = dict((*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)))
    weights |= {name: held[name] for held in away for name in weights if weights[name].is_meta and name in held}
    about += [[name, *_numbers(weight)] for name, weight in weights.items() if name not in derived]
    saved: dict[str, Any] = {}
    with suppress(Exception):
        module._save_to_state_dict(saved, "", True)
    # Packed weights, which may be made anew, so that their ids say nothing. The extra state may change in a run.
    packed = sorted(saved.keys() - weights.keys() - {"_extra_state"})
    return [*about, *([name, *_described(saved[name], dict(seen))] for name in packed)]


def _settings(attributes: Mapping[str, Any], seen: dict[tuple[int, bool], int]) -> list[Any]:
    """Plain values, tensors and code in public attributes, each object once: a guidance, a scale, a processor."""
    public = {name: value for name, value in attributes.items() if not name.startswith("_") and name != "training"}
    return [[name, *_described(value, seen)] for name, value in sorted(public.items())]


def _described(value: Any, seen: dict[tuple[int, bool], int], *, held: bool = True) -> list[Any]:
    """What an object says about how a model computes. Of a library's object it is the class alone, unless a module or
    an object of the user's holds it: a function may name a whole pipeline.
    """
    if isinstance(value, Tensor):
        return _numbers(value)
    if value is None or isinstance(value, _PLAIN):
        return [] if isinstance(value, torch.device) else [value]
    if isinstance(value, np.ndarray) and value.dtype != object:
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    # A logger leads to all others.
    if isinstance(value, (types.ModuleType, types.BuiltinFunctionType, logging.Logger)):
        return []
    if isinstance(value, nn.Module):  # most are visited on their own
        parts = value.modules() if "_modules" in vars(value) else ()
        new = [module for module in parts if (id(module), True) not in seen]
        seen |= {(id(module), True): len(seen) + i for i, module in enumerate(new)}
        return [_module(module, seen) for module in new]
    if (id(value), held) in seen:  # as a function names it and as a module holds it are two things
        return [seen[id(value), held]]
    seen[id(value), held] = len(seen)
    if isinstance(value, Mapping):
        return [[str(key), *_described(each, seen, held=held)] for key, each in sorted(value.items(), key=repr)]
    if isinstance(value, (set, frozenset)):  # those of objects have no order that lasts
        return sorted(repr(_described(each, dict(seen), held=held)) for each in value)
    if isinstance(value, (list, tuple, deque)):
        return [_described(each, seen, held=held) for each in value]
    if isinstance(value, functools.partial):
        return [_described(each, seen, held=held) for each in (value.func, value.args, value.keywords)]
    if isinstance(value, types.MethodType):
        return [_described(each, seen, held=held) for each in (value.__func__, value.__self__)]
    if isinstance(value, types.FunctionType):
        code, scope = value.__code__, value.__globals__
        cells = zip(code.co_freevars, value.__closure__ or (), strict=True)
        inside = {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}  # which is bound later
        inside |= {"(defaults)": value.__defaults__, "(by keyword)": value.__kwdefaults__}
        inside |= dict(_globals(scope, _names(code), set()))
        return [_code(code), *([name, *_described(each, seen, held=False)] for name, each in sorted(inside.items()))]
    if isinstance(value, type):
        return _class(value, seen)
    kind, inner = type(value), ("__wrapped__", "_torchdynamo_inline", "_init_fn")  # cached, scripted, an operator
    made_of = {n.strip("_"): f for n in inner if isinstance(f := getattr_static(value, n, None), types.FunctionType)}
    if not held and not made_of and _of_library(kind):
        return [kind.__qualname__]
    slots = [n for k in kind.__mro__ for n, v in vars(k).items() if isinstance(v, types.MemberDescriptorType)]
    own = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return [kind.__qualname__, *_class(kind, seen), *_settings(getattr(value, "__dict__", {}) | own | made_of, seen)]


def _names(code: types.CodeType) -> list[str]:
    """The names that a function and the functions in it look up."""
    inner = (name for c in code.co_consts if isinstance(c, types.CodeType) for name in _names(c))
    return [*dict.fromkeys([*code.co_names, *inner])]


def _globals(scope: Mapping[str, Any], names: Sequence[str], met: set[str], of: str = "") -> Iterator[tuple[str, Any]]:
    """What names mean that are no library's functions, also in modules of the user's: `module.part.function`."""
    for name in names:
        known = scope.get(name)
        if isinstance(known, types.ModuleType) and not _of_library(known):
            if known.__name__ not in met:
                met.add(known.__name__)
                yield from _globals(vars(known), names, met, f"{of}{name}.")
        elif not isinstance(known, types.FunctionType) or not _of_library(known):
            yield f"{of}{name}", known


def _class(kind: Any, seen: dict[tuple[int, bool], int]) -> list[Any]:
    """The code of a class that is no library's, such as a network that its author is still writing."""
    found = list[Any]()
    for each in unhooked(kind).__mro__:
        if (id(each), True) not in seen:
            seen[id(each), True] = len(seen)
            methods = {n: getattr(v, "__func__", getattr(v, "fget", v)) for n, v in vars(each).items()}
            code = {n: v for n, v in methods.items() if isinstance(v, types.FunctionType)}
            if _of_library(each):  # of it only functions that are from elsewhere
                homes = {n: sys.modules.get(v.__globals__.get("__name__", ""), v) for n, v in code.items()}
                methods = code = {n: v for n, v in code.items() if not (_of_library(v) and _of_library(homes[n]))}
            found += [[n, *_described(v, seen, held=False)] for n, v in sorted(code.items())]
            found += _settings({n: v for n, v in methods.items() if n not in code}, seen)
    return found


def _of_library(thing: Any) -> bool:
    """Whether a class, function or module is of Python, of an installed package, or of this one."""
    name = getattr(thing, "__name__" if isinstance(thing, types.ModuleType) else "__module__", "") or ""
    file, first = getattr(sys.modules.get(name), "__file__", None) or "", name.partition(".")[0]
    python = () if isinstance(thing, type) else sys.stdlib_module_names  # an object of Python's may hold the user's
    installed = not {"site-packages", "dist-packages"}.isdisjoint(PurePath(file).parts)
    return installed or first in python or first == __name__.partition(".")[0]


def _code(code: types.CodeType) -> list[Any]:
    """What a function does, as this version of Python compiles it."""
    constants = [_code(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    texts = [repr(sorted(map(repr, c)) if isinstance(c, frozenset) else c) for c in constants]
    return [code.co_code, texts, code.co_names]


def block_sums(weight: Tensor) -> Tensor:
    """Sum every `BLOCK` of a tensor's bytes as 8-byte integers: exact on every device, and any changed number shows.

    All bytes of a model are read at every run, because the version counter of a tensor misses writes through `.data`
    (which is how peft fuses a LoRA), numpy, dlpack, the storage or a fused optimizer.
    """
    weight = weight.detach()
    if weight.is_meta or not weight.numel():
        return torch.empty(0, dtype=torch.int64)
    if hasattr(weight, "__tensor_flatten__"):  # a quantized weight and its scales
        return torch.cat([block_sums(getattr(weight, name)) for name in weight.__tensor_flatten__()[0]])
    if type(weight).__torch_dispatch__ is Tensor.__torch_dispatch__:  # else it computes in a way of its own
        weight = weight.as_subclass(Tensor)
    if weight.is_complex():
        weight = torch.view_as_real(weight.resolve_conj())
    data = weight.resolve_neg().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8 or data.data_ptr() % 8:
        data = data.clone()  # 8-byte words must be aligned
    whole = data.numel() // 8
    words, rest = data[: 8 * whole].view(torch.int64), data[8 * whole :]
    blocks, last = words[: whole // BLOCK * BLOCK].view(-1, BLOCK), words[whole // BLOCK * BLOCK :].view(1, -1)
    sums = [part.sum(-1) for part in (blocks, last, rest.view(-1, 1)) if part.numel()]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def _numbers(weight: Tensor) -> list[Any]:
    if is_lazy(weight):
        return [type(weight).__name__]
    weight = weight.dequantize() if weight.is_quantized else weight
    weight = (weight if weight.layout == torch.strided else weight.to_dense()).detach()
    about = [list(weight.shape), str(weight.dtype), block_sums(weight)]
    if weight.is_meta or not weight.numel():
        return about
    if type(weight) is not Tensor and hasattr(weight, "dequantize"):
        weight = weight.dequantize()  # single elements of a quantized weight cannot be read
    return [*about, weight.reshape(-1)[:: -(-weight.numel() // SAMPLED)]]


def _add(text: Any, tensors: list[Tensor], value: Any, path: str) -> None:
    """Add a value with its type and length, so that no two structures give the same bytes."""
    if value is None or isinstance(value, _PLAIN):
        said = repr(value) if isinstance(value, (str, bytes)) else str(value)
        text.update(f"{type(value).__name__} {len(said)} {said}\n".encode())
    elif isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype != object):
        tensors.append(value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value)))
        text.update(f"tensor {tensors[-1].dtype} {tuple(value.shape)}\n".encode())
    elif isinstance(value, Mapping):
        text.update(f"mapping {len(value)}\n".encode())
        for key in sorted(value, key=repr):
            inner = f"{path}[{key!r}]" if path else str(key)
            _add(text, tensors, key, inner)
            _add(text, tensors, value[key], inner)
    elif isinstance(value, (list, tuple, set, frozenset)):
        text.update(f"sequence {len(value)}\n".encode())
        for i, item in enumerate(sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value):
            _add(text, tensors, item, f"{path}[{i}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        _add(text, tensors, [type(value).__qualname__, fields], path)
    else:
        raise KVCacheError(
            f"{path} is a {type(value).__name__}, which has no fingerprint, so its K/V cannot be found again.\n"
            "  Pass tensors and plain values, or leave kv_cache= away."
        )


def mark(part: Any) -> Any:
    """Return what identifies an object, and shows a change in place, without reading its content."""
    if not isinstance(part, Tensor):  # an array in place, for example, shows no change, and is read again
        return (type(part), part) if part is None or isinstance(part, _PLAIN) else object()
    return id(part), None if part.is_inference() else part._version
