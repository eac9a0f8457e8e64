"""The lock inside a classic pipeline of diffusers: `with locked(pipe, source=..., mask=...): pipe(...)`.

The pipeline keeps its loop, its scheduler and its arithmetic. Its calls of the transformer are intercepted: first the
conditional one, then the unconditional one with the same latents. The first is answered with a tensor that is filled
in at the second: both answers are the guided, composited velocity v, so the pipeline's  u + w (c - u)  is v for all w.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ...masks import as_mask
from ...types import PipelineError, SourceError
from ...utils.modules import plain_copies, wearing
from ...utils.warn import warn
from .calls import Call, intercepted, taken
from .latents import compression
from .schedule import check_flow, time_of
from .session import Session

PIPELINES = ("WanPipeline", "WanVideoToVideoPipeline", "WanImageToVideoPipeline", "WanVACEPipeline")
"""Classic pipelines that call each branch separately, the conditional one first."""


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
    """Sample under the lock in every call of the pipeline inside the block; afterwards the pipeline is as before.

    Args:
        pipe: A classic Wan pipeline: text, video or image to video, or VACE. Two experts share one lock and state.
        source: Clean latents of the clip, (1 or batch, channels, time, height, width): `encode_clip(pipe.vae, clip)`.
        mask: 1 = edit, at the clip's or the latents' size.
        source_prompt: What the clip shows now, at the default `max_sequence_length`; default: the edit's prompt.
        source_embeds: The same, encoded: (1 or batch, tokens, dim), or several of the transformer's arguments by name.
        policy: As in `KVLock`.
        batched: True runs branches and source as rows of one call, False one after another; default: True if the
            policy may lock, else False, as the pipeline does.
        options: Other options of `KVLock`, e.g. estimator, composite, rescale, layers, transition.

    Yields:
        The session. Its `trace` says what happened in the latest call of the pipeline.

    Raises:
        PipelineError: The lock cannot work in this pipeline; the message says what can.
        KVLockError: As `KVLock` raises.
    """
    networks = _networks(pipe)  # an error comes before a text is encoded
    check_flow(pipe.scheduler, type(pipe).__name__)
    if isinstance(source, Tensor) and source.ndim != 5:
        wanted = "latents (batch or 1, channels, time, height, width): kv.diffusers.encode_clip(pipe.vae, clip)"
        raise SourceError(f"source has shape {tuple(source.shape)}; expected {wanted}.")
    if source is not None and any(k.__name__.startswith(("DEIS", "SASolver")) for k in type(pipe.scheduler).__mro__):
        hint = "pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)"
        raise PipelineError(f"{type(pipe.scheduler).__name__} misses the clip even with exact velocities.\n  {hint}")
    lengths = mask is not None and pipe.vae is not None
    if isinstance(source, Tensor) and lengths and as_mask(mask).shape[2] != source.shape[2]:
        as_mask(mask, frames=1 + compression(pipe.vae)[0] * (source.shape[2] - 1))  # raises for another length
    if source_prompt is not None:
        if source_embeds is not None:
            raise PipelineError("source_prompt and source_embeds were both given; pass one of them.")
        # As the pipeline's own call encodes it: `encode_prompt` alone has another default length.
        parameter = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
        length = {} if parameter is None else {"max_sequence_length": parameter.default}
        with torch.no_grad():
            text = [source_prompt] if isinstance(source_prompt, str) else list(source_prompt)
            source_embeds = pipe.encode_prompt(text, do_classifier_free_guidance=False, **length)[0]
    session = Session(source_embeds=source_embeds, batched=batched, source=source, mask=mask, policy=policy, **options)
    for network in networks:
        session.expert(network)  # KVLock checks its options here, before anything runs
    called = False

    def locking(kind: Any) -> Any:
        @functools.wraps(kind.__call__)
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal called
            called, answer = True, _answer(pipe, session)
            with ExitStack() as stack:
                for network in _networks(pipe):  # one may have been replaced since, e.g. by its compiled form
                    stack.enter_context(intercepted(network, answer))
                stack.callback(session.end)
                made = kind.__call__(pipe, *args, **kwargs)
                session.end(complete=True)
                return made

        return plain_copies(kind, {"__call__": call})

    with taken(pipe), wearing(pipe, locking), ExitStack() as left:
        left.callback(session.experts.clear)  # a session is kept for its trace, which holds no network
        yield session
    if not called:
        warn("the pipeline was not called in the block of its lock: nothing was locked.")


def _networks(pipe: Any) -> list[Any]:
    names = [kind.__name__ for kind in type(pipe).__mro__]
    if not set(PIPELINES) & set(names):
        raise PipelineError(
            f"{type(pipe).__name__} cannot be locked from outside; {', '.join(PIPELINES)} can. LTX, CogVideoX and "
            "Mochi run both branches of guidance as one batch, HunyuanVideo and Flux guide by an embedded scale.\n"
            "  A modular pipeline takes a guider, kv.diffusers.KVLockGuider(..., scheduler=pipe.scheduler), by "
            "pipe.update_components(guider=...);\n  HunyuanVideo 1.5 by pipe.register_modules(guider=...).\n"
            "  With a k-diffusion sampler: kv.edit_video(clip, mask, prompt, model=kv.from_pipeline(pipe))."
        )
    if "WanImageToVideoPipeline" in names and pipe.config.get("expand_timesteps"):
        raise PipelineError(
            "this Wan 2.2 5B pipeline keeps its first frame at noise level 0: there is no single noise level.\n"
            "  Edit with kv.edit_video(clip, mask, prompt, model=kv.from_pipeline(pipe))."
        )
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    return [network for network in found if network is not None]


def _answer(pipe: Any, session: Session) -> Callable[[Call], Tensor]:
    """A function that pairs the pipeline's calls of one step, and answers them; for one call of the pipeline."""
    waiting: list[tuple[Call, Tensor, float]] = []  # a conditional call, its blank answer, and its flow time
    scales: list[float] = []  # of the experts; a callback that changes the pipeline's own does not change its guidance

    def answer(call: Call) -> Tensor:
        # In float32 a callback that calls the transformer gives it the very same latents.
        if waiting and all(waiting[0][0].arguments[n] is call.arguments[n] for n in ("hidden_states", "timestep")):
            cond, blank, time = waiting.pop()
            second = cond.network is getattr(pipe, "transformer_2", None)
            for_cond, for_uncond = session.evaluate(cond, call, time=time, requested=scales[second])
            blank.copy_(for_cond)
            return blank if for_uncond is for_cond else for_uncond
        scheduler, time = pipe.scheduler, time_of(pipe.scheduler, call.arguments["timestep"])
        if waiting and waiting.pop()[2] != time:  # a callback may have asked at this level
            wanted = "expected both, with the same tensors: kv.edit_video(..., model=kv.from_pipeline(pipe))"
            raise PipelineError(f"the pipeline's loop evaluates one branch alone in a guided step; {wanted}.")
        if session.run is None:
            session.begin(scheduler.sigmas[getattr(scheduler, "begin_index", None) or 0 :])
            given = (getattr(pipe, name, None) for name in ("_guidance_scale", "_guidance_scale_2"))
            scales[:] = (1.0 if scale is None else float(scale) for scale in given)
        if not pipe.do_classifier_free_guidance:
            return session.evaluate(call, None, time=time, requested=1.0)[0]
        blank = call.blank(call.hidden.dtype if session.only_scales(call.network) else torch.float32)
        waiting.append((call, blank, time))
        return blank

    return answer
