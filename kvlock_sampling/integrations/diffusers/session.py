"""A lock whose evaluations somebody else's loop asks for, one at a time: what a pipeline hook and a guider share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...attention import Hooks
from ...attention.compat.step_caches import StepCaches
from ...kv_cache import CacheSession
from ...lock import KVLock
from ...run import Run, as_schedule
from ...trace import Trace
from ...types import RunError, SourceError
from .calls import Call
from .errors import PipelineError
from .flow import FlowCalls
from .time import levels_of

_DECIDED_HERE = {"sigmas", "scale_arg", "source_args", "branch"}


class PipelineLock(KVLock):
    """A `KVLock` that can leave its run between two evaluations: hooks are in the model only during one."""

    @contextmanager
    def resumed(self, run: Run, hooks: Hooks | None) -> Iterator[None]:
        """Go on with a run inside the block."""
        with ExitStack() as stack:
            run.hooks = hooks
            self._local.runs = [*self._runs(), run]
            stack.callback(self._local.runs.pop)
            yield

    @property
    def changes_nothing_itself(self) -> bool:
        """Whether no more than the guidance scale can be touched."""
        return self.layers is None and not self.composite and not self.rescale


class Answer(NamedTuple):
    """What an evaluation found. `guided` is the velocity to step with; None where nothing changed, and the pipeline's
    own arithmetic on `cond` and `uncond` is to be used.
    """

    guided: Tensor | None
    cond: Tensor | None
    uncond: Tensor | None


class Expert(NamedTuple):
    """One transformer with its lock."""

    calls: FlowCalls
    lock: PipelineLock
    hooks: Hooks | None


class Session:
    """The lock of one pipeline, over one sampling run after another; one state, also where two experts take turns.

    source_embeds: what the source's own pass reads as text, (1 or batch, tokens, dim), or several of the transformer's
        arguments by name, with their masks, say; None: the edit's prompt.
    options: of `KVLock`. `batched` None: branches run one after another, as the pipeline runs them, unless the policy
        may lock; then the source rides along as rows of one call, and nothing has to be kept.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module] = (),
        *,
        source_embeds: Tensor | Mapping[str, Tensor] | None = None,
        batched: bool | None = None,
        **options: Any,
    ) -> None:
        if wrong := sorted(_DECIDED_HERE & options.keys()):
            raise PipelineError(
                f"{wrong[0]}= is for a lock around a denoiser; inside a pipeline of diffusers the schedule, the scale "
                "and the arguments are the pipeline's.\n"
                "  The source's own prompt is source_prompt='...' or source_embeds=...; leave the rest away."
            )
        self.source_embeds, self.batched, self.options = source_embeds, batched, options
        self._placed: dict[tuple[str, int], Tensor] = {}
        self.busy = False
        self.run: Run | None = None
        self._experts: dict[int, Expert] = {}
        # Of this run, by expert: what step caches remember, and what the KV cache holds.
        self._caches: dict[int, StepCaches | None] = {}
        self._keepers: dict[int, CacheSession] = {}
        for network in networks:
            self.expert(network)

    @property
    def trace(self) -> Trace:
        """What happened in the latest run; empty before the first."""
        return Trace() if self.run is None else self.run.trace

    def expert(self, network: nn.Module) -> Expert:
        """This transformer's lock, made when it is first seen. Raises KVLockError: whatever `KVLock` refuses."""
        if id(network) not in self._experts:
            calls = FlowCalls(network, index=len(self._experts))
            lock = PipelineLock(calls, **self.options)
            lock.batched = lock.layers is not None if self.batched is None else self.batched
            hooks = None if lock.layers is None else Hooks(lock.layers)
            self._experts[id(network)] = Expert(calls, lock, hooks)
        return self._experts[id(network)]

    def begin(self, times: Tensor | None) -> None:
        """A new sampling run begins.  times: its flow times, falling, for policies that count steps."""
        self.end()
        self.run = Run(None, ExitStack(), None if times is None else as_schedule(levels_of(times)))
        self._caches, self._keepers = {}, {}

    def end(self) -> None:
        """The run is over: what it held open is let go. Its trace stays."""
        if self.run is not None:
            self.run.stack.close()

    def evaluate(
        self, cond: Call, uncond: Call | None, *, time: float, requested: float, latents: Tensor | None = None
    ) -> Answer:
        """One step: the branches of one noise level, evaluated under the lock.

        time: flow time in (0, 1].  asked: the guidance scale the pipeline was called with.
        latents: the pipeline's state, where it is finer than what the transformer is given.
        """
        if self.run is None:
            raise RunError("the lock saw a step before the run began; start the pipeline anew.")
        expert = self.expert(cond.network)
        self._check(cond)
        calls, lock = expert.calls, expert.lock
        x, sigma = calls.at(cond, time, latents)
        branches: dict[str, Any] = {"cond": calls.branch(cond)}
        if uncond is not None:
            branches |= {"uncond": calls.branch(uncond), "cond_scale": requested}
        lock.source_args = self._source_args(expert, branches["cond"])
        self.busy = True
        self.run.caches, self.run.keeper = self._caches.get(calls.index), self._keeper(expert, self.run)
        try:
            with lock.resumed(self.run, expert.hooks):
                denoised = lock(x, sigma, **branches)
        finally:
            self.busy = False
            self._caches[calls.index] = self.run.caches
        raw = [calls.raw.get(id(branches.get(name))) for name in ("cond", "uncond")]
        if self._untouched(lock, requested, uncond is not None, raw):
            return Answer(None, raw[0], raw[1])
        return Answer(calls.velocity(denoised), raw[0], raw[1])

    def _source_args(self, expert: Expert, cond: dict[str, Tensor]) -> dict[str, Any]:
        if self.source_embeds is None:
            return {}
        given = self.source_embeds
        if isinstance(given, Tensor):
            given = {"encoder_hidden_states": given}
        if wrong := sorted(given.keys() - cond.keys()):
            raise PipelineError(
                f"source_embeds has {', '.join(wrong)}, which the pipeline does not give its transformer; it gives "
                f"{', '.join(sorted(cond))}."
            )
        for name, value in given.items():
            if (name, id(value)) not in self._placed:
                like = cond[name]
                dtype = like.dtype if value.is_floating_point() else value.dtype
                self._placed[name, id(value)] = value.to(like.device, dtype)
        placed = {name: self._placed[name, id(value)] for name, value in given.items()}
        return {"cond": expert.calls.known({**cond, **placed})}

    def _keeper(self, expert: Expert, run: Run) -> CacheSession | None:
        lock = expert.lock
        if lock.kv_cache is None or lock.layers is None:
            return None
        if expert.calls.index not in self._keepers:
            self._keepers[expert.calls.index] = lock.kv_cache.session(lock.model, lock.layers)
            run.stack.callback(self._keepers[expert.calls.index].close)
        return self._keepers[expert.calls.index]

    def _untouched(self, lock: PipelineLock, requested: float, guided: bool, raw: list[Tensor | None]) -> bool:
        """Whether this evaluation is the pipeline's own: then its own arithmetic gives its own bits."""
        if not lock.changes_nothing_itself or raw[0] is None or (guided and raw[1] is None):
            return False
        used = self.trace.steps[-1].cfg_scale
        return not guided or bool((used == torch.tensor(requested, dtype=used.dtype, device=used.device)).all())

    def _check(self, call: Call) -> None:
        steps = call.timestep.flatten()
        if call.timestep.ndim == 2 and bool((steps != steps[0]).any()):
            raise PipelineError(
                "this pipeline gives some frames a timestep of their own, the known first one 0, so there is no one "
                "noise level for the source.\n"
                "  Edit with kv.edit_video(model=kv.from_pipeline(pipe), ...), which knows such models."
            )
        source = self.options.get("source")
        latents = call.hidden[:, : call.channels]
        if source is not None and source.shape[1:] != latents.shape[1:]:
            raise SourceError(
                f"source latents have shape {tuple(source.shape)}, the pipeline's are {tuple(latents.shape)}.\n"
                "  Call the pipeline with the clip's own size: pipe(height=..., width=..., num_frames=...), without "
                "reference images."
            )
