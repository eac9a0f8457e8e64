"""KVLock: a denoiser that measures, decides and locks; and `evaluate`, one evaluation from start to end.

sampler -> KVLock -> source at the same sigma -> attention layers -> model -> x0-hat -> variance -> policy
        <- denoised <- composite <- guidance <- cfg_scale, composite (this evaluation), lock (the next one)
"""

import copy
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import Tensor

from . import samplers
from .attention import AttentionLayers
from .branches import GuidedBranches, OwnBranches
from .controller import decide
from .guidance import warn_unguided
from .kv_cache import KVCache, Plan, plan
from .run import Run
from .settings import LockSettings, resolve
from .trace import Trace
from .types import Denoiser, RunError
from .utils.denoiser import DenoiserProxy, method_of, on_clock, to_sigma
from .utils.host import check_prediction
from .variance import Estimator


def evaluate(settings: LockSettings, run: Run, x: Tensor, sigma: Tensor, extra_args: Mapping[str, Any]) -> Tensor:
    """One evaluation of the model under a lock: measured, locked by the last decision, guided by this one, composited.

    `x` is the sampler's input, (batch, ...), `sigma` >= 0 its one noise level, () or (batch,). Returns x0-hat, like x.
    """
    step = run.enter(settings, x, sigma, extra_args)
    kind = GuidedBranches if settings.scale_arg else OwnBranches
    branches = kind(settings, run, step)
    cond = branches.conditional()
    if step.sigma == 0:  # x is clean already: nothing is measured or decided
        denoised = settings.composited(branches.guided(cond, step.requested)[0], settings.kept(step.state.composite, x))
        check_prediction(step.reads, 0.0, denoised)
        return denoised
    state, observation = decide(settings, step.state, branches.evaluation(cond), step.observation)
    scale = step.requested if state.cfg_scale is None else state.cfg_scale
    weight = settings.kept(state.composite, x)
    if branches.narrow and step.reads.range(weight)[0] < 1:
        # The background is released, and has no prediction: every token is computed, and the decision kept.
        nfe, branches = branches.nfe, kind(replace(settings, foreground=False), run, step)
        branches.nfe = nfe
        cond = branches.conditional()
    guided, scale = branches.guided(cond, scale)
    denoised = settings.composited(guided, weight)
    run.leave(settings, step.sigma, state, denoised)
    run.trace.record(observation, state.lock, scale, weight, **branches.counts)
    return denoised


_runs: ContextVar[Mapping[Any, tuple[Run, ...]]] = ContextVar("kvlock_runs", default={})  # noqa: B039
"""By lock, held weakly: the runs that are open in this thread or task, and in those it came from; or the last one."""


