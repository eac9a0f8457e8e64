"""The lock inside a classic pipeline of diffusers: `with locked(pipe, source=..., mask=...): pipe(...)`.

The pipeline keeps its loop, its scheduler and its arithmetic. A hook on the transformer sees its calls: first the
conditional one, then the unconditional one with the same latents. The first is answered with a tensor that is filled
in at the second, when both are known: with the guided, composited velocity v, in both answers. Whatever scale w the
pipeline's own line  u + w (c - u)  uses, it gives v, exactly; that line reads a local variable nobody else can reach.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ...types import RunError
from .calls import Call, Interception, intercepted
from .errors import PipelineError
from .schedule import check_flow
from .session import Session
from .time import is_new_run, time_of

PIPELINES = ("WanPipeline", "WanVideoToVideoPipeline", "WanImageToVideoPipeline", "WanVACEPipeline")
"""Classic pipelines that run their branches as calls of their own, the conditional one first."""


@contextmanager
def locked(
    pipe: Any,
    *,
    source: Tensor | None = None,
    mask: Any = None,
    source_prompt: str | None = None,
    source_embeds: Tensor | Mapping[str, Tensor] | None = None,
    policy: Any = "default",
    batched: bool | None = None,
    **options: Any,
) -> Iterator[Session]:
    """Inside the block, every call of the pipeline samples under the lock; afterwards it is what it was.

    Args:
        pipe: a classic pipeline; the classes are `PIPELINES`. Two experts (Wan 2.2) share one lock and one state.
        source: clean latents of the clip, (1 or batch, channels, time, height, width): `encode_clip(pipe.vae, clip)`.
        mask: 1 = edit, at the clip's or the latents' size.
        source_prompt: what the clip shows now; the source's own pass reads it (default: the edit's prompt). Or
            `source_embeds`, encoded already: (1 or batch, tokens, dim), or several of the transformer's arguments by
            name.
        policy: a Policy, a function of an Observation, or the name or path of a preset.
        batched: True runs branches and source as rows of one call, False one after another with the source's K/V kept
            for one step; default: True if the policy may lock, else as the pipeline does.
        options: anything else `KVLock` takes, e.g. estimator, composite, rescale, layers, ring.

    Yields:
        The session; its `trace` tells what happened in the latest call of the pipeline.

    Raises:
        PipelineError: a pipeline, or a form of it, in which this cannot work; says what can.
        KVLockError: whatever `KVLock` refuses.
    """
    networks = _networks(pipe)
    check_flow(pipe.scheduler, type(pipe).__name__)
    if source_prompt is not None:
        if source_embeds is not None:
            raise PipelineError("source_prompt and source_embeds were both given; pass one of them.")
        source_embeds = _encoded(pipe, source_prompt)
    session = Session(
        networks, source_embeds=source_embeds, batched=batched, source=source, mask=mask, policy=policy, **options
    )
    steps = _Steps(pipe, session)
    with ExitStack() as stack:
        stack.callback(session.end)
        for network in networks:
            stack.enter_context(intercepted(network, Interception(steps.answer, steps.passing)))
        yield session


def _encoded(pipe: Any, prompt: str) -> Tensor:
    """A prompt as the pipeline's own call encodes it: the method alone has another default for the length."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    length = {} if parameter is None else {"max_sequence_length": parameter.default}
    with torch.no_grad():
        return pipe.encode_prompt([prompt], do_classifier_free_guidance=False, **length)[0]


def _networks(pipe: Any) -> list[Any]:
    names = [kind.__name__ for kind in type(pipe).__mro__]
    if "ModularPipeline" in names:
        raise PipelineError(
            f"{type(pipe).__name__} is a modular pipeline: it takes a guider.\n"
            "  pipe.update_components(guider=kv.diffusers.KVLockGuider(source=..., mask=..., scheduler=pipe.scheduler))"
        )
    if not set(PIPELINES) & set(names):
        raise PipelineError(
            f"{type(pipe).__name__} cannot be locked from outside; {', '.join(PIPELINES)} can. LTX, CogVideoX and "
            "Mochi run both branches of guidance as one batch, HunyuanVideo and Flux guide by an embedded scale.\n"
            "  Does its pipeline have a guider, as HunyuanVideo 1.5 does? "
            "pipe.register_modules(guider=kv.diffusers.KVLockGuider(...)).\n"
            "  Edit with the same weights through a k-diffusion sampler: "
            "kv.edit_video(clip, mask, prompt, model=kv.from_pipeline(pipe))."
        )
    if "WanImageToVideoPipeline" in names and pipe.config.get("expand_timesteps"):
        raise PipelineError(
            "this Wan 2.2 5B pipeline keeps its first frame at noise level 0, so its latents have no one noise level.\n"
            "  Edit with kv.edit_video(clip, mask, prompt, model=kv.from_pipeline(pipe))."
        )
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    return [network for network in found if network is not None]


class _Steps:
    """Pairs the pipeline's calls up to steps, and answers them."""

    def __init__(self, pipe: Any, session: Session) -> None:
        self.pipe, self.session = pipe, session
        self._waiting: tuple[Call, Tensor, float] | None = None
        self._last = 0.0

    def passing(self) -> bool:
        """The lock's own calls, and calls from outside the pipeline's loop, are none of a step's."""
        return self.session.busy or getattr(self.pipe, "_current_timestep", None) is None

    def answer(self, call: Call) -> Tensor:
        """The prediction for one call of the pipeline."""
        if self._waiting is not None and self._waiting[0].hidden is call.hidden:
            (cond, blank, time), self._waiting = self._waiting, None
            return self._both(cond, call, blank, time)
        self._waiting = None
        time = self._time(call)
        if self.pipe.do_classifier_free_guidance:
            passive = self.session.expert(call.network).lock.changes_nothing_itself
            blank = call.blank(call.hidden.dtype if passive else torch.float32)
            self._waiting = call, blank, time
            return blank
        answer = self.session.evaluate(call, None, time=time, requested=1.0)
        return _known(answer.guided if answer.guided is not None else answer.cond)

    def _both(self, cond: Call, uncond: Call, blank: Tensor, time: float) -> Tensor:
        answer = self.session.evaluate(cond, uncond, time=time, requested=self._asked(cond))
        if answer.guided is None:
            blank.copy_(_known(answer.cond))
            return _known(answer.uncond)
        blank.copy_(answer.guided)
        return blank

    def _asked(self, call: Call) -> float:
        second = call.network is getattr(self.pipe, "transformer_2", None)
        scale = self.pipe._guidance_scale_2 if second else self.pipe._guidance_scale
        return float(scale)

    def _time(self, call: Call) -> float:
        scheduler = self.pipe.scheduler
        time = time_of(scheduler, call.timestep)
        if self.session.run is None or is_new_run(scheduler) or time > self._last * (1 + 1e-4):
            first = getattr(scheduler, "begin_index", None) or 0
            self.session.begin(scheduler.sigmas[first:])
        self._last = time
        return time


def _known(prediction: Tensor | None) -> Tensor:
    if prediction is None:
        raise RunError("the transformer's prediction was not evaluated; this is a bug in kvlock_sampling.")
    return prediction
