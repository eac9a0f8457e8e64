"""One evaluation of the wrapped model: its branches, and the source beside them at the same noise level.

`OwnedCall` is for a single-branch model whose guidance is the lock's: the source rides as extra rows of the same call.
`GuidedCall` is for a model that does its own guidance: the source goes in a pass just before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .attention import Frame, Hooks
from .attention.compat.step_caches import StepCaches
from .attention.foreground import ForegroundFrame, SelectedFrame
from .batching import NotBatchable, join_calls
from .control import HostReads
from .guidance import guide, guide_rescaled
from .locking import Locking
from .types import AttentionError, Denoiser, RunError, Scalar

Branch = tuple[Tensor, dict[str, Any]]
T = TypeVar("T")


@dataclass
class Call:
    """What both kinds share. `locking` is what is taken of the source, None where nothing is locked now; `probes` is
    whether the model is evaluated at further points.
    """

    model: Denoiser
    x: Tensor
    sigma: Tensor
    level: float
    hooks: Hooks | None
    locking: Locking | None
    source_args: Mapping[str, Any]
    batched: bool = True
    probes: bool = False
    rescale: bool = False
    branch: Denoiser | None = None
    scale_arg: str | None = None
    reads: HostReads = field(default_factory=HostReads)
    caches: StepCaches = field(default_factory=lambda: StepCaches(()))
    uncond: Tensor | None = field(default=None, init=False)
    passes: int = field(default=0, init=False)
    _kept: Frame | None = field(default=None, init=False)
    fused: int = field(default=0, init=False)
    _probing: bool = field(default=False, init=False)

    @property
    def share(self) -> float:
        """Share of the tokens that the edit runs on."""
        return 1.0 if self.locking is None else self.locking.share

    def _evaluate(
        self, model: Denoiser, branches: Sequence[Branch], source: Branch | None, sigma: Tensor
    ) -> list[Tensor]:
        """Run branches of `len(x)` rows each, with the source beside them if it is given; as one call if possible."""
        if source is None:
            return self._edit(model, branches, None, sigma)
        if self.batched and not self._source_runs_alone():
            try:
                return self._together(model, [*branches, source], self._locking.frame("lockstep"), sigma)[
                    : len(branches)
                ]
            except NotBatchable:
                pass  # say, the source's own prompt is of another length
        return self._edit(model, branches, self._source_keys(model, source, sigma), sigma)

    def _source_runs_alone(self) -> bool:
        """Whether the source needs a pass of its own: its K/V serve further calls, or it runs on other tokens."""
        locking = self._locking
        if locking.layers.rows_apart or self.caches.active or locking.shelf is not None:
            return True
        if locking.left_out is None:
            return locking.selection is not None
        return self.probes or self.hooks is None or not self.hooks.takes_both()

    def _source_keys(self, model: Denoiser, source: Branch, sigma: Tensor) -> Frame:
        """The source's K/V at this noise level, once however often they are asked for."""

        def run() -> None:
            model(source[0], sigma, **source[1])

        if sigma is not self.sigma:
            return self._captured(run)  # a probe at another noise level; not a level of the schedule
        if self._kept is None:
            self._kept = self._from_shelf(run, source[1])
        return self._kept

    def _captured(self, run: Callable[[], object]) -> Frame:
        """The source's K/V from a pass of its own."""
        frame = self._locking.frame("capture")
        self._run(frame, run)
        self.passes += 1
        return frame

    def _from_shelf(self, run: Callable[[], object], arguments: Mapping[str, Any]) -> Frame:
        """The source's K/V from the shelf, which is filled where it has none for this noise level."""
        if self._locking.shelf is None:
            return self._captured(run)
        shelf = self._locking.shelf({name: value for name, value in arguments.items() if name != self.scale_arg})
        level = shelf.lookup(self.level)
        if level is None:
            frame = self._captured(run)
            assert isinstance(frame, SelectedFrame)
            self._check_once(frame)
            frame.keys = shelf.put(self.level, frame.latest())
            frame.store = {}
            return frame
        frame = self._locking.frame("inject")
        assert isinstance(frame, SelectedFrame)
        frame.keys = level
        return frame

    def _check_once(self, frame: Frame) -> None:
        """Raises AttentionError where a KV cache, which keeps one pair of K/V per layer, cannot serve."""
        again = [layer for layer, times in frame.times.items() if times > 1]
        if again and isinstance(self, OwnedCall):
            raise AttentionError(
                f"layer {again[0]!r} acts {frame.times[again[0]]} times in one evaluation; expected once: a KV cache keeps "
                "one pair of keys and values for each.\n  Leave kv_cache= away, or lock other layers: layers=[...]."
            )

    def _edit(self, model: Denoiser, branches: Sequence[Branch], kept: Frame | None, sigma: Tensor) -> list[Tensor]:
        """The branches alone, with the source's K/V of `kept` fused in; one after another where they cannot share."""
        groups = [branches] if self.batched else [[branch] for branch in branches]
        try:
            return [out for group in groups for out in self._together(model, group, self._inject(kept), sigma)]
        except NotBatchable:
            return [self._together(model, [branch], self._inject(kept), sigma)[0] for branch in branches]

    def _together(
        self, model: Denoiser, branches: Sequence[Branch], frame: Frame | None, sigma: Tensor
    ) -> list[Tensor]:
        """Branches as the rows of one call.

        Raises:
            NotBatchable: their arguments cannot share one.
        """
        batch = len(self.x)
        arguments = join_calls([a for _, a in branches], batch)
        if len(branches) == 1:
            latents, levels = branches[0][0], sigma
        else:
            latents, levels = torch.cat([rows for rows, _ in branches]), sigma.expand(batch).repeat(len(branches))
        out = self._run(frame, lambda: model(latents, levels, **arguments), self._kind(branches))
        self.passes += len(branches)
        return [self._filled(part) for part in out.split(batch)]

    def _filled(self, out: Tensor) -> Tensor:
        return out if self.locking is None else self.locking.filled(out)

    @property
    def _locking(self) -> Locking:
        assert self.locking is not None
        return self.locking

    def _inject(self, kept: Frame | None) -> Frame | None:
        return None if kept is None else self._locking.injecting(kept)

    def _kind(self, branches: Sequence[Branch]) -> tuple[str, ...] | None:
        """What a call of these branches is to a step cache: one in a series of its kind, or None."""
        return None

    def _run(self, frame: Frame | None, call: Callable[[], T], kind: tuple[str, ...] | None = None) -> T:
        """Make a call of the model; with a frame the layers act on it, and those that did are counted."""
        with self.caches.passed_by() if kind is None else self.caches.apart(self._layout(frame, kind), kind):
            if frame is None:
                return call()
            assert self.hooks is not None
            out = self.hooks.acting(frame, call)
        if frame.mode != "capture":
            self.fused = max(self.fused, len(frame.fired))
            if not self.caches.active:
                self._check_fired(frame)
        return out

    def _check_fired(self, frame: Frame) -> None:
        """Every layer of the network that ran must have acted, unless a step cache skipped it.

        Raises:
            AttentionError: one did not, and the edit ran on a part of the tokens: that layer saw no others.
        """
        layers = self._locking.layers
        expected = len(layers.layers) // max(1, len(layers.networks))
        if len(frame.fired) >= expected:
            return
        silent = [layer.name for layer in layers.layers if layer.name not in frame.fired][:3]
        text = (
            f"{len(frame.fired)} of {expected} layers saw their attention; not {', '.join(silent)}. Is it computed by a "
            "kernel of the model's own, or was the layer skipped?"
        )
        if isinstance(frame, ForegroundFrame):
            raise AttentionError(
                f"{text} With only the edited tokens computed such a layer misses the rest.\n"
                "  Pass foreground=False to KVLock, or lock only layers that can be seen: layers=[...]."
            )
        warnings.warn(f"{text} The others are not locked.", stacklevel=2)

    def _layout(self, frame: Frame | None, kind: tuple[str, ...]) -> Hashable:
        """Calls that run on other tokens cannot share a step cache's memory."""
        if not self.caches.active or not isinstance(frame, ForegroundFrame):
            return kind
        return kind, tuple(frame.chosen.computed.tolist())


