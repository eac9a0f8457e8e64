"""Small pipelines of diffusers, an edit for them, and the same edit through a k-diffusion sampler."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_pipelines import tiny_pipeline

import kvlock_sampling as kv

SHAPE = (1, 16, 3, 8, 8)
TIMES = (0.97, 0.9, 0.75, 0.5, 0.25)
SIGMAS = torch.tensor([*(t / (1 - t) for t in TIMES), 0.0])
CALL = {"height": 64, "width": 64, "num_frames": 9, "output_type": "latent", "prompt": "a red square"}


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SOURCE, START = noise(1), noise(2)
MASK = torch.zeros(1, 1, *SHAPE[2:])
MASK[..., 2:6, 2:6] = 1
EDIT = {"source": SOURCE, "mask": MASK}


def euler_of(times: tuple[float, ...] = TIMES) -> Any:
    """diffusers' Euler scheduler, on times that a k-diffusion sampler can have too: none of them is 1."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    plain = scheduler.set_timesteps
    scheduler.set_timesteps = lambda *_, device=None, **__: plain(sigmas=list(times), device=device)
    return scheduler


def classic(name: str = "wan", times: tuple[float, ...] | None = TIMES) -> Any:
    pipe = tiny_pipeline(name)
    if times is not None:
        pipe.scheduler = euler_of(times)
    return pipe


def run(pipe: Any, **arguments: Any) -> Tensor:
    given = {"num_inference_steps": 5, "guidance_scale": 4.0, **CALL, "latents": START.clone(), **arguments}
    return pipe(**given).frames


def modular(parts: Any, blocks: str = "WanBlocks", **components: Any) -> Callable[..., Tensor]:
    """A modular pipeline of a classic one's parts, as a function of its inputs."""
    import diffusers.modular_pipelines.wan as blocks_of
    from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22Blocks

    recipe = (Wan22Blocks if blocks == "Wan22Blocks" else getattr(blocks_of, blocks))()
    recipe.sub_blocks.pop("decode")
    pipe = recipe.init_pipeline()
    names = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")
    pipe.update_components(**{n: getattr(parts, n) for n in names}, **components)
    pipe.set_progress_bar_config(disable=True)

    def sample(**arguments: Any) -> Tensor:
        given = {"num_inference_steps": 5, "latents": START.clone(), "negative_prompt": "", **CALL, **arguments}
        given.pop("output_type")
        return pipe(**given, output="latents")

    sample.pipe = pipe  # type: ignore[attr-defined]
    return sample


def by_sampler(pipe: Any, policy: Any, scale: float = 4.0, **options: Any) -> tuple[Tensor, kv.Trace]:
    """The same edit through KVLock and k-diffusion's Euler."""
    video = kv.from_pipeline(pipe)
    lock = kv.KVLock(video.denoiser, policy=policy, **{**EDIT, **options})
    texts = {"cond": video.prompt(CALL["prompt"]), "uncond": video.prompt(""), "cond_scale": scale}
    with torch.no_grad():
        return lock.sample("euler", START / (1 - TIMES[0]), SIGMAS, extra_args=texts), lock.trace


def check_same_trace(ours: kv.Trace, theirs: kv.Trace, *, route: bool = True) -> None:
    """Both runs measured, decided and did the same; the route may differ where branches are not rows of one call."""
    for one, other in zip(ours.rows(), theirs.rows(), strict=True):
        routes = one.pop("route"), other.pop("route")
        assert one == pytest.approx(other, rel=2e-3, abs=1e-6, nan_ok=True)
        assert routes[0] == routes[1] or not route


def in_another_thread(call: Any) -> Any:
    """What a call returns or raises in a thread of its own."""
    found: list[Any] = []

    def catching() -> None:
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=catching)
    thread.start()
    thread.join()
    return found[0]


def far_apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


RELEASED = (torch.arange(3 * 4 * 4) % 3 == 0).float()[None]

POLICIES = {
    "composited, then free": kv.stateless(
        lambda obs: kv.Control(1.0, None, 1.0 if obs.sigma > 5 else RELEASED), uses_risk=False
    ),
    "default": "default",
    "paper": "paper",
    "half": kv.Constant(lock=0.5),
    "scheduled": kv.Constant(lock=1.0, cfg_scale=2.0),
    "no guidance": kv.Constant(lock=1.0, cfg_scale=1.0),
}
