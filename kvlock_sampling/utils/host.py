"""Read ranges of tensors from their device in one transfer, since every transfer makes the host wait for the device."""

import math
from typing import Any

import torch
from torch import Tensor

from ..types import RunError

Range = tuple[float, float]


class HostReads:
    """The smallest and largest entries of tensors as floats, read once per tensor. One object serves one evaluation."""

    @staticmethod
    def free(value: Tensor) -> bool:
        """Whether reading this tensor waits for no device."""
        return value.device.type == "cpu"

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Range]] = {}

    def together(self, *values: Any) -> None:
        """Read all of these values that are tensors and not known yet, with one transfer per device."""
        new = {id(v): v for v in values if isinstance(v, Tensor) and v.numel() and id(v) not in self._known}
        for device in {v.device for v in new.values()}:
            here = [v for v in new.values() if v.device == device]
            # float64 holds every float32 exactly. Not every device has it.
            wide = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
            ends = torch.stack([end.to(wide) for v in here for end in v.detach().aminmax()]).tolist()
            for v, low, high in zip(here, ends[::2], ends[1::2], strict=True):
                self._known[id(v)] = v, (low, high)

    def range(self, value: float | Tensor) -> Range:
        """The smallest and the largest entry; a float is both. Of an empty tensor 0."""
        if not isinstance(value, Tensor):
            return float(value), float(value)
        self.together(value)
        return self._known[id(value)][1] if value.numel() else (0.0, 0.0)


def check_prediction(reads: HostReads, sigma: float, denoised: Tensor) -> None:
    """Raise RunError if a prediction at this noise level holds NaN or inf."""
    low, high = reads.range(denoised)
    if not math.isfinite(low + high):
        raise RunError(
            f"the model's prediction at sigma={sigma:.4g} holds NaN or inf; expected finite numbers, and every later "
            "step would be NaN.\n  Half precision overflows first: run the model in bfloat16 or float32, and look at "
            "what it was given, x, cond and cond_scale, and at what policy and estimator returned."
        )
