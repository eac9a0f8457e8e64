"""Variance-scheduled key/value locking and guidance for k-diffusion style samplers on video diffusion transformers.

lock = kv.KVLock(model, source=clip, mask=mask, policy="default")
with lock:
    x0 = samplers.dpmpp_2m(lock, noise, sigmas, extra_args={"cond": prompt})
lock.trace.plot("trace.png")
"""

from importlib import import_module
from typing import Any

from . import samplers
from .attention import find_layers, sdpa_layers
from .denoisers import CFGDenoiser, FlowDenoiser
from .kv_cache import KVCache
from .lock import KVLock
from .policy import PID, Constant, Linear, Policy, Sigmoid, Smoothed, Windowed, stateless
from .presets import load_policy, to_toml
from .restart import restart
from .search import search
from .trace import Trace
from .types import Control, KVLockError, Observation
from .variance import TrajectoryVariance

__version__ = "0.1.0"

__all__ = [
    "PID",
    "CFGDenoiser",
    "Constant",
    "Control",
    "FlowDenoiser",
    "KVCache",
    "KVLock",
    "KVLockError",
    "Linear",
    "Observation",
    "Policy",
    "Sigmoid",
    "Smoothed",
    "Trace",
    "TrajectoryVariance",
    "Windowed",
    "edit_video",
    "find_layers",
    "from_pipeline",
    "load_policy",
    "restart",
    "samplers",
    "sdpa_layers",
    "search",
    "stateless",
    "to_toml",
]

_ON_FIRST_USE = {
    "diffusers": (".integrations.diffusers", None),
    "edit_video": (".app.edit", "edit_video"),
    "from_pipeline": (".integrations.diffusers", "from_pipeline"),
    "testing": (".testing", None),
    "video": (".video", None),
}
"""Rooms that need an extra, or that only some users need."""


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _ON_FIRST_USE[name]
    found = import_module(module, __name__)
    return found if attribute is None else getattr(found, attribute)
