"""Arithmetic in at least float32: latents may come in bfloat16, sums of squares must not."""

from __future__ import annotations

import torch
from torch import Tensor


def working(values: Tensor) -> Tensor:
    """`values` in float32, or as they are if they are more precise already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
