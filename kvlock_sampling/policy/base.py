"""The contract of a policy: `init() -> state`, `step(state, observation) -> (state, control)`.

Settings are frozen, state is a value, and the clock is sigma. The smallest policy is a function under `@stateless`. A
policy works elementwise: a clip gets the same answer alone as in a batch. It never sees a model or a mask.
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
    """Whether a function can be called with `count` positional arguments."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # some built-in functions have no signature
        return True
    return True


class Policy(ABC):
    """Base of every policy. Subclass it as `@dataclass(frozen=True)` and define `step`.

    Every built-in policy raises PolicyError for a setting out of range. `kvlock_sampling.testing.check_policy` tests a
    subclass. To change a finished policy, wrap it instead.

    Attributes:
        uses_risk: Whether the policy reads `obs.risk` or `obs.variance`. If False, nothing is measured, both are NaN,
            and `step` is called from the first evaluation on. Defaults to True.
        may_lock: Whether the policy may ever return a lock above 0. If False, the lock looks for no attention layers
            and never evaluates the source. Defaults to True.

    Raises:
        PolicyError: In the class body, if `step` takes other arguments than (self, state, obs).
    """

    uses_risk: ClassVar[bool] = True
    may_lock: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        step = cls.__dict__.get("step")
        if inspect.isfunction(step) and not _takes(step, 3):
            raise PolicyError(
                f"{cls.__name__}.step{inspect.signature(step)}; expected step(self, state, obs) -> (state, control).\n"
                "  Without memory a function is shorter: @stateless over `def name(obs): return Control(...)`."
            )

    def init(self) -> Any:
        """Return the state at the beginning of a run, before any shape is known. Defaults to None: no memory."""
        return None

    @abstractmethod
    def step(self, state: Any, obs: Observation) -> tuple[Any, Control]:
        """Decide at one evaluation of the model.

        Args:
            state: What `init` returned, or the step at a higher sigma. Build a new one; never change it in place.
            obs: What was measured. Its tensors have shape (batch,); `risk`, `variance` and `lock` may be
                (batch, tokens).

        Returns:
            The next state, and the control. Its lock is in [0, 1], a float, (batch,) or shaped like `obs.risk`.
        """

    def start(self, obs: Observation) -> Control:
        """Return the control before the first measurement, when `obs.risk` and `obs.variance` are NaN.

        Defaults to no lock and the requested guidance. A policy that uses no risk takes its first step instead.
        """
        return Control(lock=0.0) if self.uses_risk else self.step(self.init(), obs)[1]


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

    >>> from kvlock_sampling.types import Control
    >>> @stateless
    ... def fade(obs): return Control(lock=obs.risk.clamp(0, 1))
    >>> fade
    stateless(fade)

    Args:
        function: Maps an Observation to a Control.
        uses_risk: Whether the function reads `obs.risk` or `obs.variance`. Defaults to True.

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
        raise PolicyError(f"policy={value!r} is a name; expected a policy or a function: load_policy({value!r})")
    if callable(value):
        return Stateless(value)
    raise PolicyError(
        f"policy={value!r} is of type {type(value).__name__}; expected a Policy or a function of the observation.\n"
        '  These work: PID(target=1.0), load_policy("paper"), preset.policy, or a function under @stateless.'
    )
