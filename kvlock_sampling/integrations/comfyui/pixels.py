"""What the nodes show and paste: the mask on the token grid, the trace as an image, and the original's pixels.

ComfyUI's IMAGE is (frames, height, width, 3) in [0, 1], its MASK (frames, height, width), 1 = edit.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import masks
from ...attention import find_layers
from ...masks.fitted import FittedMask
from ...masks.morphology import dilate
from ...masks.tokens import on_latents, on_pixels
from ...trace import Trace
from ...types import KVLockError, MaskError, RunError
from ...utils.extras import require
from .inputs import fitted

EDITED, BAND, LOCKED = (1.0, 1.0, 1.0), (1.0, 0.85, 0.2), (0.2, 0.4, 0.9)


def token_map(
    network: Any, latents: Tensor, mask: Tensor, image: Tensor | None = None, *, grow: float = 0, transition: float = 0
) -> tuple[Tensor, Tensor]:
    """Return a mask snapped to the network's tokens, and a picture of what is edited, in the band, and locked.

    Args:
        network: The network, whose patch is the token grid.
        latents: The clip's, (batch, channels, time, height, width) or without time.
        mask: 1 = edit.
        image: The clip, drawn under the map.
        grow: Pixels to add around the mask.
        transition: Width in tokens of the transition band.

    Raises:
        MaskError: The mask does not fit the latents.
        AttentionError: The network is of no known architecture.
    """
    mask = mask.reshape(-1, *mask.shape[-2:])
    mask = masks.grow(masks.from_comfy(mask), grow)[0, 0] if grow else mask
    patch, clip = find_layers(network).patch, latents[:1]
    if clip.ndim == 4:
        mask = mask[:1]
    region = FittedMask(fitted(mask, clip, network))
    weight = region.background(clip, patch, (transition, 0.5) if transition else None)
    cells = on_latents(weight, clip.shape, patch)
    cells = cells[:, :, None] if cells.ndim == 4 else cells
    image = None if image is None else image[..., :3]
    frames = len(image) if image is not None else len(mask) if len(mask) > 1 else cells.shape[2]
    size = mask.shape[-2:] if image is None else image.shape[1:3]
    shown = on_pixels(cells.float(), frames, *size)[0, 0]
    colours = torch.tensor([EDITED, BAND, LOCKED])[(shown > 0).long() + (shown == 1).long()]
    preview = colours if image is None else torch.where(shown[..., None] == 0, image, 0.6 * image + 0.4 * colours)
    return (shown == 0).float(), preview


def pasted(edited: Tensor, original: Tensor, mask: Tensor, feather: float, released: Tensor | None = None) -> Tensor:
    """Return the edit with the original's pixels outside the mask.

    Args:
        edited: IMAGE.
        original: IMAGE of the same size.
        mask: 1 = edit, one frame or as many as the images.
        feather: Width of the blend in pixels, >= 0.
        released: How much of each latent the lock left to the edit, (clips, 1, time, height, width), in [0, 1]; the
            images are then the frames of so many clips.

    Raises:
        KVLockError: The images differ in size.
        MaskError: The mask has another size.
    """
    edited, original = edited[..., :3], original[..., :3]  # without alpha
    if edited.shape != original.shape:
        raise KVLockError(f"the edit has {_size(edited)}, the original {_size(original)}; expected the same.")
    mask = mask.reshape(-1, *mask.shape[-2:])
    clips = 1 if released is None else len(released)
    if clips > 1 and len(mask) == len(edited) // clips:
        mask = mask.repeat(clips, 1, 1)
    if mask.shape[1:] != edited.shape[1:3] or len(mask) not in (1, len(edited)):
        raise MaskError(f"the mask has {_size(mask)}, the images {_size(edited)}; expected the same, or one frame.")
    soft = masks.feather(masks.from_comfy(mask, len(edited)), feather)
    if released is not None:
        size = len(edited) // clips, *edited.shape[1:3]
        parts = [dilate(on_pixels(part.float(), *size), min(feather, 32.0)) for part in released.split(1)]
        soft = soft + (1 - soft) * torch.cat(parts, dim=2)
    return torch.lerp(original, edited, soft[0, 0, ..., None].to(edited))


def plotted(trace: Trace | None) -> tuple[Tensor, str]:
    """Return a run's figure as an IMAGE, and its table.

    Raises:
        RunError: There was no run.
    """
    if trace is None:
        raise RunError("the lock has not run; connect `after` to the result of the sampler that uses it.")
    pillow = require("PIL.Image", "video")
    with tempfile.TemporaryDirectory() as folder:
        picture = pillow.open(trace.plot(Path(folder) / "trace.png")).convert("RGB")
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255)[None], trace.to_csv()


def _size(images: Tensor) -> str:
    return f"{len(images)} frames of {images.shape[2]} x {images.shape[1]}"
