"""What a denoiser's methods and signature say about it, and a proxy: samplers and scripts look for more than a call."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..schedules import check_sigmas
from ..types import Denoiser, RunError

_RETURNS_SELF = {"to", "eval", "train", "requires_grad_", "half", "bfloat16", "float", "double", "cpu", "cuda", "type"}
"""Methods of a module that return the module. On a proxy they return the proxy, so that a chain of calls keeps it."""


def method_of(model: Any, name: str) -> Any:
    """A method that a denoiser may define to replace a rule of the variance-exploding form; None without it."""
    if name == "add_noise" and method_of(model, "to_ve") is None:  # a helper of the model's training
        return None
    found = getattr(model, name, None)
    return found if callable(found) and not isinstance(found, nn.Module) else None


def parameters_of(model: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of the denoiser's signature; empty if it has none to read."""
    if isinstance(model, nn.Module):  # compiled: its own signature says nothing
        model = vars(model).get("_modules", {}).get("_orig_mod", model)
    try:
        return inspect.signature(getattr(model, "forward", model)).parameters
    except (TypeError, ValueError):
        return {}


def accepts(model: Any, name: str) -> bool:
    """Whether the denoiser takes an argument of this name, as far as its signature tells."""
    known = parameters_of(model)
    return not known or name in known or any(p.kind is p.VAR_KEYWORD for p in known.values())


def to_sigma(model: Any, model_sigma: float) -> float:
    """A noise level of the model on the policies' clock, in variance-exploding form."""
    to_ve = method_of(model, "to_ve")
    return model_sigma if to_ve is None else float(to_ve(model_sigma))


def on_clock(model: Any, sigmas: Any) -> tuple[float, ...]:
    """A schedule of the model's noise levels on the policies' clock, as floats; SamplerError if it is none."""
    return tuple(to_sigma(model, level) for level in check_sigmas(sigmas).tolist())


class DenoiserProxy:
    """A wrapper with every attribute of `model` that it does not define, and with a `forward` like a module."""

    model: Denoiser
    __call__: Callable[..., Tensor]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "model" not in self.__dict__:
            raise AttributeError(name)
        found = getattr(self.model, name)
        if name in _RETURNS_SELF and callable(found):
            return lambda *arguments, **options: (found(*arguments, **options), self)[1]
        return found

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        return self(x, sigma, **extra_args)


def check_no_lock_inside(model: Any) -> None:
    """Raise RunError for a model that is a lock, or a wrapper around one."""
    seen, inside = set(), model
    while inside is not None and id(inside) not in seen:
        seen.add(id(inside))
        if isinstance(inside, DenoiserProxy):
            where = "model is a KVLock" if inside is model else f"model is a {type(model).__name__} around a KVLock"
            raise RunError(
                f"{where}; expected the denoiser itself: two locks would fuse, guide and composite twice.\n"
                "  Make one lock of it: KVLock(lock.model, source=..., mask=..., policy=...)\n"
                "  Two policies in one: kv.Windowed(kv.Sigmoid(), above=1.0)."
            )
        held = [vars(inside), vars(inside).get("_modules", {})] if hasattr(inside, "__dict__") else []
        # A wrapper keeps the denoiser under one of these names.
        inside = next((p[name] for name in ("inner_model", "model") for p in held if name in p), None)
