"""The branches of one evaluation: cond, uncond and the source, and how the source's K/V reach the edit.

`OwnBranches` is for a single-branch model: the lock does the guidance, and branches may be rows of one call.
`GuidedBranches` is for a model that does its own guidance: the source goes in a pass just before.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from .attention import FusionContext
from .attention.record import KeyValue
from .batching import check_points, join_calls, per_row, split_rows
from .guidance import guide, guide_rescaled
from .route import Locked, Route, choose_route, source_for
from .run import Run, Step
from .settings import LockSettings
from .source import share_of
from .types import AttentionError, Denoiser, EstimatorError, Evaluation, RunError, Scalar
from .utils.denoiser import accepts, method_of, to_sigma

Branch = tuple[Tensor, dict[str, Any]]
Kind = tuple[str, ...] | None


class Branches:
    """What both kinds share: x, the x0-hats of uncond and source once they are evaluated, what this evaluation takes of
    the source (None if it locks nothing) and by which route, the model passes per clip and the fused layers so far.
    """

    _probed: Callable[[Sequence[Tensor], Tensor], Tensor]
    """The conditional x0-hat at points in the model's own form, a batch each."""
    _source_call: Callable[..., tuple[Denoiser, dict[str, Any]]]
    """The denoiser of a pass of the source, as it is or `erased`, as it gives keys and values, and its arguments."""
    _one_call: Callable[..., bool]
    """Whether edit and source, as it is or `erased`, can be rows of one call."""

    def __init__(self, settings: LockSettings, run: Run, step: Step) -> None:
        self.settings, self.step, self.x = settings, step, step.x
        self.uncond: Tensor | None = None
        self.source: Tensor | None = None
        self.nfe, self.fused_layers = 0, 0
        self._own_levels = to_sigma(settings.model, step.model_sigma) != step.model_sigma
        self._caches = run.tools(settings).step_caches
        self._source_kv: Mapping[str, KeyValue] | None = None
        self._noise, source = run.noise, settings.source
        # What the source predicts in the pass that gives K/V is of another clip, or under another noise.
        self._apart = settings.erase or (source is not None and source.noise is not source.of_run)
        self.locked = locked = source_for(settings, run, step)
        self._source_x: Tensor | None = None  # the source at this noise level, if the estimator needs its x0-hat
        due = settings.policy.uses_risk and step.sigma > 0 and settings.estimator.due(step.state.estimator, step.sigma)
        self._wants_uncond = due and settings.estimator.needs_uncond
        if due and settings.estimator.needs_source and source is not None and run.noise is not None:
            self._source_x = source.at(step.x, step.model_sigma, run.noise, erased=False)
        self.route = choose_route(
            locked=locked is not None,
            narrow=self.narrow,
            cached=locked is not None and locked.entry is not None,
            one_call=locked is not None and not locked.hooks.layers.rows_apart and self._one_call(erased=True),
            interleaves=locked is not None and locked.hooks.layers.interleaves and locked.hooks.plain,
            # A model that guides takes the source along in a probe, too: it may not fit into a pass of its own.
            probes=due and settings.estimator.cost > 0 and (self.narrow or settings.scale_arg is None),
        )

    def evaluation(self, cond: Tensor) -> Evaluation:
        """What an estimator sees, with a pass of the source if it needs one and nothing else made one."""
        if self.source is None and (source_x := self._source_x) is not None:
            model, arguments = self._source_call(erased=False)
            self.source = self._call(None, None, model, (source_x, arguments), self.step.sigma_arg)[0]
        mask = None if self.settings.mask is None else self.settings.mask.latent(cond)
        # A copy, because samplers clamp x0-hat in place.
        denoised = cond.detach().clone() if self.settings.policy.uses_risk else cond
        return Evaluation(self.step.sigma, self._exploding, denoised, mask, self.probe, self.uncond, self.source)

    @cached_property
    def _exploding(self) -> Tensor:
        """x in variance-exploding form."""
        return self.x if self._signal == 1 else self.x / self._signal

    @cached_property
    def _signal(self) -> float:
        """The share of a clean clip in x: 1 in variance-exploding form. At pure noise, as good as none."""
        rule = method_of(self.settings.model, "add_noise") if self._own_levels else None
        return 1.0 if rule is None else max(1e-4, share_of(self.step.model_sigma, rule)[0])

    def probe(self, x: Tensor, sigma: float) -> Tensor:
        """The conditional x0-hat at points in variance-exploding form, any multiple of the batch, under the lock."""
        check_points(x, self.x)
        level = self.step.sigma_arg  # the very same tensor, so that the source's K/V serve again
        if sigma != self.step.sigma:
            if self._own_levels:
                raise EstimatorError("this model has noise levels of its own; expected a probe at evaluation.sigma.")
            level = torch.full_like(level, sigma, dtype=level.dtype if level.is_floating_point() else torch.float32)
        return self._probed((x if self._signal == 1 else x * self._signal).split(len(self.x)), level)

    @property
    def narrow(self) -> bool:
        """Whether only the edited tokens are computed."""
        return self.locked is not None and self.locked.context.narrow

    @property
    def counts(self) -> dict[str, Any]:
        """What ran, for the trace."""
        chosen = None if self.locked is None else self.locked.context.narrowed
        computed = 1.0 if chosen is None else chosen.fraction
        return {"nfe": self.nfe, "fused_layers": self.fused_layers, "route": self.route.value, "computed": computed}

    def _context(self, sigma: Tensor) -> FusionContext | None:
        """What a call at this noise level fuses: K/V of the source as rows of the call, or from before; or nothing."""
        if (locked := self.locked) is None:
            return None
        if sigma is not self.step.sigma_arg:  # a probe at a noise level that is none of the schedule's
            return locked.context.fresh("inject", self._captured(locked, sigma))
        if self.route in (Route.LOCKSTEP, Route.INTERLEAVED):
            return locked.context.fresh("lockstep")
        if self._source_kv is None:
            self._source_kv = self._kv_of_level(locked)
        return locked.context.fresh("inject", self._source_kv)

    def _kv_of_level(self, locked: Locked) -> Mapping[str, KeyValue]:
        sigma, scale_arg = self.step.sigma_arg, self.settings.scale_arg
        if locked.entry is None:
            return self._captured(locked, sigma)
        _, arguments = self._source_call(erased=True)
        entry = locked.entry({name: value for name, value in arguments.items() if name != scale_arg})
        if (found := entry.lookup(self.step.sigma)) is not None:
            return found
        kept = self._captured(locked, sigma)
        if scale_arg is None and (again := [name.partition("#")[0] for name in kept if "#" in name]):
            raise AttentionError(
                f"layer {again[0]!r} acts several times in one evaluation; expected once: a KV cache keeps one "
                "pair of keys and values per layer.\n  Leave kv_cache= away, or lock other layers: layers=[...]."
            )
        return entry.put(self.step.sigma, {name.partition("#")[0]: pair for name, pair in kept.items()})

    def _captured(self, locked: Locked, sigma: Tensor) -> Mapping[str, KeyValue]:
        """The source's K/V from a pass of its own, by layer."""
        context, (model, arguments) = locked.context.fresh("capture"), self._source_call(erased=True)
        x, here = locked.x, sigma is self.step.sigma_arg
        if not here and self.settings.source is not None and self._noise is not None:
            x = self.settings.source.at(self.x, float(sigma.max()), self._noise)
        out = self._call(context, None, model, (x, arguments), sigma)[0]
        if here and not self._apart:
            self.source = out
        return context.record.captured

    def _call(
        self, context: FusionContext | None, kind: Kind, model: Denoiser, branch: Branch, sigma: Tensor, n: int = 1
    ) -> list[Tensor]:
        """Make and count one call for `n` branches as its rows. Step caches keep kinds apart; None passes by them."""
        x, arguments = branch
        layout: Hashable = kind
        if self._caches.active and context is not None and context.narrowed is not None:
            layout = kind, tuple(context.narrowed.computed.tolist())  # other tokens need another memory
        call = partial(model, x, sigma, **arguments)
        with self._caches.apart(layout, kind):
            if context is None or self.locked is None:
                out = call()
            else:
                context = replace(context, rows=None if self.settings.scale_arg else len(x))
                out = self.locked.hooks.run(context, call, may_skip=self._caches.active)
        if context is not None and context.mode != "capture":
            self.fused_layers = max(self.fused_layers, len(context.record.fired))
        self.nfe += n + ("uncond" in arguments) + ("beside" in arguments)
        return split_rows(out, x[: len(x) // n], n)

    def _filled(self, out: Tensor) -> Tensor:
        """A prediction with the source where nothing was computed."""
        if self.locked is None or self.locked.left_out is None:
            return out
        return torch.where(self.locked.left_out, self.locked.clean, out)


class OwnBranches(Branches):
    """The branches of a model that takes `cond`; `uncond` and `cond_scale` are the lock's."""

    def __init__(self, settings: LockSettings, run: Run, step: Step) -> None:
        scale = step.extra_args.get("cond_scale", 1.0)
        guides = step.reads.range(scale) != (1.0, 1.0)  # scripts that do not guide pass uncond=None
        given = {k: v for k, v in step.extra_args.items() if guides or k != "uncond" or v is not None}
        if "uncond" not in given and guides:
            raise RunError(
                f"cond_scale={scale} was given without uncond, so there is nothing to guide with.\n"
                '  Pass extra_args={"cond": ..., "uncond": ..., "cond_scale": ...}, or leave cond_scale away.'
            )
        self._cond_args = {k: v for k, v in given.items() if k not in ("uncond", "cond_scale")}
        self._uncond_args = {**self._cond_args, "cond": given["uncond"]} if "uncond" in given else None
        self._source_args = {**self._cond_args, **settings.source_args}
        # No prompt describes a source without its object, so it is evaluated without one.
        self._kv_args = self._source_args | ({"cond": given["uncond"]} if settings.erase and "uncond" in given else {})
        super().__init__(settings, run, step)

    def conditional(self) -> Tensor:
        """The conditional x0-hat. The unconditional one rides along unless a scale of exactly 1 is expected."""
        needed = self._wants_uncond or self.step.reads.range(self.step.expected_cfg_scale) != (1.0, 1.0)
        if self._uncond_args is None or not needed:
            return self._evaluate([(self.x, self._cond_args)], self.step.sigma_arg, ("cond",))[0]
        branches = [(self.x, self._uncond_args), (self.x, self._cond_args)]
        self.uncond, cond = self._evaluate(branches, self.step.sigma_arg, ("uncond", "cond"))
        return cond

    def guided(self, cond: Tensor, scale: Scalar) -> tuple[Tensor, Scalar]:
        """The x0-hat at this guidance scale, with uncond evaluated if it is missing, and the scale that acted."""
        if self._uncond_args is None:
            return cond, 1.0
        if self.uncond is None:
            if self.step.reads.range(scale) == (1.0, 1.0):
                return cond, scale
            self.uncond = self._evaluate([(self.x, self._uncond_args)], self.step.sigma_arg, ("uncond",))[0]
        if self.settings.rescale:
            return guide_rescaled(self.uncond, cond, scale, self._exploding), scale
        return guide(self.uncond, cond, scale), scale

    def _probed(self, parts: Sequence[Tensor], level: Tensor) -> Tensor:
        return torch.cat(self._evaluate([(rows, self._cond_args) for rows in parts], level, None))

    def _source_call(self, *, erased: bool) -> tuple[Denoiser, dict[str, Any]]:
        return self.settings.model, self._kv_args if erased else self._source_args

    def _one_call(self, *, erased: bool) -> bool:
        _, source = self._source_call(erased=erased)
        calls = [self._cond_args, source, *([] if self._uncond_args is None else [self._uncond_args])]
        return self.settings.batched and not self._caches.active and join_calls(calls, len(self.x)) is not None

    def _evaluate(self, branches: Sequence[Branch], sigma: Tensor, kind: Kind) -> list[Tensor]:
        """Run branches of `len(x)` rows each along the route, in as few calls as their arguments allow."""
        locked, source_x, context = self.locked, self._source_x, self._context(sigma)
        if locked is not None and context is not None and context.mode == "lockstep":
            return self._beside_source(branches, (locked.x, self._kv_args), context, sigma, kind)
        if source_x is not None and locked is None and self.source is None and kind and self._one_call(erased=False):
            return self._beside_source(branches, (source_x, self._source_args), None, sigma, kind)
        groups = [(branches, kind)]
        if not self.settings.batched or join_calls([arguments for _, arguments in branches], len(self.x)) is None:
            groups = [([branch], kind and (kind[i],)) for i, branch in enumerate(branches)]
        return [self._filled(out) for group, name in groups for out in self._together(group, context, sigma, name)]

    def _beside_source(
        self, branches: Sequence[Branch], beside: Branch, context: FusionContext | None, sigma: Tensor, kind: Kind
    ) -> list[Tensor]:
        """Branches, and the source as further rows of their call."""
        *edit, source = self._together([*branches, beside], context, sigma, kind)
        # Not of a probe, or of a pass that may have ended early.
        if kind is not None and not (context and (self._apart or (self.narrow and context.left is not None))):
            self.source = source
        return [self._filled(out) for out in edit]

    def _together(
        self, branches: Sequence[Branch], context: FusionContext | None, sigma: Tensor, kind: Kind
    ) -> list[Tensor]:
        """Branches as the rows of one call."""
        arguments = join_calls([arguments for _, arguments in branches], len(self.x))
        assert arguments is not None
        x = branches[0][0]
        if len(branches) > 1:
            x, sigma = torch.cat([rows for rows, _ in branches]), sigma.expand(len(x)).repeat(len(branches))
        return self._call(context, kind, self.settings.model, (x, arguments), sigma, len(branches))


class GuidedBranches(Branches):
    """The branches of a model that takes every argument and returns the guided x0-hat; the lock sets its scale.

    The model of a host may tell more, as `kvlock_host`: `predictions`, the (cond, uncond, source) of its last result,
    and `joins(x, sigma, arguments)`, whether each call of its network can take the source along, given as `beside`.
    """

    def __init__(self, settings: LockSettings, run: Run, step: Step) -> None:
        self._arguments, self._host = dict(step.extra_args), getattr(settings.model, "kvlock_host", None)
        if (scale := step.state.cfg_scale) is not None and settings.scale_arg is not None:
            (low, high), rows = step.reads.range(scale), torch.as_tensor(scale)
            self._arguments[settings.scale_arg] = high if low == high else per_row(rows.to(step.x), step.x)
        super().__init__(settings, run, step)

    def conditional(self) -> Tensor:
        """The conditional x0-hat if the model tells it, else the guided one, at the last scheduled scale."""
        self._guided, cond = self._evaluate(self.x, self.step.sigma_arg, ("guided",))
        return cond

    def guided(self, cond: Tensor, scale: Scalar) -> tuple[Tensor, Scalar]:
        """The model has done the guidance, at the last scheduled scale."""
        return self._guided, self.step.expected_cfg_scale

    def _probed(self, parts: Sequence[Tensor], level: Tensor) -> Tensor:
        return torch.cat([self._evaluate(rows, level, None)[1] for rows in parts])

    def _one_call(self, *, erased: bool) -> bool:
        host, (_, arguments) = self._host, self._source_call(erased=erased)
        return host is not None and host.joins(self.x, self.step.sigma_arg, arguments)

    def _evaluate(self, x: Tensor, sigma: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
        """The guided x0-hat, and the conditional one if the model tells it."""
        locked, context, arguments = self.locked, self._context(sigma), self._arguments
        if locked is not None and context is not None and context.mode == "lockstep":
            arguments = {**arguments, "beside": (locked.x, self._source_call(erased=True)[1])}
        guided = self._filled(self._call(context, kind, self.settings.model, (x, arguments), sigma)[0])
        if self._host is None:
            return guided, guided
        cond, uncond, source = self._host.predictions
        if kind is not None:
            self.uncond, self.source = uncond, self.source if self._apart or source is None else source
        return guided, guided if cond is None else self._filled(cond)

    def _source_call(self, *, erased: bool) -> tuple[Denoiser, dict[str, Any]]:
        settings, given = self.settings, {**self._arguments, **self.settings.source_args}
        if erased and settings.erase and "uncond" in self._arguments:  # no prompt describes a source without its object
            given["cond"] = self._arguments["uncond"]
        if settings.branch is not None:
            taken = {k: v for k, v in given.items() if k in settings.source_args or accepts(settings.branch, k)}
            return settings.branch, {k: v for k, v in taken.items() if k not in ("uncond", settings.scale_arg)}
        if "cond" in given and "uncond" in given:
            given["uncond"] = given["cond"]  # whichever branch's K/V serve, they are the source's under its own prompt
        return settings.model, given
