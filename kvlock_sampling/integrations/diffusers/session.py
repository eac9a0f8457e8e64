"""A lock driven by another loop, one evaluation at a time: what `locked` and `KVLockGuider` share."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...lock import KVLock, evaluate
from ...run import Run
from ...settings import LockSettings
from ...trace import Trace
from ...types import PipelineError, RunError, SourceError
from .calls import Call, FlowCalls
from .schedule import sigmas_of

_PIPELINES_OWN = {"sigmas", "scale_arg", "source_args", "branch"}


class Session:
    """The lock of one pipeline, over one sampling run after another. Two experts share one state. `trace` is the latest
    run's, and empty before the first. `options` as in `locked`; PipelineError for one that the pipeline decides.
    """

    def __init__(self, **options: Any) -> None:
        self.edit(**options)

    def edit(self, **options: Any) -> None:
        """Set the options. Locks are made anew, each when its transformer is first seen."""
        if wrong := sorted(_PIPELINES_OWN & options.keys()):
            raise PipelineError(
                f"{wrong[0]}= is for a lock around a denoiser; in a diffusers pipeline the pipeline sets it.\n"
                "  For the source's own prompt pass source_prompt='...' or source_embeds=...; leave out the rest."
            )
        given = options.pop("source_embeds", None)
        given = {"encoder_hidden_states": given} if isinstance(given, Tensor) else {} if given is None else given
        if not (isinstance(given, Mapping) and all(isinstance(part, Tensor) for part in given.values())):
            what = f"{type(given).__name__}; expected a tensor (1 or batch, tokens, dim), or tensors by name"
            raise PipelineError(f"source_embeds is a {what}: pipe.encode_prompt(text, max_sequence_length=512)[0].")
        self.source_embeds = given
        self.batched: bool | None = options.pop("batched", None)
        self.options = options
        self.run: Run | None = None
        self.trace = Trace()
        self.experts: dict[int, tuple[FlowCalls, LockSettings]] = {}
        self._placed: dict[str, Tensor] | None = None

    def expert(self, network: nn.Module) -> tuple[FlowCalls, LockSettings]:
        """The denoiser of this transformer and the settings of its lock, made when it is first seen."""
        if id(network) not in self.experts:
            calls = FlowCalls(network, index=len(self.experts))
            settings = KVLock(calls, **self.options).settings
            batched = settings.layers is not None if self.batched is None else self.batched
            self.experts[id(network)] = calls, replace(settings, batched=batched)
        return self.experts[id(network)]

    def only_scales(self, network: nn.Module) -> bool:
        """Whether the lock can change no more than the guidance scale."""
        settings = self.expert(network)[1]
        return settings.layers is None and not settings.composite and not settings.rescale

    def begin(self, times: Tensor | None) -> None:
        """Begin a run of this thread or task. `times` are its falling flow times, for policies that count steps."""
        self.end()
        levels = None if times is None else tuple(dict.fromkeys(sigmas_of(times).tolist()))  # heun has each twice
        self.run = Run(levels)
        self.trace, self._placed = self.run.trace, None

    def end(self, *, complete: bool = False) -> None:
        """End the run, and release what it held open. Its trace stays. A complete run is checked to its last number."""
        if self.run is not None:
            if complete:
                self.run.settle(next(reversed(self.experts.values()))[1])
            self.run.close()
        self.run = None

    def mine(self) -> Run:
        """The run, which must be of this thread or task."""
        if self.run is not None and self.run.is_here():
            return self.run
        raise RunError(
            "this step is of no run that this thread or task began; a guider serves one run at a time.\n"
            "  Or give each thread or task its own guider, guider.new(), and a second expert guider.partner(scale)."
        )

    def evaluate(
        self, cond: Call, uncond: Call | None, *, time: float, requested: float, latents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Evaluate the branches of one step under the lock: `time` is the flow time in (0, 1], `requested` the guidance
        scale that the pipeline was called with, `latents` its state, if finer than what the transformer gets.

        Both answers are the guided, composited velocity v, so that u + w (c - u)  gives v for every w; if the lock
        changed nothing, they are the two predictions, so that the pipeline gives its own bits.
        """
        run = self.mine()
        calls, settings = self.expert(cond.network)
        self._check(cond)
        x, sigma = calls.at(cond, time, latents)
        branches: dict[str, Any] = {"cond": calls.branch(cond)}
        if uncond is not None:
            branches |= {"uncond": calls.branch(uncond), "cond_scale": requested}
        settings = replace(settings, source_args=self._source_args(calls, branches["cond"]))
        denoised = evaluate(settings, run, x, sigma, branches)
        c, u = (calls.raw(branches.get(name)) for name in ("cond", "uncond"))
        if c is not None and self.only_scales(cond.network):
            used = self.trace.steps[-1].cfg_scale if self.trace.steps else torch.tensor(requested)  # none at sigma 0
            weight = getattr(run.timeline.last, "composite", None)
            free = not isinstance(weight, Tensor) and not weight  # no policy asks for the source's background
            if free and (uncond is None or bool((used == torch.full_like(used, requested)).all())):
                return c, c if u is None else u  # at a scale of 1 the unconditional branch was left out
        return (guided := calls.velocity(denoised)), guided

    def _source_args(self, calls: FlowCalls, cond: dict[str, Tensor]) -> dict[str, Any]:
        if not (given := self.source_embeds):
            return {}
        if self._placed is None:
            if wrong := sorted(given.keys() - cond.keys()):
                raise PipelineError(
                    f"source_embeds has {', '.join(wrong)}, which the pipeline does not give its transformer; it gives "
                    f"{', '.join(sorted(cond))}."
                )
            masks = {m for n in given for m in (n.replace("hidden_states", "attention_mask"), f"{n}_mask")}
            if lacks := ", ".join(sorted((masks & cond.keys()) - given.keys())):
                raise PipelineError(f"source_embeds lacks {lacks}; give the source's own, in a mapping of all.")
            like = {k: cond[k].dtype if v.is_floating_point() else v.dtype for k, v in given.items()}
            self._placed = {k: v.to(cond[k].device, like[k]) for k, v in given.items()}
        return {"cond": calls.known({**cond, **self._placed})}

    def _check(self, call: Call) -> None:
        steps = (timestep := call.arguments["timestep"]).flatten()  # (batch,), or (batch, tokens)
        if timestep.ndim == 2 and bool((steps != steps[0]).any()):
            raise PipelineError(
                "this pipeline gives its known first frame the timestep 0, so the source has no single noise level.\n"
                "  Wan 2.2 5B is edited by kv.edit_video(model=kv.from_pipeline(pipe), ...); others cannot be."
            )
        source, latents = self.options.get("source"), call.parts[0]
        if source is not None and source.shape[1:] != latents.shape[1:]:
            raise SourceError(
                f"source latents have shape {tuple(source.shape)}, the pipeline's are {tuple(latents.shape)}.\n"
                "  Pass the clip's size, pipe(height=...), no references, and packed latents as source.flatten(2).mT."
            )
