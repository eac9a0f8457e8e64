"""What the suites for policies and estimators share: frozen settings, equal answers, nothing changed in place."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..policy.base import policy_name
from ..types import KVLockError


class Contract(NamedTuple):
    """A policy or estimator, the error to raise, and names and a check of what `step(state, given)` returns."""

    checked: Any
    error: type[KVLockError]
    given: str
    returned: str
    check: Callable[[Any, Any], None]

    @property
    def name(self) -> str:
        return policy_name(self.checked)

    def check_settings(self) -> None:
        kind = type(self.checked).__name__
        params = getattr(type(self.checked), "__dataclass_params__", None)
        if params is None or not params.frozen:
            raise self.error(
                f"{kind} can be changed after it was made; expected frozen settings.\n"
                f"  Write @dataclass(frozen=True) over class {kind}, and keep memory in the state that step returns."
            )
        if " object at 0x" in repr(self.checked):
            raise self.error(f"{self.checked!r} does not show its settings; expected {kind}(...) as of a dataclass.")

    def attempt(self, method: str, *arguments: Any) -> Any:
        """Call a method; an error of another kind becomes one that says what the method was given."""
        try:
            return getattr(self.checked, method)(*arguments)
        except self.error:
            raise
        except Exception as error:
            tensors = {name: v for name, v in arguments[-1]._asdict().items() if isinstance(v, Tensor)}
            shapes = ", ".join(f"{name} of shape {tuple(v.shape)}, {v.dtype}" for name, v in tensors.items())
            problem = f"{self.name}.{method} raised {type(error).__name__}: {error}"
            raise self.error(f"{problem}\n  It was given {shapes}.") from error

    def step(self, state: Any, given: Any) -> tuple[Any, Any]:
        """Step twice; check that a pair returns, that nothing is changed in place, and that the answer repeats."""
        who, before = f"{self.name}.step", copy.deepcopy((state, given))
        answer = self.attempt("step", state, given)
        if type(answer) is not tuple or len(answer) != 2:
            shown = answer if hasattr(answer, "_fields") else type(answer).__name__
            pair = f"state, {self.returned}"
            raise self.error(f"{who} returned {shown}; expected ({pair}): return {pair}")
        self.check(answer[1], given)
        kept = copy.deepcopy(answer)
        for what, was, now in (("state", before[0], state), (self.given, before[1], given)):
            if not same(was, now):
                raise self.error(
                    f"{who} changed the {what} it was given; expected it untouched.\n"
                    "  Build new tensors (x + 1, torch.where, state._replace) instead of x += 1, x.add_(1) or x[i] = 1."
                )
        if not same(kept, self.attempt("step", state, given)):
            raise self.error(
                f"{who} gave two answers to one question at sigma={given.sigma:.3g}, expected one.\n  All memory must "
                "be in the state, none in self or globals; a generator of random draws is seeded by settings and state."
            )
        return answer

    def play(self, state: Any, run: list[Any]) -> tuple[list[Any], list[Any]]:
        """All states, including the given one, and all answers of a run; every step is checked."""
        states, answers = [state], []
        for given in run:
            state, answer = self.step(state, given)
            states.append(state)
            answers.append(answer)
        return states, answers

    def check_rewind(self, run: list[Any], states: list[Any], answers: list[Any]) -> None:
        """Check that a restored state continues as before."""
        for index in (0, len(run) // 2):
            if not same(self.play(states[index], run[index:])[1], answers[index:]):
                raise self.error(
                    f"{self.name}.step answered otherwise when the state of sigma={run[index].sigma:.3g} was restored; "
                    "expected the same: all memory must be in the state."
                )


def one_clip(given: Any, clip: int) -> Any:
    """An observation or evaluation of one clip of the batch."""
    return given._make(v[clip : clip + 1] if isinstance(v, Tensor) else v for v in given)


def rows(value: Any, at: slice) -> Tensor:
    """An answer of one clip as numbers; none if it is None."""
    value = torch.as_tensor([] if value is None else value).cpu().double()
    return (value[at] if value.ndim else value).flatten()


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal bit for bit, NaN to NaN, through tuples, lists, dicts and dataclasses."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        alike = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape
        return alike and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str | bytes):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and same(a.tolist(), b.tolist())
    plain = type(a).__eq__ is object.__eq__ and hasattr(a, "__dict__") and not isinstance(a, FunctionType)
    if plain and type(a) is type(b):
        return a is b or same(vars(a), vars(b))
    return bool(a == b) or (a != a and b != b)
