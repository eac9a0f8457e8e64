"""What the suites for policies and estimators share: frozen settings, equal answers, nothing changed in place."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..policy.contract import policy_name as name_of
from ..types import KVLockError

__all__ = ["check_settings", "checked_step", "name_of", "same"]


def check_settings(checked: Any, error: type[KVLockError]) -> None:
    """Raise `error` unless `checked` is a frozen dataclass whose repr shows its settings."""
    kind = type(checked).__name__
    params = getattr(type(checked), "__dataclass_params__", None)
    if params is None or not params.frozen:
        raise error(
            f"{kind} can be changed after it was made; expected frozen settings: it serves many runs.\n"
            f"  Write @dataclass(frozen=True) over class {kind}, and keep memory in the state that step returns."
        )
    if " object at 0x" in repr(checked):
        raise error(f"{checked!r} does not show its settings; expected {kind}(...), as a dataclass prints.")


def checked_step(
    step: Callable[[Any, Any], Any],
    state: Any,
    given: Any,
    check: Callable[[Any], None],
    error: type[KVLockError],
    *,
    who: str,
    seen: str,
    pair: str,
    hint: str,
) -> tuple[Any, Any]:
    """Call a `step` twice, and check that it returns a `pair`, changes nothing in place and repeats its answer.

    `check` checks the second half of the answer; `who`, `seen`, `pair` and `hint` are parts of the messages.
    """
    before = copy.deepcopy((state, given))
    answer = step(state, given)
    if type(answer) is not tuple or len(answer) != 2:
        returned = answer if hasattr(answer, "_fields") else type(answer).__name__
        raise error(f"{who} returned {returned}; expected {pair}: return {pair.strip('()')}")
    check(answer[1])
    kept = copy.deepcopy(answer)
    for what, was, now in (("state", before[0], state), (seen, before[1], given)):
        if not same(was, now):
            raise error(
                f"{who} changed the {what} it was given; expected it untouched, to go back to.\n"
                "  Build new tensors (x + 1, torch.where, state._replace) instead of x += 1, x.add_(1) or x[i] = 1."
            )
    if not same(kept, step(state, given)):
        raise error(f"{who} gave two answers to one question at sigma={given.sigma:.3g}, expected one.\n  {hint}")
    return answer


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal bit for bit, NaN to NaN, through tuples, lists, dicts and dataclasses."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        alike = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape
        return alike and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b) or (a != a and b != b)
