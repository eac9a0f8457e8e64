"""Policies: from what was observed to what to do. One per file, formula on top; combinators wrap any of them."""

from .base import Policy, Stateless, as_policy, stateless
from .constant import Constant
from .linear import Linear
from .lock_above import LockAbove
from .pid import PID
from .sigmoid import Sigmoid
from .threshold import Threshold
from .wrappers import Clamped, Smoothed, Windowed, Wrapper

__all__ = [
    "PID",
    "Clamped",
    "Constant",
    "Linear",
    "LockAbove",
    "Policy",
    "Sigmoid",
    "Smoothed",
    "Stateless",
    "Threshold",
    "Windowed",
    "Wrapper",
    "as_policy",
    "stateless",
]
