"""What becomes of a policy's word: checked at the door, brought to rows, bounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .types import Control, PolicyError, Scalar

Extremes = tuple[float, float]


class HostReads:
    """Ranges of tensors as floats, read from their device together: one wait for it, however many there are.

    One object serves one evaluation: a tensor that was read is not read again, whatever becomes of it.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Extremes]] = {}

    def together(self, *values: Any) -> None:
        """Read the ranges of those that are tensors and not known yet."""
        new = {id(v): v for v in values if isinstance(v, Tensor) and v.numel() and id(v) not in self._known}
        for device in {v.device for v in new.values()}:
            here = [v for v in new.values() if v.device == device]
            # Through float64, which holds every float32 exactly; where a device has none its own numbers stay alone.
            wide = torch.float32 if device.type == "mps" else torch.float64
            ends = torch.stack([end.to(wide) for v in here for end in v.detach().aminmax()]).tolist()
            for v, low, high in zip(here, ends[::2], ends[1::2], strict=True):
                self._known[id(v)] = v, (low, high)

    def extremes(self, value: Scalar) -> Extremes:
        """Smallest and largest entry."""
        if not isinstance(value, Tensor):
            return float(value), float(value)
        self.together(value)
        return self._known[id(value)][1]


def extremes(value: Scalar) -> Extremes:
    """Smallest and largest entry as floats: one read from the device for a tensor, none for a float."""
    return HostReads().extremes(value)


class LockRatio:
    """A lock ratio with its range known on the host: a float, (batch,) or (batch, tokens), in [0, 1].

    Raises:
        PolicyError: out of range, or not a number.
    """

    def __init__(self, value: Scalar, batch: int, policy: Any, reads: HostReads | None = None) -> None:
        self.value, self.batch = value, batch
        self.low, self.high = (reads or HostReads()).extremes(value)
        if not (self.low >= 0 and self.high <= 1):
            what = (
                "NaN (is x0-hat finite? with uses_risk=False risk is NaN)"
                if math.isnan(self.low + self.high)
                else f"[{self.low:.4g}, {self.high:.4g}]"
            )
            raise PolicyError(
                f"{policy_name(policy)} returned a lock in {what}; expected [0, 1].\n"
                "  Return Control(lock=value.clamp(0, 1), ...), or wrap it: Clamped(policy, lock=(0.0, 1.0))."
            )

    @property
    def active(self) -> bool:
        """Whether any clip is locked at all."""
        return self.high > 0

    def rows(self, device: torch.device) -> Tensor:
        """As a float32 tensor (batch,) or (batch, tokens)."""
        if isinstance(self.value, Tensor) and self.value.ndim:
            return self.value.to(device, torch.float32)
        return torch.full((self.batch,), float(self.value), device=device)


def policy_name(policy: Any) -> str:
    """The class, or the function under `@stateless`."""
    return getattr(policy, "__name__", None) or type(policy).__name__


def check_control(policy: Any, control: Any, batch: int, tokens: int | None, method: str) -> Control:
    """Check the shapes of what a policy returned, without reading its values from the device.

    Raises:
        PolicyError: says what was returned, what is expected, and what to write.
    """
    name = f"{policy_name(policy)}.{method}"
    if not isinstance(control, Control):
        raise PolicyError(
            f"{name} returned {type(control).__name__}; expected a Control(lock=..., cfg_scale=...)"
            f"{' and the new state: return state, Control(...)' if method == 'step' else ''}."
        )
    for field in ("lock", "cfg_scale"):
        value = getattr(control, field)
        if isinstance(value, Tensor):
            shape = tuple(value.shape)
            per_token = field == "lock" and tokens is not None and shape == (batch, tokens)
            if shape not in ((), (batch,)) and not per_token:
                extra = f" or (batch, tokens) = ({batch}, {tokens})" if field == "lock" and tokens else ""
                raise PolicyError(
                    f"{name} returned {field} of shape {shape}; expected (batch,) = ({batch},){extra} or a float.\n"
                    "  A policy sees one risk per clip, obs.risk of shape (batch,): combine it elementwise."
                )
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise PolicyError(f"{name} returned {field} of type {type(value).__name__}; expected a tensor or a float.")
    return control


def check_finite(policy: Any, control: Control, method: str) -> None:
    """Check the values too, wherever that costs no read from a device."""
    name = f"{policy_name(policy)}.{method}"
    for field, value in zip(control._fields, control, strict=True):
        if isinstance(value, Tensor):
            if value.device.type == "cpu" and not torch.isfinite(value).all():
                raise PolicyError(
                    f"{name} returned {field} with NaN or inf; expected finite numbers.\n"
                    "  Is x0-hat finite? A policy with uses_risk=False, and any policy in start, sees NaN as risk."
                )
        elif not math.isfinite(value):
            raise PolicyError(f"{name} returned {field}={value}; expected a finite number.")


def floored(scale: Scalar, floor: float) -> Scalar:
    """A scheduled guidance scale, not below `floor`: under 1 guidance turns towards the unconditional prediction."""
    return scale.clamp_min(floor) if isinstance(scale, Tensor) else max(float(scale), floor)


def steps_left(schedule: Sequence[float] | None, sigma: float) -> int | None:
    """Steps of the schedule that remain at this noise level, counting the present one; None without a schedule.

    A noise level between two of the schedule belongs to the step that began at the higher one.
    """
    if schedule is None:
        return None
    levels = [s for s in schedule if s > 0]
    begun = sum(s >= sigma * (1 - 1e-4) for s in levels)
    return len(levels) - max(begun, 1) + 1