class KVLock(DenoiserProxy):
    """Wrap a denoiser so that it can be passed to any k-diffusion style sampler.

    Inside its `with` block a lock is called like the model: `lock(x, sigma, **extra_args) -> denoised`, like x, guided,
    with the source's background. `lock.sample(sampler, x, sigmas, ...)` is block and run in one line.

    Args:
        model: The denoiser, `model(x, sigma, **extra_args) -> x0-hat`. With `cond`, `uncond` and `cond_scale` in the
            sampler's extra_args the lock does the guidance and calls `model` with `cond=` alone, on batches of up to
            three branches. A model that guides itself has a parameter `cond_scale`, or one that `scale_arg` names.
        source: Clean latents of the clip being edited, (batch or 1, channels, time, height, width), in the sampler's
            space; copied. None: nothing to lock; the policy schedules guidance alone.
        mask: 1 = edit, at the clip's or latents' size, copied; see `masks`. Without a source: where to measure.
        policy: A Policy, a function of an Observation, a Preset, or the name or path of a preset.
        estimator: Measures variance. Default: the preset's, or sigma-normalised trajectory variance.
        threshold: The variance at risk 1, a float or a function of sigma. Default: that of the preset, or estimator.
        source_args: extra_args of the source's own branch, e.g. {"cond": source_prompt}. Default: the edit's.
        erase: True takes keys and values from the source with its masked region filled from the surroundings, under
            the unconditional prompt, so that they do not speak of what the edit replaces; without one, the source's. An
            estimator that needs the source's x0-hat then costs one model pass more. Default: the preset's, or False.
        noise: The run's, like `source`, copied; "fixed": of seed 0, for K/V alone. Default: (x - source) / sigma.
        composite: Weight in [0, 1] of the source in the background of `denoised` if the policy gives none; True is 1.
            Default: 1 if the policy may lock, else 0.
        reach: How far from the mask anything may be released, in widths of the mask (the square root of its tokens in a
            frame): beyond it the background is the source's, if the policy acts on it. Default: the preset's, or inf.
        rescale: `s*`-rescaled guidance (`CFG-Zero*`) instead of plain. Default: the preset's, or plain.
        cfg_floor: Lower bound, >= 0, of a scheduled cfg_scale. Default: the preset's, or 1.
        layers: The attention layers to lock: `find_layers(model)`, the default, `sdpa_layers(...)`, or indices of them.
        transition: (width in tokens, fraction): tokens this near the mask take only this fraction of the lock, or None.
        sigmas: The noise schedule, for policies that count steps. This library's samplers pass it on their own.
        scale_arg: Name of the guidance scale of a model that guides itself; the lock sets it: number or (batch, 1...).
        branch: The single-branch denoiser inside such a model: a cheaper source pass, surely under the source's prompt.
        batched: False runs branches one after another: less activation memory, the same result up to rounding.
        foreground: Leave fully locked tokens out of the computation: the same result up to rounding, unless the model
            guides itself by a measure of whole predictions. Default: wherever possible; True warns where it is not.
        kv_cache: Keeps the source's K/V over steps and runs, see `KVCache`. To serve several seeds it also needs
            `noise`, e.g. noise="fixed"; to serve several prompts, `source_args`.

    Attributes:
        settings: The resolved options.
        trace: What was measured and done, evaluation by evaluation, in this thread's or task's innermost open block;
            else in its last one; else in the latest of any.

    Raises:
        SourceError, MaskError, PolicyError, EstimatorError, AttentionError: An option that cannot be used, at
            construction wherever possible. Without a source, a policy that asks for a lock raises it in the run.
        RunError: A lock around a lock, an unknown `scale_arg`, or a call outside the `with` block.
        KVLockError: The base of all these; a switch that is neither True nor False.
    """

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
        erase: bool | None = None,
        noise: Tensor | Literal["fixed"] | None = None,
        composite: float | None = None,
        reach: float | None = None,
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
        options = {name: value for name, value in locals().items() if name not in ("self", "model", "__class__")}
        self.model = model
        self.settings = resolve(model, options)
        self._latest = Trace()

    @property
    def trace(self) -> Trace:
        return next((run.trace for run in reversed(self._runs(left=True))), self._latest)

    def __enter__(self) -> "KVLock":
        self._keep(*self._runs(), Run(self.settings.schedule))
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None and not self._runs():
            return  # closed by another thread or task than entered it, whose own error says why
        run = self._run()
        run.open = False
        self._keep(*(self._runs() or (run,)))
        run.close()
        if error[0] is None:
            run.settle(self.settings)

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """One evaluation; see `evaluate`."""
        run = self._run()
        before = {**vars(run), "timeline": copy.copy(run.timeline), "_called": True}
        try:
            denoised = evaluate(self.settings, run, x, sigma, extra_args)
        except BaseException:  # a checkpoint around the lock ends an evaluation early when it runs it again
            vars(run).update(before)
            raise
        if len(run.trace) == 1 and self.settings.scale_arg is None:
            warn_unguided(extra_args, run.trace.steps[0].cfg_scale)
        return denoised

    def sample(self, sampler: Any, x: Tensor, sigmas: Tensor, **arguments: Any) -> Tensor:
        """One run in one line, with the schedule known: `with lock: samplers.run(sampler, lock, x, sigmas, ...)`."""
        with self:
            return samplers.run(sampler, self, x, sigmas, **arguments)

    def plan(self, sigmas: Tensor, sampler: Any = "euler") -> Plan:
        """What the K/V cache will hold at most of a run of the source's clips, before anything runs: print it. Of each
        further clip that shares a source it holds as much again.

        Args:
            sigmas: The schedule.
            sampler: Some samplers evaluate between the levels too, and store more.

        Raises:
            RunError: This lock has no cache.
        """
        given = self.settings
        if given.kv_cache is None or given.layers is None or given.source is None or given.mask is None:
            raise RunError("this lock keeps nothing, so there is nothing to plan; pass kv_cache=kv.KVCache(...).")
        selection, _ = given.mask.selection(given.source.latents, given.layers.patch, given.transition)
        levels = (to_sigma(self.model, level) for level in samplers.evaluated_sigmas(sampler, sigmas))
        return plan(given.kv_cache, given.layers, selection, levels)

    def subset(self, index: Tensor, batch: int) -> "KVLock":
        """The same lock for the clips `index` of a batch of `batch`: source, mask and the source's arguments cut."""
        part = copy.copy(self)
        part._latest, part.settings = Trace(), self.settings.subset(index, batch)
        return part

    def on_schedule(self, sigmas: Tensor) -> None:
        """Tell the noise schedule of the run, ending in 0 or not. This library's samplers call it."""
        self._run().tell(on_clock(self.model, sigmas))
        if (tell := method_of(self.model, "on_schedule")) is not None:
            tell(sigmas)

    def _runs(self, *, left: bool = False) -> list[Run]:
        # A task begins with the runs of what it came from, which are not its own.
        return [run for run in _runs.get().get(self, ()) if (run.open or left) and run.is_here()]

    def _keep(self, *runs: Run) -> None:
        _runs.set(WeakKeyDictionary({**_runs.get(), self: runs}))
        self._latest = runs[-1].trace

    def _run(self) -> Run:
        if not (runs := self._runs()):
            raise RunError(
                "the lock was called outside its `with` block, or from another thread or task than entered it.\n"
                "  with lock:\n      x0 = samplers.dpmpp_2m(lock, x, sigmas, extra_args=...)\n"
                "  or in one line: x0 = lock.sample('dpmpp_2m', x, sigmas, extra_args=...)"
            )
        return runs[-1]

    def __repr__(self) -> str:
        layers = self.settings.layers
        count = "no layers" if layers is None else f"{len(layers.layers) or 'watched'} layers"
        return f"KVLock({type(self.model).__name__}, {self.settings.policy!r}, {self.settings.estimator!r}, {count})"
