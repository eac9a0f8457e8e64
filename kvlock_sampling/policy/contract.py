"""Check what a policy returned, in a run and in `testing.check_policy`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..types import Control, PolicyError


def policy_name(policy: Any) -> str:
    """The name of the policy's class, or of the function under `@stateless`."""
    return getattr(policy, "__name__", None) or type(policy).__name__


def check_control(policy: Any, control: Any, batch: int, tokens: int | None, method: str) -> Control:
    """Check the types and shapes of what `method` returned, without reading values from a device.

    A per-token lock must have `tokens` tokens; None if nothing can be locked.
    """
    name = f"{policy_name(policy)}.{method}"
    if not isinstance(control, Control):
        raise PolicyError(
            f"{name} returned {type(control).__name__}; expected a Control(lock=..., cfg_scale=...)"
            f"{' and the new state: return state, Control(...)' if method == 'step' else ''}."
        )
    for field, value in control._asdict().items():
        if isinstance(value, Tensor):
            shape = tuple(value.shape)
            per_token = field == "lock" and tokens is not None
            if shape not in ((), (batch,)) and not (per_token and shape == (batch, tokens)):
                extra = f" or (batch, tokens) = ({batch}, {tokens})" if per_token else ""
                raise PolicyError(
                    f"{name} returned {field} of shape {shape}; expected (batch,) = ({batch},),{extra} or a float.\n"
                    "  A policy sees one risk per clip, obs.risk of shape (batch,): combine it elementwise."
                )
        elif value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise PolicyError(f"{name} returned {field} of type {type(value).__name__}; expected a tensor or a float.")
    return control


def check_finite(policy: Any, control: Control, method: str) -> None:
    """Check that values are finite, where that costs no transfer from a device."""
    for field, value in control._asdict().items():
        if isinstance(value, Tensor):
            finite = value.device.type != "cpu" or bool(torch.isfinite(value).all())
        else:
            finite = value is None or math.isfinite(value)
        if not finite:
            raise PolicyError(
                f"{policy_name(policy)}.{method} returned {field} with NaN or inf; expected finite numbers.\n"
                "  Is x0-hat finite? obs.risk and obs.variance are NaN if uses_risk is False, and before the first "
                "measurement: do not read them in start."
            )