class OwnedCall(Call):
    """The model takes `cond`; `uncond` and `cond_scale` are the lock's business."""

    def conditional(self, extra_args: Mapping[str, Any], expected: Scalar, scheduled: bool) -> Tensor:
        """The conditional x0-hat. The unconditional one rides along unless a scale of exactly 1 is expected."""
        if "uncond" not in extra_args and self.reads.extremes(extra_args.get("cond_scale", 1.0)) != (1.0, 1.0):
            raise RunError(
                f"cond_scale={extra_args['cond_scale']} was given without uncond, so there is nothing to guide with.\n"
                '  Pass extra_args={"cond": ..., "uncond": ..., "cond_scale": ...}, or leave cond_scale away.'
            )
        shared = {k: v for k, v in extra_args.items() if k not in ("uncond", "cond_scale")}
        self.cond_args = shared
        self.uncond_args = {**shared, "cond": extra_args["uncond"]} if "uncond" in extra_args else None
        if self.uncond_args is not None and self.reads.extremes(expected) != (1.0, 1.0):
            self.uncond, cond = self._locked([(self.x, self.uncond_args), (self.x, self.cond_args)], self.sigma)
            return cond
        return self._locked([(self.x, self.cond_args)], self.sigma)[0]

    def guided(self, cond: Tensor, scale: Scalar) -> Tensor:
        """Guidance at the scale the policy decided on, evaluating the unconditional branch if it is missing."""
        if self.uncond_args is None:
            return cond
        if self.uncond is None:
            if self.reads.extremes(scale) == (1.0, 1.0):
                return cond
            self.uncond = self._locked([(self.x, self.uncond_args)], self.sigma)[0]
        if self.rescale:
            return guide_rescaled(self.uncond, cond, scale, self.x)
        return guide(self.uncond, cond, scale)

    def probe(self, x: Tensor, sigma: float) -> Tensor:
        """The conditional x0-hat at other points, any multiple of the batch, under the same lock."""
        chunks = [(rows, self.cond_args) for rows in x.split(len(self.x))]
        # At this evaluation's own noise level the very same tensor, so that the source's K/V serve again.
        level = self.sigma if sigma == self.level else torch.full_like(self.sigma, sigma)
        self._probing = True
        try:
            return torch.cat(self._locked(chunks, level))
        finally:
            self._probing = False

    def _kind(self, branches: Sequence[Branch]) -> tuple[str, ...] | None:
        if self._probing:
            return None
        return tuple("uncond" if arguments is self.uncond_args else "cond" for _, arguments in branches)

    def _locked(self, branches: Sequence[Branch], sigma: Tensor) -> list[Tensor]:
        source = None if self.locking is None else (self.locking.z, {**self.cond_args, **self.source_args})
        return self._evaluate(self.model, branches, source, sigma)


