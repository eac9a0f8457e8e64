"""What a denoiser's methods and signature say about it."""

import inspect
from collections.abc import Mapping
from typing import Any

from ..schedules import check_sigmas


def method_of(model: Any, name: str) -> Any:
    """A method that a denoiser may define to replace a rule of the variance-exploding form; None without it."""
    found = getattr(model, name, None)
    return found if callable(found) else None


def parameters_of(model: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of the denoiser's signature; empty if it has none to read."""
    try:
        return inspect.signature(getattr(model, "forward", model)).parameters
    except (TypeError, ValueError):
        return {}


def default_of(model: Any, name: str) -> Any:
    """The default of a parameter; 1.0 without one."""
    parameter = parameters_of(model).get(name)
    return 1.0 if parameter is None or parameter.default is parameter.empty else parameter.default


def to_sigma(model: Any, model_sigma: float) -> float:
    """A noise level of the model on the policies' clock, in variance-exploding form."""
    to_ve = method_of(model, "to_ve")
    return model_sigma if to_ve is None else float(to_ve(model_sigma))


def on_clock(model: Any, sigmas: Any) -> tuple[float, ...]:
    """A schedule of the model's noise levels on the policies' clock, as floats on the host.

    Raises:
        SamplerError: It is no schedule.
    """
    return tuple(to_sigma(model, level) for level in check_sigmas(sigmas).tolist())
