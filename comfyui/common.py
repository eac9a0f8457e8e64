"""What the files of nodes share: types, categories, and inputs that older versions of ComfyUI know."""

from __future__ import annotations

import inspect
from typing import Any

from comfy_api.latest import io

CATEGORY = "sampling/kvlock"
PRESETS = (
    "default",
    "release",
    "static",
    "full",
    "half",
    "fast",
    "steady",
    "sigmoid",
    "threshold",
    "pid",
    "paper",
    "off",
)
Policy = io.Custom("KVLOCK_POLICY")
Estimator = io.Custom("KVLOCK_ESTIMATOR")
KVCache = io.Custom("KVLOCK_KV_CACHE")
Lock = io.Custom("KVLOCK_LOCK")

ADVANCED = {"advanced": True} if "advanced" in inspect.signature(io.Float.Input.__init__).parameters else {}


def schema(**given: Any) -> io.Schema:
    """A node's description, without what an older ComfyUI does not know."""
    return io.Schema(**{name: value for name, value in given.items() if name in io.Schema.__dataclass_fields__})


def number(
    name: str, default: float, low: float, high: float, tooltip: str, *, optional: bool = False, step: float = 0.01
) -> Any:
    return io.Float.Input(
        name,
        default=default,
        min=low,
        max=high,
        step=min(step, low or step),  # the page rounds to the decimals of the step
        tooltip=tooltip,
        optional=optional,
        **ADVANCED,
    )
