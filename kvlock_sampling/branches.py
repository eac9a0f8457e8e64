"""The branches of one evaluation: cond, uncond and the source, and the route by which the source's K/V reach the edit.

`OwnBranches` is for a single-branch model: the lock does the guidance, and branches may be rows of one call.
`GuidedBranches` is for a model that does its own guidance: the source goes in a pass just before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .attention import CallRecord, FusionContext, fusion_ratio
from .batching import join_calls, joinable
from .guidance import composite, guide, guide_rescaled
from .route import WORTH_NARROWING, Route, choose_route
from .run import Run, Step
from .settings import LockSettings
from .types import AttentionError, Denoiser, PolicyError, RunError, Scalar

Branch = tuple[Tensor, dict[str, Any]]
T = TypeVar("T")

class Branches:
    """What both kinds share.

    Attributes:
        x: The sampler's input.
        uncond: Unconditional x0-hat; None before it was evaluated.
        source: The source's x0-hat; None if it was not evaluated.
        nfe: Model passes per clip so far.
        fused_layers: The largest number of layers that were fused in a call.
        route: How the source's K/V reach the edit.
        computed: The fraction of the tokens that the edit runs on.
    """

    def __init__(self, settings: LockSettings, run: Run, step: Step) -> None:
        self.settings, self.run, self.step, self.x = settings, run, step, step.x
        self.uncond: Tensor | None = None
        self.source: Tensor | None = None
        self.nfe, self.fused_layers, self.computed = 0, 0, 1.0
        self._context: FusionContext | None = None
        self._left_out: Tensor | None = None
        self._source_x, self._clean = step.x, step.x
        self._captured: Mapping[str, tuple[Tensor, Tensor]] | None = None
        if step.lock.high > 0 and settings.layers is not None:
            self._prepare()
        self.route = self._choose_route()

    def _prepare(self) -> None:
        """The source at this noise level, and which tokens take how much of it."""
        settings, step = self.settings, self.step
        source, mask, layers, noise = settings.source, settings.mask, settings.layers, self.run.noise
        assert source is not None
        assert mask is not None
        assert layers is not None
        assert noise is not None
        selection = left_out = None
        if self.run.cached is not None or (settings.foreground and step.lock.low == 1):
            selection, left_out = mask.selection(step.x, layers.patch, settings.transition)
        narrow = bool(
            settings.foreground and step.lock.low == 1 and selection and selection.fraction <= WORTH_NARROWING
        )
        background = mask.background(step.x, layers.patch, settings.transition)
        self._context = FusionContext(
            "inject",
            fusion_ratio(step.lock.rows(step.x.device), background.expand(len(step.x), -1)),
            grid=layers.grid(step.x.shape),
            selection=selection if narrow or self.run.cached is not None else None,
            narrow=narrow,
            text_first=bool(layers.layers) and layers.layers[0].text == "first",
        )
        self._source_x, self._clean = source.at(step.x, step.model_sigma, noise), source.matching(step.x)
        if narrow and selection is not None:
            self._left_out, self.computed = left_out, selection.fraction

    def _choose_route(self) -> Route:
        context, layers, settings = self._context, self.settings.layers, self.settings
        locked = context is not None and layers is not None
        narrow = locked and context.narrow
        return choose_route(
            locked=locked,
            narrow=narrow,
            cached=self.run.cached is not None,
            one_call=locked and self._one_call() and not layers.rows_apart and not self.run.step_caches.active,
            interleaves=narrow and layers.interleaves and self.run.hooks.plain,
            probes=settings.measures and settings.estimator.cost > 0,
        )

    def _one_call(self) -> bool:
        """Whether source and edit can be rows of one call."""
        return False

    def _source_kv(self, model: Denoiser, arguments: dict[str, Any], sigma: Tensor) -> FusionContext:
        """A context that injects the source's K/V at this noise level, however often it is asked for."""
        if sigma is not self.step.sigma_arg:
            return self._capture(model, arguments, sigma)  # a probe at a noise level that is none of the schedule's
        if self._captured is None:
            self._captured = self._kv_of_level(model, arguments, sigma)
        return replace(self._needed, source=self._captured)

    def _kv_of_level(self, model: Denoiser, arguments: dict[str, Any], sigma: Tensor) -> Any:
        if self.route is not Route.CACHED:
            return self._capture(model, arguments, sigma).source
        settings, step, selection = self.settings, self.step, self._needed.selection
        given = {name: value for name, value in arguments.items() if name != settings.scale_arg}
        expert = step.state.expert
        entry = self.run.cached.entry(settings.source.latents, self.run.noise, selection, expert, given)
        found = entry.lookup(step.sigma)
        if found is None:
            captured = self._capture(model, arguments, sigma)
            again = captured.record.repeated
            if again is not None and settings.scale_arg is None:
                raise AttentionError(
                    f"layer {again!r} acts several times in one evaluation; expected once: a K/V cache keeps one pair "
                    "of keys and values per layer.\n  Leave kv_cache= away, or lock other layers: layers=[...]."
                )
            found = entry.put(step.sigma, captured.record.latest())
        return found

    def _capture(self, model: Denoiser, arguments: dict[str, Any], sigma: Tensor) -> FusionContext:
        """The source in a pass of its own."""
        context = replace(self._needed, mode="capture", record=CallRecord())
        out = self._call(context, lambda: model(self._source_x, sigma, **arguments))
        self.nfe += 1
        if sigma is self.step.sigma_arg:
            self.source = out
        return replace(context, mode="inject", source=context.record.captured)

    @property
    def _needed(self) -> FusionContext:
        assert self._context is not None
        return self._context

    def _call(self, context: FusionContext | None, call: Callable[[], T], kind: tuple[str, ...] | None = None) -> T:
        """Make one call of the model. `kind` tells step caches one series of calls from another; None passes them by."""
        caches = self.run.step_caches
        layout: Hashable = kind
        if caches.active and context is not None and context.narrowed is not None:
            # Calls that run on other tokens cannot share a step cache's memory.
            layout = kind, tuple(context.narrowed.computed.tolist())
        with caches.passed_by() if kind is None else caches.apart(layout, kind):
            if context is None:
                return call()
            assert self.run.hooks is not None
            out = self.run.hooks.run(context, call, may_skip=caches.active)
        if context.mode != "capture":
            self.fused_layers = max(self.fused_layers, len(context.record.fired))
        return out

    def composited(self, denoised: Tensor, weight: Scalar) -> Tensor:
        """The prediction with the source, by this weight, in its background.

        Raises:
            PolicyError: A policy changed the weight while only the edited tokens were computed.
        """
        source, mask = self.settings.source, self.settings.mask
        if source is None or mask is None or (not isinstance(weight, Tensor) and weight == 0):
            return denoised
        if self._left_out is not None and (isinstance(weight, Tensor) or weight != 1):
            raise PolicyError(
                f"{self.settings.policy!r} set composite, but only the edited tokens were computed, so the background "
                "is the source's.\n  Pass foreground=False to KVLock."
            )
        return composite(denoised, source.matching(denoised), mask.latent(denoised), weight)

    def _filled(self, out: Tensor) -> Tensor:
        """A prediction with the source where nothing was computed."""
        return out if self._left_out is None else torch.where(self._left_out, self._clean, out)


