"""The main job as one function: edit the masked part of a clip after a prompt, everything else locked to the source."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import masks, samplers
from ..kv_cache import Plan
from ..lock import KVLock
from ..trace import Trace
from ..types import Denoiser, KVLockError, SamplerError, SourceError
from ..video.metrics import masked_psnr
from ..video.pixels import as_clips, check_floats, check_pixels
from .models import open_model

FEATHER = 2.0
"""Pixels around the mask over which the source's own are blended in, unless said otherwise."""


class VideoModel(Protocol):
    """What an edit needs of a model: a denoiser with its codec, its prompts, and its schedule. See `tiny.TinyVideo`,
    and `pipelines.PipelineVideo` for models of diffusers.

    frames, size: the clips it edits; None where that is free. Such a model has a method `fit(frames, height, width)`,
    the largest clip it can edit within that, and may have `given(clips, mask)`, itself for these clips, and
    `lock_mask(mask)`, the mask at the size of its latents. `negative_prompt`, if it has one, is the unconditional one.
    """

    @property
    def denoiser(self) -> Denoiser: ...
    @property
    def frames(self) -> int | None: ...
    @property
    def size(self) -> tuple[int, int] | None: ...
    @property
    def cfg_scale(self) -> float: ...

    def encode(self, pixels: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def prompt(self, texts: Sequence[str]) -> Any: ...
    def sigmas(self, steps: int, strength: float = 1.0) -> Tensor: ...


@dataclass(frozen=True)
class Edit:
    """A finished edit.

    pixels: (batch, 3, frames, height, width) in [-1, 1].  trace: what happened, per evaluation.
    seconds: of sampling alone.  evaluations: model passes per clip.
    background_psnr: outside the mask against the source, dB, (batch,).  ceiling_psnr: the same for the clip merely
    encoded and decoded: what no edit in latents can exceed (pasting pixels can).
    """

    pixels: Tensor
    trace: Trace
    seconds: float
    evaluations: int
    background_psnr: Tensor
    ceiling_psnr: Tensor


def start_noise(like: Tensor, seed: int | Sequence[int]) -> Tensor:
    """Unit noise shaped like `like`, one seed per clip: clip i of an int seed uses seed + i, alone or in a batch."""
    seeds = _seeds(seed, len(like))
    rows = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(rows).to(like)


def edit_video(
    clip: Tensor | np.ndarray,
    mask: Any,
    prompt: str | Sequence[str],
    *,
    source_prompt: str | Sequence[str] | None = None,
    model: str | VideoModel = "tiny",
    sampler: Any = "dpmpp_2m",
    steps: int = 30,
    policy: Any = "default",
    cfg_scale: float | None = None,
    seed: int | Sequence[int] = 0,
    strength: float = 1.0,
    paste: bool = True,
    feather: float = FEATHER,
    on_step: Callable[[int], None] | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    **lock_options: Any,
) -> Edit:
    """Edit the masked part of clips after a prompt, and keep the rest. Returns an `Edit`: pixels, trace, PSNR.

    Args:
        clip: (3, frames, height, width) or (batch, 3, ...), in [-1, 1], a tensor or an array.
        mask: 1 = edit, 0 = keep, at the clip's height and width, as `masks.as_mask` reads: still, or of its frames.
        prompt: what the masked region shall show, one text or one per clip.  source_prompt: what the clip shows now;
            the source's own branch reads it (default: `prompt`).
        model: "tiny", a folder of its weights, a folder of a diffusers pipeline, or any `VideoModel`, e.g.
            `kv.from_pipeline(pipe)`.
        sampler: a name of `samplers.names()` or a callable of k-diffusion's signature.  steps: of it, >= 1;
            dpm_adaptive chooses its own.
        policy: a Policy, a preset's name, or a TOML file.  cfg_scale: guidance asked for; default: the model's.
        seed: of the start, and of a stochastic sampler's noise; an int for clip 0, +1 for every further one, or one
            per clip.
        strength: 1 starts from noise; lower starts from the clip noised to flow time `strength`.
        paste: put the source's own pixels back outside the mask, feathered over `feather` >= 0 pixels. With compositing
            off (composite=False, or a policy that never locks) nothing is pasted.
        on_step: called after every step with its index.
        on_plan: called before sampling with what the KV cache will hold, where there is one.
        lock_options: anything else `KVLock` takes, e.g. composite, layers, estimator, KV cache. With a KV cache the source has
            a noise of its own, so that what is kept serves every seed, and its branch reads `source_prompt` or nothing,
            so that it serves every prompt.

    Under a policy that never locks, such as "off", the source's own branch is not evaluated, and `source_prompt` is
    not read.

    Raises:
        KVLockError: bad input, with the fix; see `kvlock_sampling.types`.
    """
    video = open_model(model) if isinstance(model, str) else model
    if taken := sorted({"source", "source_args"} & lock_options.keys()):
        raise SourceError(
            f"{taken[0]}= is made here, of clip and source_prompt; expected those two instead.\n"
            "  For a source of your own make the lock yourself: KVLock(model, source=..., source_args=..., mask=...)."
        )
    clips = as_clips(clip)
    _check_clip(clips, video)
    texts = _texts(prompt, len(clips), "prompt")
    pixel_mask = masks.check_mask(masks.as_mask(mask, frames=clips.shape[2])).to(clips)
    video = video.given(clips, pixel_mask) if hasattr(video, "given") else video
    negative = [getattr(video, "negative_prompt", "")] * len(clips)
    conditioning = {"cond": video.prompt(texts), "uncond": video.prompt(negative)}
    scale = video.cfg_scale if cfg_scale is None else cfg_scale
    if not (isinstance(scale, Real) and math.isfinite(scale)):
        raise KVLockError(f"cfg_scale={scale!r}; expected a finite number, e.g. cfg_scale={video.cfg_scale}.")
    if not (isinstance(feather, Real) and 0 <= feather < math.inf):
        raise KVLockError(f"feather={feather!r}; expected pixels >= 0 around the mask, e.g. feather=2.0; 0 cuts hard.")
    if feather != FEATHER and not paste:
        warnings.warn(f"feather={feather} without effect: with paste=False nothing is pasted.", stacklevel=2)
    if lock_options.get("kv_cache") is not None:
        lock_options.setdefault("noise", "fixed")
        source_prompt = "" if source_prompt is None else source_prompt
    source_args: Mapping[str, Any] = {}
    if source_prompt is not None:
        source_args = {"cond": video.prompt(_texts(source_prompt, len(clips), "source_prompt"))}

    if not (isinstance(strength, Real) and 0 < strength <= 1):
        raise KVLockError(f"strength={strength!r}; expected 0 < strength <= 1, where 1 starts from noise.")
    source = video.encode(clips)
    sigmas = _schedule(video, steps, strength, sampler)
    noise = start_noise(source, seed)
    x = noise * sigmas[0] + (source if strength < 1 else 0)
    lock_mask = video.lock_mask(pixel_mask) if hasattr(video, "lock_mask") else pixel_mask
    lock = KVLock(video.denoiser, source=source, mask=lock_mask, policy=policy, source_args=source_args, **lock_options)
    if on_plan is not None and lock.settings.kv_cache is not None:
        on_plan(lock.plan(sigmas, sampler))
    callback = None if on_step is None else lambda info: on_step(int(info.get("i", 0)))
    started = time.perf_counter()
    # Weights that offloading moves in inference mode would come out of it as inference tensors, of no use for training.
    with torch.no_grad() if getattr(video, "offloaded", False) else torch.inference_mode():
        latents = lock.sample(
            sampler,
            x,
            sigmas,
            extra_args={**conditioning, "cond_scale": scale},
            seed=_seeds(seed, len(clips)),
            callback=callback,
        )
        seconds = time.perf_counter() - started
        pixels = video.decode(latents)
        ceiling = video.decode(source)
    pixels, ceiling = pixels.clone().to(clips), ceiling.clone().to(clips)  # out of inference mode, off the device
    if paste and lock.settings.composite:
        soft = masks.feather(pixel_mask, feather).to(pixels) if feather > 0 else pixel_mask
        pixels = torch.lerp(clips.to(pixels), pixels, soft)
    keep = 1 - pixel_mask
    return Edit(
        pixels=pixels,
        trace=lock.trace,
        seconds=seconds,
        evaluations=lock.trace.evaluations,
        background_psnr=masked_psnr(pixels, clips, keep),
        ceiling_psnr=masked_psnr(ceiling, clips, keep),
    )


def _schedule(video: VideoModel, steps: int, strength: float, sampler: Any) -> Tensor:
    """The model's noise levels. dpm_fast and dpm_adaptive stop at the last one above 0, so theirs nears 0."""
    if not isinstance(steps, Integral):
        raise SamplerError(f"steps={steps!r}; expected how many noise levels, a whole number n >= 1, e.g. steps=30.")
    sigmas = video.sigmas(int(steps), strength)
    if samplers.is_ranged(samplers.get(sampler) if isinstance(sampler, str) else sampler):
        sigmas = torch.cat([sigmas[:-1], sigmas.new_tensor([0.01, 0.0])])
    return sigmas


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    seeds = list(seed) if isinstance(seed, Iterable) else [seed]
    if not all(isinstance(s, Integral) for s in seeds):
        raise SourceError(f"seed={seed!r}; expected one int, or a list of one per clip, e.g. seed=0.")
    seeds = [int(seed) + i for i in range(count)] if isinstance(seed, Integral) else list(map(int, seeds))
    if len(seeds) != count:
        raise SourceError(f"seed has {len(seeds)} entries for {count} clips; give one int, or one per clip.")
    return seeds


def _texts(given: str | Sequence[str], count: int, name: str) -> list[str]:
    texts = [given] * count if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if not all(isinstance(text, str) for text in texts):
        raise SourceError(f'{name}={given!r}; expected a text, or a list of one per clip, e.g. {name}="a red square".')
    if len(texts) != count:
        raise SourceError(f"{name} has {len(texts)} entries for {count} clips; give one text, or one per clip.")
    return texts


def _check_clip(clips: Tensor, video: VideoModel) -> None:
    check_floats(clips)
    frames, size = editable(video, *clips.shape[2:]) if clips.ndim == 5 else (video.frames, video.size)
    if clips.ndim != 5 or tuple(clips.shape[1:]) != (3, frames, *(size or ())):
        sides = ", ".join(map(str, (3, frames or "frames", *(size or ("height", "width")))))
        raise SourceError(
            f"clip has shape {tuple(clips.shape)}; this model edits (batch, 3, frames, height, width)"
            f"{' such as' if video.frames is None else ' ='} (batch, {sides}).\n"
            f"  clip = kvlock_sampling.video.read_clip(path, frames={frames}, size={size}).pixels"
        )
    check_pixels(clips)


def editable(video: VideoModel, frames: int, height: int, width: int) -> tuple[int, tuple[int, int]]:
    """Frames and (height, width) of the clip this model would edit in place of one of this size."""
    if video.frames is not None and video.size is not None:
        return video.frames, (video.size[0], video.size[1])
    count, *size = video.fit(frames, height, width)  # type: ignore[attr-defined]  # see VideoModel
    return count, (size[0], size[1])
