"""Early lock:  lock = max(inner lock, lock) at sigma >= above,  the inner policy's own below; guidance always its own.

Range: lock in [0, 1]. The layout of a clip is decided at high noise, before there is anything to measure, so this one
does not wait for a measurement: it holds from the first evaluation on. Source: Follow-Your-Shape (arXiv 2508.08134),
which takes all keys and values from the source in the first k_front = 2 steps; its background was best at 2, worse at
0 and at 4. As ever, the lock asked for at one evaluation acts on the next, so the first evaluation below `above` is
still locked: with `above` between the first and the second noise level, two steps are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..types import Control, Observation
from ._checks import number
from .wrappers import Wrapper


@dataclass(frozen=True)
class LockAbove(Wrapper):
    """Locks at high noise whatever the risk, and leaves the rest of the run to the inner policy.

    above: noise level > 0; at this sigma and higher the lock is at least `lock`.
    lock: the least lock there, in [0, 1].
    The inner policy is stepped there too, so that its memory is warm when it takes over. A run that begins below
    `above`, as edits that start part-way do, is the inner policy's alone. Raises PolicyError for settings out of range.

    >>> from kvlock_sampling.policy import Linear
    >>> LockAbove(Linear(), above=10.0).never_locks
    False
    """

    above: float
    lock: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "above", above=0.0)
        number(self, "lock", at_least=0.0, at_most=1.0)

    def adjust(self, control: Control, obs: Observation) -> Control:
        if obs.sigma < self.above:
            return control
        inner = control.lock
        return control._replace(lock=inner.clamp_min(self.lock) if isinstance(inner, Tensor) else max(inner, self.lock))

    @property
    def never_locks(self) -> bool:
        return self.lock == 0.0 and self.policy.never_locks