class OwnBranches(Branches):
    """The branches of a model that takes `cond`; `uncond` and `cond_scale` are the lock's."""

    def __init__(self, settings: LockSettings, run: Run, step: Step) -> None:
        given, scale = step.extra_args, step.extra_args.get("cond_scale", 1.0)
        if "uncond" not in given and step.reads.range(scale) != (1.0, 1.0):
            raise RunError(
                f"cond_scale={scale} was given without uncond, so there is nothing to guide with.\n"
                '  Pass extra_args={"cond": ..., "uncond": ..., "cond_scale": ...}, or leave cond_scale away.'
            )
        self._cond_args = {k: v for k, v in given.items() if k not in ("uncond", "cond_scale")}
        self._uncond_args = {**self._cond_args, "cond": given["uncond"]} if "uncond" in given else None
        self._source_args = {**self._cond_args, **settings.source_args}
        super().__init__(settings, run, step)

    def conditional(self) -> Tensor:
        """The conditional x0-hat. The unconditional one rides along unless a scale of exactly 1 is expected."""
        if self._uncond_args is not None and self.step.reads.range(self.step.expected_cfg_scale) != (1.0, 1.0):
            branches = [(self.x, self._uncond_args), (self.x, self._cond_args)]
            self.uncond, cond = self._evaluate(branches, self.step.sigma_arg, ("uncond", "cond"))
            return cond
        return self._evaluate([(self.x, self._cond_args)], self.step.sigma_arg, ("cond",))[0]

    def guided(self, cond: Tensor, scale: Scalar) -> Tensor:
        """The x0-hat at this guidance scale, with the unconditional branch evaluated if it is missing."""
        if self._uncond_args is None:
            return cond
        if self.uncond is None:
            if self.step.reads.range(scale) == (1.0, 1.0):
                return cond
            self.uncond = self._evaluate([(self.x, self._uncond_args)], self.step.sigma_arg, ("uncond",))[0]
        if self.settings.rescale:
            return guide_rescaled(self.uncond, cond, scale, self.x)
        return guide(self.uncond, cond, scale)

    def used_scale(self, scale: Scalar) -> Scalar:
        """The guidance scale that acted."""
        return 1.0 if self._uncond_args is None else scale

    def probe(self, x: Tensor, sigma: float) -> Tensor:
        """The conditional x0-hat at other points, any multiple of the batch, under the same lock."""
        step, batch = self.step, len(self.x)
        # At this evaluation's noise level the very same tensor, so that the source's K/V serve again.
        level = step.sigma_arg if sigma == step.sigma else torch.full_like(step.sigma_arg, sigma)
        return torch.cat(self._evaluate([(rows, self._cond_args) for rows in x.split(batch)], level, None))

    def _one_call(self) -> bool:
        calls = [self._cond_args, self._source_args, *([] if self._uncond_args is None else [self._uncond_args])]
        return self.settings.batched and joinable(calls, len(self.x))

    def _evaluate(self, branches: Sequence[Branch], sigma: Tensor, kind: tuple[str, ...] | None) -> list[Tensor]:
        """Run branches of `len(x)` rows each along the route; in as few calls as their arguments allow."""
        if self.route in (Route.LOCKSTEP, Route.INTERLEAVED):
            context = replace(self._needed, mode="lockstep", record=CallRecord())
            rows = [*branches, (self._source_x, self._source_args)]
            *edit, source = self._together(rows, context, sigma, kind)
            self.source = source if sigma is self.step.sigma_arg and kind is not None else self.source
            return [self._filled(out) for out in edit]
        kept = None
        if self.route is not Route.UNLOCKED:
            kept = self._source_kv(self.settings.model, self._source_args, sigma)
        groups = [(branches, kind)]
        if not (self.settings.batched and joinable([arguments for _, arguments in branches], len(self.x))):
            groups = [([branch], kind and (kind[i],)) for i, branch in enumerate(branches)]
        found: list[Tensor] = []
        for group, name in groups:
            context = None if kept is None else replace(kept, record=CallRecord())
            found += map(self._filled, self._together(group, context, sigma, name))
        return found

    def _together(
        self, branches: Sequence[Branch], context: FusionContext | None, sigma: Tensor, kind: tuple[str, ...] | None
    ) -> list[Tensor]:
        """Branches as the rows of one call."""
        batch, model = len(self.x), self.settings.model
        arguments = join_calls([arguments for _, arguments in branches], batch)
        x, levels = branches[0][0], sigma
        if len(branches) > 1:
            x, levels = torch.cat([rows for rows, _ in branches]), sigma.expand(batch).repeat(len(branches))
        out = self._call(context, lambda: model(x, levels, **arguments), kind)
        self.nfe += len(branches)
        return list(out.split(batch))


