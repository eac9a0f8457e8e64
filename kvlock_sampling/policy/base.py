"""The contract of a policy: `init() -> state`, `step(state, observation) -> (state, control)`.

A policy never sees a model or a mask. It works elementwise: a clip gets the same answer alone as in a batch.
"""

import functools
import inspect
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from ..types import Control, Observation, PolicyError, SourceError
from ..utils.host import HostReads, Range


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except (TypeError, ValueError) as error:
        return isinstance(error, ValueError)  # some built-in functions have no signature
    return True


class Policy(ABC):
    """Base of every policy. Subclass it as `@dataclass(frozen=True)` and define `step`.

    Every built-in policy raises PolicyError for a setting out of range, and a class body does if its `step` takes other
    arguments than (self, state, obs). `kvlock_sampling.testing.check_policy` tests a subclass.

    Attributes:
        uses_risk: Whether it reads `obs.risk`, `obs.variance` or `obs.effect`. Defaults to True. If False, nothing is
            measured.
        may_lock: Whether it may ever return a lock above 0. If False, no attention layer is touched. Defaults to True.
    """

    uses_risk: ClassVar[bool] = True
    may_lock: ClassVar[bool] = True
    _error: ClassVar[type[PolicyError]] = PolicyError

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forms = {"init": "(self)", "start": "(self, obs)", "step": "(self, state, obs) -> (state, control)"}
        for count, (name, form) in enumerate(forms.items(), 1):
            if inspect.isfunction(given := cls.__dict__.get(name)) and not _takes(given, count):
                raise PolicyError(
                    f"{cls.__name__}.{name}{inspect.signature(given)}; expected {name}{form}, "
                    "or without memory a function: @stateless over `def name(obs): return Control(...)`."
                )

    def init(self) -> Any:
        """Return the state at the beginning of a run, before any shape is known. Defaults to None: no memory."""
        return None

    @abstractmethod
    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        """Decide at one evaluation of the model.

        Args:
            state: What `init` returned, or the step at a higher sigma. Build a new one; never change it in place.
            obs: What was measured, (batch,); `risk`, `variance` and `lock` may be (batch, tokens).

        Returns:
            The next state, and the control. Lock and composite are in [0, 1]: floats, (batch,) or like `obs.risk`.
        """

    def start(self, obs: Observation) -> Control:
        """Return the control before the first measurement. Defaults to no lock; without risk, to the first step's."""
        return Control(lock=0.0) if self.uses_risk else stepped(self, self.init(), obs)[1]


@dataclass(frozen=True, repr=False)
class Stateless(Policy):
    """A function `obs -> Control` as a policy. `stateless` makes it. It can still be called as the function."""

    function: Callable[[Observation], Control]
    uses_risk: bool = True  # type: ignore[misc]  # a setting here, a class attribute in other policies

    def __post_init__(self) -> None:
        if not callable(self.function) or not _takes(self.function, 1):
            raise PolicyError(
                f"stateless({self.function!r}): expected a function of the observation, e.g. "
                "stateless(lambda obs: Control(lock=obs.risk.clamp(0, 1)))."
            )
        for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):  # for help() and for error messages
            default = type(self.function).__name__ if attribute == "__name__" else None
            object.__setattr__(self, attribute, getattr(self.function, attribute, default))

    def __call__(self, obs: Observation) -> Control:
        return self.function(obs)

    def __reduce__(self) -> Any:
        name = getattr(self, "__name__", "")  # under the decorator, the policy's own: by it the policy is pickled
        named = getattr(sys.modules.get(self.__module__), name, None)
        return name if named is self else (Stateless, (self.function, self.uses_risk))

    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        return state, self.function(obs)

    def __repr__(self) -> str:
        return f"stateless({self.__name__}{'' if self.uses_risk else ', uses_risk=False'})"  # type: ignore[attr-defined]


@overload
def stateless(function: Callable[[Observation], Control], *, uses_risk: bool = True) -> Stateless: ...
@overload
def stateless(
    function: None = None, *, uses_risk: bool = True
) -> Callable[[Callable[[Observation], Control]], Stateless]: ...
def stateless(function: Callable[[Observation], Control] | None = None, *, uses_risk: bool = True) -> Any:
    """Make a policy of a function, as `@stateless` or `@stateless(uses_risk=False)`.

    Args:
        function: Maps an Observation to a Control.
        uses_risk: Whether the function reads `obs.risk`, `obs.variance` or `obs.effect`. Defaults to True.

    Returns:
        The policy, or a decorator if no function is given.

    Raises:
        PolicyError: `function` does not take one argument.
    """
    if function is None:
        return functools.partial(stateless, uses_risk=uses_risk)
    return Stateless(function, uses_risk)


def as_policy(value: Any) -> Policy:
    """Return a policy as it is, and a function `obs -> Control` as a policy.

    Args:
        value: A Policy, or a function of an Observation.

    Raises:
        PolicyError: Any other value, including a class or the name of a preset.
    """
    if isinstance(value, Policy):
        return value
    if isinstance(value, type):
        raise PolicyError(f"policy={value.__name__} is a class; expected an object of it: {value.__name__}(...)")
    if isinstance(value, str):
        raise PolicyError(
            f"policy={value!r} is a name; expected a policy or a function: load_policy({value!r}).\n  To keep the "
            f"preset's other settings: dataclasses.replace(kv.presets.load_preset({value!r}), policy=...)."
        )
    if callable(value):
        return Stateless(value)
    raise PolicyError(
        f"policy={value!r} is of type {type(value).__name__}; expected a Policy or a function of the observation, e.g. "
        'PID(target=1.0), Constant(lock=0.5), load_policy("paper"), preset.policy or a function under @stateless.'
    )


