"""Arithmetic in at least float32: latents may be bfloat16, but sums of squares need more precision."""

import torch
from torch import Tensor


def working(values: Tensor) -> Tensor:
    """Promote `values` to float32; more precise dtypes are kept."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
