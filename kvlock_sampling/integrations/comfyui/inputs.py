"""What nodes give, checked: masks, layers, policies with their estimator; and errors in the words of nodes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ... import masks
from ...policy import Policy, Release
from ...policy.wrappers import innermost
from ...presets import Preset, load_preset
from ...types import AttentionError, KVLockError, MaskError, PolicyError
from ...variance import Divergence, Estimator

_IN_NODES = {  # what errors of the library say, and how it is done with nodes
    "use masks.from_keep_mask": "use Invert Mask",
    "the sampler's x": "the latent that is sampled",
    "do not divide into patches": "do not divide (pad or crop the clip, e.g. to sides of 16 pixels) into patches",
    ", e.g. samplers.flow_sigmas(30, shift=5.0)": "",
    " To invert a clip: samplers.euler(model, x, torch.as_tensor(sigmas)).": "",
    "no attention layers found in": "this model is not supported, see the page In ComfyUI:",
}
_VAES = {"LTXVModel": (8, 32), "GeneralDIT": (8, 8)}  # frames and pixels per frame and side of latents; others 4, 8


def fitted(mask: Tensor, source: Tensor, network: Any) -> Tensor:
    """A mask of ComfyUI, 1 = edit, for these latents: at another height or width it is resized, as ComfyUI does.

    Args:
        mask: (frames, height, width), of one clip, or of each clip of the batch in turn; or with further axes.
        source: The latents, (batch, channels, time, height, width) or without time.
        network: The network of these latents, which tells how many frames of a clip are one of them.

    Raises:
        MaskError: Another number of frames.
    """
    height, width = source.shape[-2:]
    if source.ndim == 4:
        edited = (mask >= 0.1).to(mask.dtype)  # as in `masks.from_comfy`
        return masks.resize(edited.reshape(-1, 1, *mask.shape[-2:]), 1, height, width)[:, :, 0]
    found = masks.from_comfy(mask[:, :1] if mask.ndim == 5 else mask)
    clips, time, count = len(source), source.shape[2], found.shape[2]
    factor, side = _VAES.get(type(network).__name__, (4, 8))
    whole = 1 + factor * (time - 1)
    known = {1, time, *range(whole, whole + factor if time > 1 else 1)}
    if count not in known and count % clips == 0 and count // clips in known:
        found, count = found.reshape(clips, 1, -1, *found.shape[-2:]), count // clips
    if count not in known:
        each = f", or as many for each of {clips} clips" if clips > 1 else ""
        raise MaskError(f"the mask has {count} frames; expected {whole}, as the clip, or one{each}.")
    if count > whole:  # a VAE drops the frames that fill no latent
        found = found[:, :, :whole]
    if found.shape[-2] % height or found.shape[-2] * width != found.shape[-1] * height:
        found = masks.resize(found, found.shape[2], side * height, side * width)
    return found


def measured(policy: Any, estimator: Estimator | None) -> tuple[Preset, Estimator | None]:
    """A preset of the policy, with the estimator that `Release` needs.

    Raises:
        PolicyError: Another estimator was given.
    """
    preset = policy if isinstance(policy, Preset) else Preset(policy) if isinstance(policy, Policy) else None
    preset = load_preset(policy) if preset is None else preset
    if not isinstance(innermost(preset.policy), Release):
        return preset, estimator
    estimator = estimator or preset.estimator or Divergence(patch="model")
    if not isinstance(estimator, Divergence):
        raise PolicyError(f"the policy Release was given {estimator!r}; expected the estimator divergence, or none.")
    return preset, estimator


@contextmanager
def in_one_line() -> Iterator[None]:
    """Errors as a node shows them: the first line. Others show calls in Python, which users of nodes do not write."""
    try:
        yield
    except KVLockError as error:
        text = str(error).removeprefix("KV Lock: ").partition("\n")[0]
        for python, words in _IN_NODES.items():
            text = text.replace(python, words)
        raise type(error)(f"KV Lock: {text}") from error


def layer_indices(text: str) -> list[int] | None:
    """Return the layers that "8-16" or "0, 4, 8" names; None for "all".

    Raises:
        AttentionError: It is no such list.
    """
    if text.strip() in ("", "all"):
        return None
    parts = [re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part) for part in text.split(",")]
    ranges = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts if part is not None]
    if len(ranges) < len(parts) or not all(ranges):
        raise AttentionError(f"layers={text!r}; expected all, or numbers and ranges such as 0, 4, 8-16.")
    return [index for part in ranges for index in part]