def policy_name(policy: Any) -> str:
    """The name of the policy's class, or of the function under `@stateless`."""
    return getattr(policy, "__name__", None) or type(policy).__name__


def stepped(policy: Policy, state: Any, obs: Observation) -> tuple[Any, Control]:
    """One step of a policy. Raises PolicyError unless it returns a state and a Control."""
    result = policy.step(state, obs)
    if not (isinstance(result, tuple) and len(result) == 2) or isinstance(result, Control):
        raise PolicyError(
            f"{policy_name(policy)}.step returned {type(result).__name__}; expected (state, Control).\n"
            "  Return state, Control(lock=...); without memory use @stateless."
        )
    return result[0], known_control(policy, result[1], "step")


def known_control(policy: Policy, control: Any, method: str) -> Control:
    if isinstance(control, Control):
        return control
    steps = method == "step" and not isinstance(policy, Stateless)
    raise PolicyError(
        f"{policy_name(policy)}.{method} returned {type(control).__name__}; expected a Control(lock=..., cfg_scale=...)"
        f"{' and the new state: return state, Control(...)' if steps else ', e.g. Control(lock=0.5)'}."
    )


def check_control(policy: Any, control: Any, batch: int, tokens: int | None, method: str) -> Control:
    """Check types and shapes of what `method` returned, and values that are on the host already: all are finite, and a
    composite weight is in [0, 1]. `tokens` is None if nothing can be per token.
    """
    name = f"{policy_name(policy)}.{method}"
    for field, value in known_control(policy, control, method)._asdict().items():
        if isinstance(value, Tensor):
            shape = tuple(value.shape)
            per_token = field != "cfg_scale" and tokens is not None
            if shape not in ((), (batch,)) and not (per_token and shape == (batch, tokens)):
                extra = f" or (batch, tokens) = ({batch}, {tokens})" if per_token else ""
                raise PolicyError(
                    f"{name} returned {field} of shape {shape}; expected (batch,) = ({batch},),{extra} or a float: "
                    "combine obs.risk elementwise."
                )
        elif value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise PolicyError(f"{name} returned {field} of type {type(value).__name__}; expected a float or a tensor.")
        if value is None or (isinstance(value, Tensor) and not HostReads.free(value)):
            continue
        low, high = HostReads().range(value)
        if field == "composite":
            check_ratio(policy, field, low, high)
        if not math.isfinite(low + high):
            raise PolicyError(
                f"{name} returned {field} with NaN or inf; expected finite numbers.\n  risk and variance are NaN if "
                "uses_risk is False or nothing is measured: do not read them in start.\n  effect is NaN unless it is "
                "measured: estimator=kv.variance.Divergence(patch='model'). To read risk alone: policy='sigmoid'."
            )
    return control


def check_ratio(policy: Any, field: str, low: float, high: float) -> None:
    """Check the smallest and the largest entry of a lock or a composite weight."""
    if low >= 0 and high <= 1:
        return
    found = f"[{low:.9g}, {high:.9g}]"
    if math.isnan(low + high):
        found = "NaN (is x0-hat finite? what is not measured is NaN: an effect needs Divergence)"
    raise PolicyError(
        f"{policy_name(policy)} returned a {field} in {found}; expected [0, 1].\n"
        f"  Return Control({field}=value.clamp(0, 1)), or wrap it: Clamped(policy, {field}=(0.0, 1.0))."
    )


def nothing_to_lock_to(policy: Any, field: str, value: float) -> SourceError:
    """The error of a policy that asks for a lock or a composite weight in (0, 1] without a source."""
    return SourceError(
        f"the policy {policy!r} asks for {field} {value:.3g}, but there is nothing to lock to.\n"
        f"  Pass source=latents, mask=mask, or forbid it: Clamped(policy, {field}=(0.0, 0.0))."
    )


def elapsed(previous: float | None, sigma: float) -> float:
    """Time since `previous` on the clock -log(sigma) of every policy, >= 0; 0 at the first step."""
    return 0.0 if previous is None else max(0.0, math.log(previous / sigma))


def worst(value: Tensor) -> Tensor:
    """The largest value of each clip, (batch, tokens) -> (batch,), because guidance has one scale per clip."""
    return value.amax(dim=tuple(range(1, value.ndim))) if value.ndim > 1 else value


def between(limits: Range, fraction: Tensor) -> Tensor:
    """limits[0] at fraction 0, limits[1] at fraction 1, never outside; `limits` may fall. Keeps shape and dtype."""
    low, high = limits
    return (low + (high - low) * fraction).clamp(min(limits), max(limits))


def scaled_cfg(obs: Observation, limits: Range, fraction: Tensor | float) -> Tensor | None:
    """The requested guidance scale times `between(limits, fraction)`, (batch,); None for limits (1, 1)."""
    if limits == (1.0, 1.0):
        return None
    requested = obs.requested_cfg_scale
    fraction = torch.as_tensor(fraction, device=requested.device)
    return requested * between(limits, worst(fraction)).to(requested.dtype)
