"""What an edit will cost on this machine, for each way of locking, from two evaluations of the model."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kv_cache import KVCache
from ..lock import KVLock
from ..presets import Preset, load_preset
from ..samplers import evaluated_sigmas, is_adaptive
from ..types import KVLockError
from .edit import start_noise
from .models import VideoModel

WAYS = ("off", "half", "release", "default", "full", "fast")


class Cost(NamedTuple):
    """The cost of sampling one clip.

    Attributes:
        way: The preset, and whether its KV cache is filled.
        passes: Function evaluations, model passes per clip. The preset default may take one more per evaluation.
        seconds: Time of sampling, without encoding and decoding.
        computed: Fraction of the tokens that the edit's passes run on.
        peak: Bytes of device memory at the peak, weights included; None on a CPU.
        stored: Bytes that the KV cache holds; 0 without one.
    """

    way: str
    passes: int
    seconds: float
    computed: float
    peak: int | None
    stored: int


@torch.no_grad()
def costs(
    video: VideoModel,
    clip: Tensor,
    mask: Tensor,
    *,
    sampler: Any = "dpmpp_2m",
    steps: int = 30,
    ways: Iterable[str] = WAYS,
) -> Iterator[Cost]:
    """Yield the cost of an edit for each way, in turn.

    Args:
        video: The model.
        clip: (1, 3, frames, height, width) in [-1, 1].
        mask: 1 = edit, as `edit_video` takes it.
        sampler: The sampler of the edit.
        steps: Its steps, >= 2.
        ways: Names of presets. One with a KV cache is also measured with the cache filled.
    """
    if is_adaptive(sampler):
        raise KVLockError("dpm_adaptive chooses its steps as it goes; expected a sampler whose cost can be told.")
    video = video.given(clip, mask) if hasattr(video, "given") else video
    source, sigmas = video.encode(clip), video.sigmas(steps)
    levels = evaluated_sigmas(sampler, sigmas)
    middle = min(steps // 2, len(sigmas) - 3)
    some = sigmas[middle : middle + 3]  # two evaluations, which no first or last step distorts
    extra = {"cond": video.prompt([""]), "uncond": video.prompt([""]), "cond_scale": video.cfg_scale}
    region = video.lock_mask(mask) if hasattr(video, "lock_mask") else mask

    def probe(way: str | Preset, kv_cache: KVCache | None = None) -> tuple[KVLock, list[float], int | None]:
        lock = KVLock(video.denoiser, source=source, mask=region, policy=way, kv_cache=kv_cache, noise="fixed")
        ends = [_now(source)]
        peak = source.device.type == "cuda"
        if peak:
            torch.cuda.reset_peak_memory_stats(source.device)
        callback = lambda _: ends.append(_now(source))  # noqa: E731
        start = source + start_noise(source, 0) * some[0]
        lock.sample("euler", start, some, extra_args=extra, callback=callback)
        spent = [b - a for a, b in pairwise(ends)]
        return lock, spent, torch.cuda.max_memory_allocated(source.device) if peak else None

    probe("off")  # what happens once: kernels are chosen, memory is reserved
    for way in ways:
        preset = load_preset(way)
        if preset.kv_cache is not None:
            preset = replace(preset, kv_cache={**preset.kv_cache, "budget": None})
        lock, (first, second), peak = probe(preset)
        one, other = (step.nfe for step in lock.trace)
        stored, fresh = 0, 0
        if lock.settings.kv_cache is not None:
            planned = lock.plan(sigmas, sampler)
            stored, fresh = planned.total, planned.levels
        rest = len(levels) - fresh
        passes, seconds = fresh * one + rest * other, fresh * first + rest * second
        yield Cost(way, passes, seconds, lock.trace.steps[-1].computed, peak, stored)
        if fresh:
            lock, (_, second), peak = probe(preset, lock.settings.kv_cache)
            nfe = len(levels) * lock.trace.steps[-1].nfe
            yield Cost(f"{way}, filled", nfe, len(levels) * second, lock.trace.steps[-1].computed, peak, stored)


def _now(like: Tensor) -> float:
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
