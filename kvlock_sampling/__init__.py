"""Variance-scheduled key/value locking and guidance for k-diffusion style samplers on video diffusion transformers.

lock = kv.KVLock(model, source=clip, mask=mask, policy="default")
with lock:
    x0 = samplers.dpmpp_2m(lock, noise, sigmas, extra_args={"cond": prompt})
lock.trace.plot("trace.png")
"""

from importlib import import_module
from typing import Any

from . import masks, samplers
from .attention import Architecture, find_layers, sdpa_layers
from .attention import register as register_architecture
from .denoisers import CFGDenoiser, FlowDenoiser
from .kv_cache import KVCache
from .lock import KVLock
from .policy import PID, Clamped, Constant, Linear, LockAbove, Policy, Sigmoid, Smoothed, Threshold, Windowed, stateless
from .presets import load_policy, to_toml
from .restart import restart
from .trace import Trace
from .types import Control, KVLockError, Observation
from .variance import Estimator, PosteriorVariance, Relative, RenoiseVariance, TrajectoryVariance

__version__ = "0.1.0"

__all__ = [
    "PID",
    "Architecture",
    "CFGDenoiser",
    "Clamped",
    "Constant",
    "Control",
    "Estimator",
    "FlowDenoiser",
    "KVCache",
    "KVLock",
    "KVLockError",
    "Linear",
    "LockAbove",
    "Observation",
    "Policy",
    "PosteriorVariance",
    "Relative",
    "RenoiseVariance",
    "Sigmoid",
    "Smoothed",
    "Threshold",
    "Trace",
    "TrajectoryVariance",
    "Windowed",
    "diffusers",
    "edit_video",
    "find_layers",
    "from_pipeline",
    "load_pipeline",
    "load_policy",
    "masks",
    "register_architecture",
    "restart",
    "samplers",
    "sdpa_layers",
    "stateless",
    "testing",
    "to_toml",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: they bring video codecs and the embedded model along.
    if name == "edit_video":
        return import_module(".app.edit", __name__).edit_video
    if name in ("from_pipeline", "load_pipeline"):
        return getattr(import_module(".integrations.diffusers.models", __name__), name)
    if name == "diffusers":
        return import_module(".integrations.diffusers", __name__)
    if name == "testing":
        return import_module(".testing", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
