"""KVLock: a denoiser that measures, decides and locks. The one stateful object, and the only one that knows the order.

sampler -> KVLock -> source at the same sigma -> attention layers -> model -> x0-hat -> variance -> policy
        <- denoised <- composite <- guidance <- cfg_scale (this evaluation), lock (the next one)
"""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor

from . import options, samplers
from .attention import AttentionLayers, Hooks, find_layers, reachable_modules
from .attention.compat.step_caches import StepCaches
from .batching import take
from .branches import GuidedCall, OwnedCall
from .control import HostReads, LockRatio
from .controller import Controller
from .kv_cache import KVCache, Plan, plan, uncacheable
from .locking import Locker, can_narrow, why_not_narrow
from .masks import as_mask
from .masks.fitted import FittedMask, as_transition
from .proxy import DenoiserProxy
from .run import Run, as_rows, as_schedule, default_of, method_of, names_parameter
from .settings import judgement, noise_levels, requested_scale
from .source import Source
from .trace import Trace
from .types import AttentionError, Denoiser, RunError, Scalar, SourceError, StepInfo
from .variance import Estimator


class KVLock(DenoiserProxy):
    """Wrap a denoiser so that it can be handed to any k-diffusion style sampler.

    Inside its `with` block a lock is called as the model is, `lock(x, sigma, **extra_args) -> denoised`, shaped like x,
    guided and with the source's background; `lock.sample(sampler, x, sigmas, ...)` is block and run in one. `trace`
    then tells, evaluation by evaluation, what was measured and done.

    Args:
        model: the denoiser, `model(x, sigma, **extra_args) -> x0-hat`. With `cond`, `uncond` and `cond_scale` in the
            sampler's extra_args the lock does the guidance itself, and `model` is called with `cond=` alone, on
            batches of up to three branches. A model that does its own guidance is recognised by a parameter named
            `cond_scale` (or name it with `scale_arg`).
        source: clean latents of the clip being edited, (batch or 1, channels, time, height, width), in the sampler's
            space. None: nothing to lock; the policy then schedules guidance alone.
        mask: 1 = edit, at the clip's or the latents' size; see `kvlock_sampling.masks`. Without a source it says where
            to measure.
        policy: a Policy, a function of an Observation, or the name or path of a preset.
        estimator: how variance is measured; default: the preset's, or sigma-normalised trajectory variance.
        threshold: the variance at risk 1, a float or a function of sigma; default: the preset's or the estimator's.
        source_args: extra_args of the source's own branch, e.g. {"cond": source_prompt}; default: the edit's.
        noise: the source's fixed noise, shaped like `source`; "fixed" draws it from seed 0, the same in every run;
            default: the run's own. Source, mask and noise are copied: what is changed in place afterwards is not seen
            (another clip, another lock). Prompts in `source_args` are read at every evaluation, as extra_args are.
        composite: give `denoised` the source's background. Default: yes, unless the policy can never lock.
        rescale: s*-rescaled guidance (CFG-Zero*) instead of plain; default: the preset's, or plain.
        cfg_floor: lower bound, >= 0, of a scheduled cfg_scale; default: the preset's, or 1.
        layers: attention layers; default: found in the model.  layers: indices or a slice of them to lock.
        ring: (width in tokens, share): tokens that near the mask take only this share of the lock; default: no ring.
        sigmas: the noise schedule, for policies that count steps. Samplers of this library tell it by themselves.
        scale_arg: name of the guidance scale of a model that does its own guidance; the lock then sets it.
        branch: for such a model, its single-branch denoiser: makes the source's pass cheaper.
        batched: False runs branches one after another and keeps the source's K/V for one evaluation: less
            activation memory, the same result up to rounding.
        foreground: leave tokens that are locked in full out of the computation, the same result up to rounding.
            Default: wherever that can be done; False never, True with a warning where it cannot.
        kv_cache: keeps the source's K/V over steps and runs, see `KVCache`: fewer passes of the source, close to the same
            result. For runs of several seeds give `noise` too, e.g. noise="fixed", and for several prompts
            `source_args`: K/V serve again only where nothing they depend on has changed.

    An option that can have no effect is refused, and where that hangs on the policy, told by a warning. A policy that
    never locks, such as "off", sets aside what describes clip and model: source_args, noise, layers, branch.

    Raises:
        SourceError, MaskError, PolicyError, EstimatorError, AttentionError: at construction, wherever that is possible.
            Without a source a Constant that locks is refused there; of any other policy only the run shows that it
            asks for a lock, and the first evaluation that would have to be locked raises SourceError.
        RunError: a lock around a lock, a `scale_arg` that the model does not take; a call outside the `with` block.
        KVLockError: the base of all these; a switch that is neither True nor False.
    """

    trace: Trace

    def __init__(
        self,
        model: Denoiser,
        *,
        source: Tensor | None = None,
        mask: Any = None,
        policy: Any = "default",
        estimator: Estimator | None = None,
        threshold: Any = None,
        source_args: Mapping[str, Any] | None = None,
        noise: Tensor | Literal["fixed"] | None = None,
        composite: bool | None = None,
        rescale: bool | None = None,
        cfg_floor: float | None = None,
        layers: AttentionLayers | Iterable[int] | slice | None = None,
        transition: tuple[float, float] | None = None,
        sigmas: Tensor | None = None,
        scale_arg: str | None = None,
        branch: Denoiser | None = None,
        batched: bool = True,
        foreground: bool | None = None,
        kv_cache: KVCache | None = None,
    ) -> None:
        options.check_unlocked(model, KVLock)
        options.check_unlocked(branch, KVLock)
        options.check_scale_arg(model, scale_arg)
        options.check_flags(composite=composite, rescale=rescale, batched=batched, foreground=foreground)
        self.model = model
        self.policy, self.estimator, self.threshold, self.rescale, self.cfg_floor, advice = judgement(
            model,
            policy,
            estimator=estimator,
            threshold=threshold,
            rescale=rescale,
            cfg_floor=cfg_floor,
            locks=source is not None,
        )
        if source is None:
            about_source = {"source_args": source_args, "noise": noise, "layers": layers}
            options.check_needs_source(
                **about_source, transition=transition, branch=branch, foreground=foreground, kv_cache=kv_cache
            )
            options.check_needs_no_lock(self.policy)
        if source is not None and mask is None:
            raise SourceError("source was given without mask; pass mask=..., 1 = edit, at the clip's or latents' size.")
        self.source = None if source is None else Source(source, noise=noise, add_noise=method_of(model, "add_noise"))
        self.region = None if mask is None else FittedMask(mask)
        if self.source is not None and self.region is not None:
            self.region.latent(self.source.latents)
        self.source_args = dict(source_args or {})
        self.transition = as_transition(transition)
        locks = self.source is not None and not self.policy.never_locks
        self.composite = locks if composite is None else composite
        if self.composite and self.source is None:
            raise SourceError("composite=True needs source= and mask=.")
        self.layers: AttentionLayers | None = None
        self._nothing_left = False
        if locks:
            assert self.source is not None
            self.layers = layers if isinstance(layers, AttentionLayers) else find_layers(model).select(layers)
            self.layers.grid(self.source.latents.shape)
            assert self.region is not None
            edited = self.region.tokens(self.source.latents, self.layers.patch)
            if bool(edited.all()):
                warnings.warn(
                    f"no token is left to lock: with tokens of {self.layers.patch} latents the mask reaches into every "
                    "one of them. Nothing will be locked; a smaller mask, or a larger clip, leaves some.",
                    stacklevel=2,
                )
                self.layers, self._nothing_left = None, True
        elif self.source is not None:
            options.tell_never_locks(
                self.policy, layers=layers, transition=transition, foreground=foreground, kv_cache=kv_cache
            )
        if (
            self.transition is not None
            and self.layers is not None
            and self.region is not None
            and self.source is not None
        ):
            self.region.background(self.source.latents, self.layers.patch, self.transition)
        self._schedule = None if sigmas is None else as_schedule(sigmas, model)
        self.scale_arg = scale_arg or ("cond_scale" if names_parameter(model, "cond_scale") else None)
        self._default_scale = default_of(model, self.scale_arg or "cond_scale")
        self.branch, self.batched = branch, batched
        options.check_branch(branch, self.scale_arg)
        options.check_source_args(self.source_args, self.scale_arg)
        options.tell_guided(self.scale_arg, rescale=self.rescale, batched=batched)
        unread = mask if source is None else None
        options.tell_unmeasured(self.policy, estimator=estimator, threshold=threshold, mask=unread)
        measures = self.estimator if self.policy.uses_risk else None
        self._narrows = self.layers is not None and can_narrow(
            foreground, why_not_narrow(self.layers, measures, composite=self.composite, rescale=self.rescale)
        )
        self._expert = method_of(model, "expert")
        if kv_cache is None and advice is not None and advice.kv_cache and self.layers is not None:
            kv_cache = None if uncacheable(self.layers) else KVCache(**dict(advice.kv_cache))
        if not isinstance(kv_cache, KVCache | None):
            raise AttentionError(f"kv_cache={kv_cache!r}; expected a KVCache, e.g. kv_cache=kv.KVCache('kv-cache').")
        self.kv_cache = None if self.layers is None else kv_cache
        if self.kv_cache is not None and self.layers is not None:
            self.kv_cache.session(self.model, self.layers)
        self.trace = Trace()
        self._local = threading.local()

    # -- one run ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> KVLock:
        stack = ExitStack()
        run = Run(None if self.layers is None else Hooks(self.layers), stack, self._schedule)
        if self.kv_cache is not None:
            assert self.layers is not None
            run.keeper = self.kv_cache.session(self.model, self.layers)
            stack.callback(run.keeper.close)
        self._local.runs = [*self._runs(), run]
        self.trace = run.trace
        return self

    def __exit__(self, *error: Any) -> None:
        run = self._run()
        self._local.runs.pop().stack.close()
        # One evaluation or two are no run: many estimators need a second.
        if error[0] is None and self.policy.uses_risk and run.waited > 2:
            options.tell_never_measured(self.policy, self.estimator, run.waited)

    def sample(self, sampler: Any, x: Tensor, sigmas: Tensor, **arguments: Any) -> Tensor:
        """One run in one line: `with lock: samplers.run(sampler, lock, x, sigmas, ...)`, the schedule known."""
        with self:
            self.on_schedule(sigmas)
            return samplers.run(sampler, self, x, torch.as_tensor(sigmas), **arguments)

    def plan(self, sigmas: Tensor, sampler: Any = "euler") -> Plan:
        """What the KV cache will hold of a run over these noise levels, before anything runs: print it.

        sampler: some evaluate between the levels too, and store more. A policy that does not lock all the time stores
            less, and so may an adaptive sampler, which chooses its levels as it goes.

        Raises:
            RunError: this lock has no KV cache.
        """
        if self.kv_cache is None or self.layers is None or self.region is None or self.source is None:
            raise RunError(
                "this lock keeps nothing, so there is nothing to plan; give it a kv_cache: kv_cache=kv.KVCache(...)."
            )
        selection, _ = self.region.selection(self.source.latents, self.layers.patch, self.transition)
        levels: list[float] = []

        def noting(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
            levels.append(float(sigma.max()))
            return x * 0

        samplers.run(sampler, noting, torch.ones(1, 1), torch.as_tensor(sigmas).float().cpu(), seed=0)
        return plan(self.kv_cache, self.layers, selection, levels)

    def subset(self, index: Tensor, batch: int) -> KVLock:
        """The same lock for some clips of a batch of `batch`: source, mask and the source's arguments cut to them."""
        part = copy.copy(self)
        part.trace = Trace()
        if self.source is not None:
            source = self.source
            noise = take(source.noise, index, batch)
            part.source = Source(take(source.latents, index, batch), noise=noise, add_noise=source.add_noise)
        if self.region is not None:
            given = self.region.given
            if self.source is not None and self.source.latents.ndim == 5:
                given = as_mask(given)  # then its first axis is the clips, whatever it was
            part.region = FittedMask(take(given, index, batch))
        part.source_args = take(self.source_args, index, batch)
        return part

    def on_schedule(self, sigmas: Tensor) -> None:
        """Called by this library's samplers: the noise schedule of the run, ending in 0 or not."""
        self._run().restart(as_schedule(sigmas, self.model))

    def _runs(self) -> list[Run]:
        return getattr(self._local, "runs", [])

    def _run(self) -> Run:
        runs = self._runs()
        if not runs:
            raise RunError(
                "the lock was called outside its `with` block, or from another thread than entered it: hooks and "
                "state exist only there.\n"
                "  with lock:\n      x0 = samplers.dpmpp_2m(lock, x, sigmas, extra_args=...)\n"
                "  or in one line: x0 = lock.sample('dpmpp_2m', x, sigmas, extra_args=...)"
            )
        return runs[-1]

    def __repr__(self) -> str:
        layers = "no layers" if self.layers is None else f"{len(self.layers.layers) or 'watched'} layers"
        return f"KVLock({type(self.model).__name__}, {self.policy!r}, {self.estimator!r}, {layers})"

    # -- one evaluation -----------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """One evaluation: measured, locked by the last decision, guided by this one, composited.

        x: (batch, ...), x0 + sigma * noise.  sigma: one noise level >= 0, () or (batch,).  Returns a tensor like x.

        Raises:
            RunError: outside the `with` block, or arguments that cannot be meant.  KVLockError: see the class.
        """
        run = self._run()
        sigma = torch.as_tensor(sigma, device=x.device)
        requested = requested_scale(extra_args, self.scale_arg or "cond_scale", self._default_scale)
        reads, last = HostReads(), run.timeline.last
        reads.together(sigma, requested, *(() if last is None else (last.lock, last.cfg_scale)))
        own, level = noise_levels(reads.extremes(sigma), self.model)
        control = self._controller()
        seen = control.watch(x, level, requested, run.schedule)
        if level == 0:
            return self._at_zero(run, reads, x, sigma, extra_args, requested)
        # Asked on the host: to look at a noise level on the device would be another wait for it.
        expert = None if self._expert is None else self._expert(torch.tensor(own))
        state = run.timeline.rewind(level)
        if state is None:
            run.begin(level, x)
            state = control.first(seen, expert)
        elif state.expert != expert:
            # Another network took over: how far its prediction is from the other's is no sign of doubt.
            state = state._replace(estimator=self.estimator.init(), expert=expert)
        lock = LockRatio(state.lock, len(x), self.policy, reads)
        seen = seen._replace(lock=lock.rows(x.device))
        call = self._prepare(run, reads, x, sigma, own, level, lock, expert)
        used = requested if state.cfg_scale is None else state.cfg_scale

        cond = call.conditional(extra_args, used, state.cfg_scale is not None)
        after, seen, answer = control.decide(state, call, cond, seen)
        scale = requested if after.cfg_scale is None else after.cfg_scale
        denoised = self._composited(call.guided(cond, scale))

        if not run.trace.steps and self.scale_arg is None and after.cfg_scale is None:
            options.tell_unguided(extra_args)
        run.advance(level, after)
        acted = used if isinstance(call, GuidedCall) else scale if "uncond" in extra_args else 1.0
        step = StepInfo(
            call=len(run.trace),
            sigma=level,
            variance=seen.variance,
            risk=seen.risk,
            lock=seen.lock,
            next_lock=as_rows(answer.lock, seen.cfg_scale),
            cfg_scale=as_rows(acted, seen.cfg_scale),
            evaluations=call.passes,
            fused_layers=call.fused,
            computed=call.share,
        )
        run.trace.steps.append(step)
        return denoised

    def _controller(self) -> Controller:
        tokens = None
        if self.layers is not None and self.source is not None:
            tokens = math.prod(self.layers.grid(self.source.latents.shape))
        return Controller(self.policy, self.estimator, self.threshold, self.cfg_floor, self.region, tokens)

    @property
    def locker(self) -> Locker | None:
        """What there is to lock to; None without a source, or with a policy that never locks."""
        if self.source is None or self.region is None or self.layers is None:
            return None
        return Locker(self.source, self.region, self.layers, self.transition, self._narrows)

    def _at_zero(
        self, run: Run, reads: HostReads, x: Tensor, sigma: Tensor, extra_args: Mapping[str, Any], requested: Scalar
    ) -> Tensor:
        """At sigma 0 x is clean already: nothing is measured, decided or locked."""
        call = self._prepare(run, reads, x, sigma, 0.0, 0.0, LockRatio(0.0, len(x), self.policy))
        denoised = call.guided(call.conditional(extra_args, requested, False), requested)
        return self._composited(denoised)

    def _composited(self, denoised: Tensor) -> Tensor:
        if not self.composite:
            return denoised
        assert self.source is not None
        assert self.region is not None
        return torch.lerp(self.source.matching(denoised), denoised, self.region.latent(denoised))

    def _prepare(
        self,
        run: Run,
        reads: HostReads,
        x: Tensor,
        sigma: Tensor,
        own: float,
        level: float,
        lock: LockRatio,
        expert: Any = None,
    ) -> OwnedCall | GuidedCall:
        """The source at this noise level, and which tokens take how much of it."""
        locker = self.locker
        if lock.active and locker is None and not self._nothing_left:
            raise options.nothing_to_lock_to(self.policy, lock.high)
        locking = None
        if locker is not None:
            if run.noise is None and own > 0:
                given = locker.source.noise
                run.noise = locker.source.implied_noise(x, own) if given is None else given.to(x)
            if lock.active:
                assert run.noise is not None
                locking = locker.at(x, own, lock, run.noise, run.keeper, expert)
        if run.caches is None:
            run.caches = StepCaches([*reachable_modules(self.model), *(self.layers.networks if self.layers else ())])
        kind = GuidedCall if self.scale_arg else OwnedCall
        return kind(
            self.model,
            x,
            sigma,
            level,
            run.hooks,
            locking,
            self.source_args,
            batched=self.batched,
            probes=self.policy.uses_risk and self.estimator.cost > 0,
            rescale=self.rescale,
            branch=self.branch,
            scale_arg=self.scale_arg,
            reads=reads,
            caches=run.caches,
        )