class GuidedBranches(Branches):
    """The branches of a model that takes every argument and returns the guided x0-hat; the lock sets its scale."""

    def conditional(self) -> Tensor:
        """The model's guided x0-hat, at the last scheduled scale, or at the caller's if no policy schedules it."""
        settings, step = self.settings, self.step
        assert settings.scale_arg is not None
        self._arguments = dict(step.extra_args)
        scale = step.state.cfg_scale
        if scale is not None:
            low, high = step.reads.range(scale)
            rows = scale.view(-1, *[1] * (self.x.ndim - 1)) if isinstance(scale, Tensor) else scale
            self._arguments[settings.scale_arg] = high if low == high else rows
        return self._evaluate(self.x, step.sigma_arg, ("guided",))

    def guided(self, cond: Tensor, scale: Scalar) -> Tensor:
        """The model has done the guidance."""
        return cond

    def used_scale(self, scale: Scalar) -> Scalar:
        """The guidance scale that acted: the last scheduled one."""
        return self.step.expected_cfg_scale

    def probe(self, x: Tensor, sigma: float) -> Tensor:
        """The model's x0-hat at other points, one batch after another."""
        level = torch.full_like(self.step.sigma_arg, sigma)
        return torch.cat([self._evaluate(rows, level, None) for rows in x.split(len(self.x))])

    def _evaluate(self, x: Tensor, sigma: Tensor, kind: tuple[str, ...] | None) -> Tensor:
        context = None
        if self.route is not Route.UNLOCKED:
            context = self._source_kv(*self._source_call(), sigma)
            context = replace(context, record=CallRecord())
        out = self._call(context, lambda: self.settings.model(x, sigma, **self._arguments), kind)
        self.nfe += 1
        return self._filled(out)

    def _source_call(self) -> tuple[Denoiser, dict[str, Any]]:
        """The denoiser of the source's pass, and its arguments."""
        settings = self.settings
        given = {**self._arguments, **settings.source_args}
        if settings.branch is not None:
            return settings.branch, {k: v for k, v in given.items() if k not in ("uncond", settings.scale_arg)}
        if "cond" in given and "uncond" in given:
            given["uncond"] = given["cond"]  # whichever branch's K/V serve, they are the source's under its own prompt
        return settings.model, given
