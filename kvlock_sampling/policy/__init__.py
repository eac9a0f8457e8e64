"""Policies: from an observation to a control. One policy a file, formula on top; wrappers change any of them."""

from .base import Policy, Stateless, as_policy, stateless
from .constant import Constant
from .linear import Linear
from .pid import PID
from .release import Release, ReleaseBelow
from .sigmoid import Sigmoid
from .threshold import Threshold
from .wrappers import Clamped, PolicyWrapper, Smoothed, Windowed

__all__ = [
    "PID",
    "Clamped",
    "Constant",
    "Linear",
    "Policy",
    "PolicyWrapper",
    "Release",
    "ReleaseBelow",
    "Sigmoid",
    "Smoothed",
    "Stateless",
    "Threshold",
    "Windowed",
    "as_policy",
    "stateless",
]