class GuidedCall(Call):
    """The model takes everything and returns the guided x0-hat; the lock drives its scale argument."""

    def conditional(self, extra_args: Mapping[str, Any], expected: Scalar, scheduled: bool) -> Tensor:
        """The model's own, guided, x0-hat at the scale of the last decision; untouched where no policy scheduled it."""
        assert self.scale_arg is not None
        self.arguments = dict(extra_args)
        if scheduled:
            low, high = self.reads.extremes(expected)
            rows = expected.view(-1, *[1] * (self.x.ndim - 1)) if isinstance(expected, Tensor) else expected
            self.arguments[self.scale_arg] = high if low == high else rows
        return self._locked(self.x, self.sigma, self.arguments)

    def guided(self, cond: Tensor, scale: Scalar) -> Tensor:
        """Already done by the model."""
        return cond

    def probe(self, x: Tensor, sigma: float) -> Tensor:
        """The model's x0-hat at other points, one batch after another."""
        level = torch.full_like(self.sigma, sigma)
        self._probing = True
        try:
            return torch.cat([self._locked(rows, level, self.arguments) for rows in x.split(len(self.x))])
        finally:
            self._probing = False

    def source_call(self, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Denoiser]:
        """What the source's own pass is called with, and of which denoiser."""
        given = {**arguments, **self.source_args}
        if self.branch is not None:
            return {k: v for k, v in given.items() if k not in ("uncond", self.scale_arg)}, self.branch
        if "cond" in given and "uncond" in given:
            given["uncond"] = given["cond"]  # whatever chunk is kept, it is the source under its own prompt
        return given, self.model

    def _locked(self, x: Tensor, sigma: Tensor, arguments: dict[str, Any]) -> Tensor:
        kept = None
        if self.locking is not None:
            given, alone = self.source_call(arguments)
            kept = self._source_keys(alone, (self.locking.z, given), sigma)
        kind = None if self._probing else ("guided",)
        out = self._run(self._inject(kept), lambda: self.model(x, sigma, **arguments), kind)
        self.passes += 1
        return self._filled(out)
