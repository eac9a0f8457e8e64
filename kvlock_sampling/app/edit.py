"""Edit the masked part of video clips after a prompt, with everything else locked to the source: `edit_video`."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import masks
from ..kv_cache import Plan
from ..lock import KVLock
from ..masks.morphology import dilate
from ..masks.tokens import on_latents, on_pixels
from ..samplers import seeding
from ..search import Judge, search
from ..trace import Trace
from ..types import KVLockError, MaskError, SamplerError, SourceError
from ..utils.fields import check_number, check_seed
from ..utils.warn import warn
from ..video.metrics import masked_psnr
from ..video.read import as_clips, check_pixels
from .models import VideoModel, check_video_model, editable, open_model

LEAST_STRENGTH, MOST_STEPS = 0.05, 10_000  # of the command line, and of every way to edit
FEATHER = 2.0  # default width in pixels of the blend between the edit and the source's pixels around the mask


@dataclass(frozen=True)
class Edit:
    """A finished edit.

    Attributes:
        pixels: Edited clips (batch, 3, frames, height, width) in [-1, 1].
        trace: What happened in each evaluation; of several candidates, of the best.
        seconds: Time of sampling alone.
        nfe: Function evaluations, model passes per clip; of several candidates, of all together.
        background_psnr: PSNR outside the mask against the source, (batch,), dB.
        ceiling_psnr: The same for the clip only encoded and decoded, which only pasted pixels can exceed.
        seed: The seed of the first clip; of several candidates, of the best.
        candidates: The last prediction of every candidate, (candidates, 3, frames, height, width), finished or stopped;
            None without several.
    """

    pixels: Tensor
    trace: Trace
    seconds: float
    nfe: int
    background_psnr: Tensor
    ceiling_psnr: Tensor
    seed: int
    candidates: Tensor | None = None


def start_noise(like: Tensor, seed: int | Sequence[int]) -> Tensor:
    """Draw unit noise shaped like `like`, one seed per clip; with an int, clip i uses seed + i."""
    seeds, shape = _seeds(seed, len(like)), like.shape[1:]
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(s), device="cpu") for s in seeds]
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
    candidates: int = 1,
    judge: Judge | None = None,
    strength: float = 1.0,
    paste: bool = True,
    feather: float = FEATHER,
    on_step: Callable[[int], None] | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    **lock_options: Any,
) -> Edit:
    """Edit the masked part of clips after a prompt, and keep the rest.

    Args:
        clip: (3, frames, height, width) or (batch, 3, frames, height, width) in [-1, 1], a tensor or an array.
        mask: 1 = edit, up to 0.1 = keep, of the clip's height and width, still or per frame; see `masks.as_mask`.
        prompt: What the masked region should show; one text, or one per clip.
        source_prompt: What the clip shows now, read by the source's branch. Default: `prompt`; with a KV cache, "".
        model: "tiny", a folder of its weights or of a diffusers pipeline, or a `VideoModel`: `kv.from_pipeline(pipe)`.
        sampler: A name from `samplers.names()`, or a callable with k-diffusion's signature.
        steps: Sampling steps, 1 to 10,000; dpm_adaptive chooses its own.
        policy: A Policy, the name of a preset, or a TOML file.
        cfg_scale: Requested guidance scale. Default: the model's.
        seed: Seed of the start noise and of samplers with `noise_sampler`: one int (clip i uses seed + i), or one per
            clip. Another stochastic sampler draws from torch's generator.
        candidates: Seeds to try for one clip: seed, seed + 1, ... Half way the best goes on, and the others stop.
        judge: What is best among candidates, see `kv.search`.
        strength: 1 starts from noise; less starts from the clip noised to flow time `strength` in (0, 1].
        paste: Paste the source's pixels outside the mask, but not over what a policy released to the edit at the end.
        feather: Width in pixels, >= 0, of the blend around the mask and around released tokens.
        on_step: Called after each step with its index.
        on_plan: Called before sampling with the plan of the KV cache, if there is one.
        lock_options: Other options of `KVLock`, e.g. composite, layers, kv_cache. With a KV cache, noise="fixed".

    Raises:
        SourceError: The clip, prompts or seeds do not fit the model or each other.
        MaskError: The mask does not fit the clip.
        SamplerError: The sampler or the number of steps does not exist.
        KVLockError: Another option is wrong; each message shows a call that works.
    """
    if taken := sorted({"source", "source_args"} & lock_options.keys()):
        raise SourceError(f"{taken[0]}= is made from clip and source_prompt; pass those, or call KVLock yourself.")
    check_number("feather", feather, KVLockError, at_least=0.0)
    if feather != FEATHER and not paste:
        warn(f"feather={feather} without effect: with paste=False nothing is pasted.")
    check_number("strength", strength, KVLockError, above=0.0, at_most=1.0)
    steps = check_number("steps", steps, SamplerError, at_least=1, at_most=MOST_STEPS, whole=True)
    video = open_model(model) if isinstance(model, str | os.PathLike) else model
    check_video_model(video)
    scale = video.cfg_scale if cfg_scale is None else cfg_scale
    check_number("cfg_scale", scale, KVLockError)
    clips = as_clips(clip)
    _check_clip(clips, video)
    tried = check_number("candidates", candidates, SourceError, at_least=1, whole=True)
    if tried > 1 and len(clips) > 1:
        raise SourceError(f"candidates={tried} for {len(clips)} clips; expected one clip: edit_video(clip[:1], ...).")
    if judge is not None and tried == 1:
        warn("judge= without effect: there is one candidate. Try candidates=4.")
    seeds = _seeds(seed.tolist() if isinstance(seed, Tensor) else seed, max(len(clips), tried))
    seeded = seeding(sampler, seeds)  # a name is looked up before anything is encoded
    pixel_mask = masks.check_mask(masks.as_mask(mask, frames=clips.shape[2])).to(clips)
    if (sides := tuple(clips.shape[2:])) != tuple(pixel_mask.shape[2:]):
        (h, w), (height, width) = pixel_mask.shape[3:], sides[1:]
        raise MaskError(f"the mask is {h} x {w}, the clip {height} x {width}: mask = masks.resize(mask, *{sides}).")
    video = video.given(clips, pixel_mask) if hasattr(video, "given") else video

    wanted = _per_clip(prompt, len(clips), "prompt", texts=True)
    unwanted = [getattr(video, "negative_prompt", "")] * len(clips)
    extra_args = {"cond": video.prompt(wanted), "uncond": video.prompt(unwanted), "cond_scale": scale}
    if lock_options.get("kv_cache") is not None:
        lock_options.setdefault("noise", "fixed")  # so that the stored K/V serve every seed
        source_prompt = "" if source_prompt is None else source_prompt
    if source_prompt is not None:
        shown = _per_clip(source_prompt, len(clips), "source_prompt", texts=True)
        lock_options["source_args"] = {"cond": video.prompt(shown)}
    source = video.encode(clips)
    sigmas = video.sigmas(steps, strength)
    x = start_noise(source.expand(len(seeds), *source.shape[1:]), seeds) * sigmas[0] + (source if strength < 1 else 0)
    lock_mask = video.lock_mask(pixel_mask) if hasattr(video, "lock_mask") else pixel_mask
    lock = KVLock(video.denoiser, source=source, mask=lock_mask, policy=policy, **lock_options)
    if on_plan is not None and lock.settings.kv_cache is not None:
        on_plan(lock.plan(sigmas, sampler))
    callback = None if on_step is None else lambda info: on_step(int(info.get("i", 0)))
    # Offloading would leave weights that it moves under inference mode as inference tensors, which cannot be trained.
    with torch.no_grad() if getattr(video, "offloaded", False) else torch.inference_mode():
        ceiling, started = _decoded(video, source).to(clips), time.perf_counter()  # not held beside the model
        run: dict[str, Any] = {"extra_args": extra_args, "callback": callback} | seeded
        if tried > 1:
            found = search(lock, sampler, x, sigmas, judge=judge, **run)
            latents, best, nfe = found.x, found.chosen[0], found.nfe
            trace, rows = found.traces[best], found.candidates.split(1)
        else:
            latents, best, rows = lock.sample(sampler, x, sigmas, **run), 0, ()
            trace, nfe = lock.trace, lock.trace.nfe
        seconds = time.perf_counter() - started
        pixels = _decoded(video, latents)
        rows = tuple(_decoded(video, row) for row in rows)
    if unwanted[0] and all((step.cfg_scale == 1).all() for step in trace):
        warn("the negative prompt is without effect at a guidance scale of 1. Try cfg_scale=6.")
    pixels, ceiling = pixels.clone().to(clips), ceiling.clone()  # ordinary tensors on the clip's device
    if paste:
        soft = masks.feather(pixel_mask, feather).to(pixels) if feather > 0 else pixel_mask
        pixels = torch.lerp(clips, pixels, soft + (1 - soft) * _released(trace, lock, video, source, clips, feather))
    keep = 1 - pixel_mask
    background, most = masked_psnr(pixels, clips, keep), masked_psnr(ceiling, clips, keep)
    return Edit(pixels, trace, seconds, nfe, background, most, seeds[best], torch.cat(rows).to(clips) if rows else None)


def _decoded(video: VideoModel, latents: Tensor) -> Tensor:
    pixels = video.decode(latents)
    if bad := int((~pixels.isfinite()).sum()):
        raise KVLockError(
            f"the model decoded {bad} of {pixels.numel()} values as NaN or inf; expected finite pixels.\n"
            "  In float16 many decoders overflow: dtype='bfloat16', or that part alone in float32: pipe.vae.float()."
        )
    return pixels


def _released(trace: Trace, lock: KVLock, video: VideoModel, source: Tensor, clips: Tensor, feather: float) -> Tensor:
    """How much of the background the last evaluation left to the edit, in [0, 1], broadcastable to the clips."""
    weight = trace.steps[-1].composite.to(clips)
    latents = on_latents(1 - weight, source.shape, lock.settings.patch)
    if weight.ndim == 1:
        return latents
    latents = video.unpadded(latents) if hasattr(video, "unpadded") else latents
    return dilate(on_pixels(latents, *clips.shape[2:]), feather)


def _per_clip(given: Any, count: int, name: str, *, texts: bool = False) -> list[Any]:
    entries = [given] * count if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if texts and not all(isinstance(entry, str) for entry in entries):
        raise SourceError(f'{name}={given!r}; expected a text, or a list of one per clip, e.g. {name}="a red square".')
    if len(entries) != count:
        raise SourceError(f"{name} has {len(entries)} entries for {count} clips; give one, or one per clip.")
    return entries


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    seeds = enumerate(_per_clip(seed, count, "seed"))
    return [check_seed(s, SourceError, plus=i if isinstance(seed, Integral) else 0) for i, s in seeds]


def _check_clip(clips: Tensor, video: VideoModel) -> None:
    frames, size = editable(video, *clips.shape[2:]) if clips.ndim == 5 else (video.frames, video.size)
    if clips.ndim != 5 or not len(clips) or tuple(clips.shape[1:]) != (3, frames, *(size or ())):
        sides = ", ".join(map(str, (3, frames or "frames", *(size or ("height", "width")))))
        hint = f"clip = kvlock_sampling.video.read_clip(path, frames={frames}, size={size}).pixels"
        if clips.ndim == 5 and clips.shape[2] == 3 != clips.shape[1]:  # frames before channels, as torchvision reads
            hint = "clip = clip.transpose(-4, -3)"
        raise SourceError(f"clip has shape {tuple(clips.shape)}; this model edits clips of (batch, {sides}).\n  {hint}")
    check_pixels(clips)
