"""What a policy is:  (state, observation) -> (state, control).  Settings frozen, state a value, the clock is sigma.

The smallest policy is a function under `@stateless`; one with memory is a frozen dataclass with `init` and `step`. Both
are elementwise: they must give a clip the same answer alone as in a batch, and never look at a model or a mask.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, overload

from ..types import Control, Observation, PolicyError


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # some built-in functions have no signature to read
        return True
    return True


class Policy(ABC):
    """Base of every policy. Subclass it as `@dataclass(frozen=True)`; wrap a finished policy rather than subclass it.

    uses_risk: False says that the policy never reads `obs.risk` or `obs.variance`. Nothing is measured then, and both
        are NaN. A class attribute, so write `uses_risk = False` in the class body.

    The least that works is `step(self, state, obs) -> (state, Control)`; `kv.testing.check_policy` tries the rest.
    Raises PolicyError where a class is written whose `step` takes other arguments.
    """

    uses_risk: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        step = cls.__dict__.get("step")
        if inspect.isfunction(step) and not _takes(step, 3):
            raise PolicyError(
                f"{cls.__name__}.step{inspect.signature(step)}; expected step(self, state, obs) -> (state, control).\n"
                "  Without memory a function is shorter: @stateless over `def name(obs): return Control(...)`."
            )

    def init(self) -> Any:
        """State at the beginning of a run, before any shape is known. Any value; None for a policy without memory."""
        return None

    @abstractmethod
    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        """One evaluation of the model: the next state, and what to do.

        state: as returned by `init` or by the step at a higher sigma. Build a new one, never change this one in place.
        obs: tensors of shape (batch,); `risk` and `variance` may be (batch, tokens), `cfg_scale` never is.
        Returns `Control(lock, cfg_scale)`: lock in [0, 1], shaped like `obs.risk` or (batch,) or a float, acts on the
        next evaluation; cfg_scale, (batch,) or a float, acts on this one.
        """

    def start(self, obs: Observation) -> Control:
        """What holds before there is a first measurement; `obs.risk` and `obs.variance` are NaN.

        No lock and the caller's guidance; a policy that measures nothing simply takes its first step.
        """
        if not self.uses_risk:
            return self.step(self.init(), obs)[1]
        return Control(lock=0.0, cfg_scale=obs.cfg_scale)

    @property
    def never_locks(self) -> bool:
        """True only where this policy provably never asks for lock > 0, so that no source need be evaluated."""
        return False


@dataclass(frozen=True, repr=False)
class Stateless(Policy):
    """A function `obs -> Control` as a policy. Made by `@stateless`; still callable as the function it was."""

    function: Callable[[Observation], Control]
    uses_risk: bool = True  # type: ignore[misc]  # a setting here, a class attribute everywhere else

    def __post_init__(self) -> None:
        if not callable(self.function) or not _takes(self.function, 1):
            raise PolicyError(
                f"stateless({_name(self.function)}): expected a function of the observation. For example\n"
                "  stateless(lambda obs: Control(lock=obs.risk.clamp(0, 1), cfg_scale=obs.cfg_scale))"
            )
        for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):  # help() shows the function's own words
            if hasattr(self.function, attribute):
                object.__setattr__(self, attribute, getattr(self.function, attribute))

    def __call__(self, obs: Observation) -> Control:
        return self.function(obs)

    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        return state, self.function(obs)

    def __repr__(self) -> str:
        return f"stateless({_name(self.function)}{'' if self.uses_risk else ', uses_risk=False'})"


@overload
def stateless(function: Callable[[Observation], Control], *, uses_risk: bool = True) -> Stateless: ...
@overload
def stateless(
    function: None = None, *, uses_risk: bool = True
) -> Callable[[Callable[[Observation], Control]], Stateless]: ...
def stateless(function: Callable[[Observation], Control] | None = None, *, uses_risk: bool = True) -> Any:
    """Makes a policy of a one-line function. `@stateless(uses_risk=False)` for one that needs no measurement.

    function: from an Observation to a Control, whose tensors are (batch,). Raises PolicyError for anything else.

    >>> from kvlock_sampling.types import Control
    >>> @stateless
    ... def fade(obs): return Control(lock=obs.risk.clamp(0, 1), cfg_scale=obs.cfg_scale)
    >>> fade
    stateless(fade)
    """
    if function is None:
        return functools.partial(stateless, uses_risk=uses_risk)
    return Stateless(function, uses_risk)


def as_policy(value: Any) -> Policy:
    """A policy from a policy or a function `obs -> Control`. Raises PolicyError for anything else, names included."""
    if isinstance(value, Policy):
        return value
    if isinstance(value, type):
        raise PolicyError(f"policy={value.__name__} is a class; expected an object of it: {value.__name__}(...)")
    if isinstance(value, str):
        raise PolicyError(f"policy={value!r} is a name; expected a policy or a function: load_policy({value!r})")
    if callable(value):
        return Stateless(value)
    raise PolicyError(
        f"policy={value!r} is of type {type(value).__name__}; expected a Policy or a function of the observation.\n"
        '  These work: PID(target=1.0), load_policy("paper"), or a function under @stateless.'
    )


def _name(value: Any) -> str:
    if isinstance(value, Stateless):
        return _name(value.function)
    return getattr(value, "__name__", None) or type(value).__name__
