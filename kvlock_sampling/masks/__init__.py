"""Masks, from pixels to tokens:  pixel mask --latent_mask--> latent mask --token_mask--> token mask.

One polarity everywhere: 1 = edit (foreground), 0 = keep (background). `from_keep_mask`, `from_comfy` and
`from_diffusers` convert the conventions of other tools. The normal form is a float tensor (batch, 1, frames, height,
width) in [0, 1]; every function here accepts what `as_mask` accepts. Soft values are allowed, and every reduction is a
maximum, so that a small region is never lost: a cell that holds any edited pixel is edited.

>>> import torch
>>> video = torch.zeros(9, 64, 96)  # frames, height, width
>>> video[:, 16:32, 40:56] = 1  # edit here
>>> latent = latent_mask(video, temporal=4, spatial=8)
>>> latent.shape, token_mask(latent, patch=(1, 2, 2)).sum()
(torch.Size([1, 1, 3, 8, 12]), tensor(6))
"""

from .form import Mask, MaskLike, as_mask, check_mask, from_comfy, from_diffusers, from_keep_mask
from .morphology import feather, grow
from .tokens import latent_mask, resize, token_mask

__all__ = [
    "Mask",
    "MaskLike",
    "as_mask",
    "check_mask",
    "feather",
    "from_comfy",
    "from_diffusers",
    "from_keep_mask",
    "grow",
    "latent_mask",
    "resize",
    "token_mask",
]
