"""One evaluation of the wrapped model: its branches, and the source beside them at the same noise level.

`OwnedCall` is for a single-branch model whose guidance is the lock's: the source rides as extra rows of the same call.
`GuidedCall` is for a model that does its own guidance: the source goes in a pass just before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .attention import Frame, Hooks
from .control import extremes
from .guidance import guide, guide_rescaled
from .rows import NotBatchable, join_calls
from .types import Denoiser, RunError, Scalar

Branch = tuple[Tensor, dict[str, Any]]


@dataclass
class Call:
    """What both kinds share. `ratio` is the fusion ratio per token, None where nothing is locked now."""

    model: Denoiser
    x: Tensor
    sigma: Tensor
    hooks: Hooks | None
    ratio: Tensor | None
    z: Tensor | None
    source_args: Mapping[str, Any]
    batched: bool = True
    rescale: bool = False
    branch: Denoiser | None = None
    scale_arg: str | None = None
    uncond: Tensor | None = field(default=None, init=False)
    passes: int = field(default=0, init=False)
    fused: int = field(default=0, init=False)

    def _evaluate(
        self, model: Denoiser, branches: Sequence[Branch], source: Branch | None, sigma: Tensor
    ) -> list[Tensor]:
        """Run branches of `len(x)` rows each, with the source beside them if it is given; as one call if possible."""
        batch = len(self.x)
        if self.batched or len(branches) == 1:
            rows = [*branches] if source is None else [*branches, source]
            if source is None or self.batched:
                try:
                    arguments = join_calls([a for _, a in rows], batch)
                except NotBatchable:
                    pass
                else:
                    latents = rows[0][0] if len(rows) == 1 else torch.cat([r for r, _ in rows])
                    levels = sigma if len(rows) == 1 else sigma.expand(batch).repeat(len(rows))
                    with ExitStack() as stack:
                        if source is not None:
                            self._frame(stack, Frame("lockstep", self._ratio))
                        out = model(latents, levels, **arguments)
                    self.passes += len(rows)
                    return list(out.split(batch))[: len(branches)]
        return self._one_by_one(model, branches, source, sigma)

    def _one_by_one(
        self, model: Denoiser, branches: Sequence[Branch], source: Branch | None, sigma: Tensor
    ) -> list[Tensor]:
        """The same, branch after branch; the source's K/V are kept until the last one is done."""
        frame = None
        if source is not None:
            frame = Frame("capture", self._ratio)
            with ExitStack() as stack:
                self._frame(stack, frame)
                model(source[0], sigma, **source[1])
            self.passes += 1
        results = []
        for latents, arguments in branches:
            with ExitStack() as stack:
                if frame is not None:
                    self._frame(stack, Frame("inject", frame.ratio, store=frame.store))
                results.append(model(latents, sigma, **arguments))
            self.passes += 1
        return results

    @property
    def _ratio(self) -> Tensor:
        assert self.ratio is not None
        return self.ratio

    def _frame(self, stack: ExitStack, frame: Frame) -> None:
        assert self.hooks is not None
        stack.enter_context(self.hooks.frame(frame))
        stack.callback(lambda: setattr(self, "fused", max(self.fused, len(frame.fired))))


class OwnedCall(Call):
    """The model takes `cond`; `uncond` and `cond_scale` are the lock's business."""

    def conditional(self, extra_args: Mapping[str, Any], expected: Scalar, scheduled: bool) -> Tensor:
        """The conditional x0-hat. The unconditional one rides along unless a scale of exactly 1 is expected."""
        if "uncond" not in extra_args and extremes(extra_args.get("cond_scale", 1.0)) != (1.0, 1.0):
            raise RunError(
                f"cond_scale={extra_args['cond_scale']} was given without uncond, so there is nothing to guide with.\n"
                '  Pass extra_args={"cond": ..., "uncond": ..., "cond_scale": ...}, or leave cond_scale away.'
            )
        shared = {k: v for k, v in extra_args.items() if k not in ("uncond", "cond_scale")}
        self.cond_args = shared
        self.uncond_args = {**shared, "cond": extra_args["uncond"]} if "uncond" in extra_args else None
        if self.uncond_args is not None and extremes(expected) != (1.0, 1.0):
            self.uncond, cond = self._locked([(self.x, self.uncond_args), (self.x, self.cond_args)], self.sigma)
            return cond
        return self._locked([(self.x, self.cond_args)], self.sigma)[0]

    def guided(self, cond: Tensor, scale: Scalar) -> Tensor:
        """Guidance at the scale the policy decided on, evaluating the unconditional branch if it is missing."""
        if self.uncond_args is None:
            return cond
        if self.uncond is None:
            if extremes(scale) == (1.0, 1.0):
                return cond
            self.uncond = self._locked([(self.x, self.uncond_args)], self.sigma)[0]
        if self.rescale:
            return guide_rescaled(self.uncond, cond, scale, self.x)
        return guide(self.uncond, cond, scale)

    def probe(self, x: Tensor, sigma: float) -> Tensor:
        """The conditional x0-hat at other points, any multiple of the batch, under the same lock."""
        chunks = [(rows, self.cond_args) for rows in x.split(len(self.x))]
        return torch.cat(self._locked(chunks, torch.full_like(self.sigma, sigma)))

    def _locked(self, branches: Sequence[Branch], sigma: Tensor) -> list[Tensor]:
        source = None if self.z is None else (self.z, {**self.cond_args, **self.source_args})
        return self._evaluate(self.model, branches, source, sigma)


class GuidedCall(Call):
    """The model takes everything and returns the guided x0-hat; the lock drives its scale argument."""

    def conditional(self, extra_args: Mapping[str, Any], expected: Scalar, scheduled: bool) -> Tensor:
        """The model's own, guided, x0-hat at the scale of the last decision; untouched where no policy scheduled it."""
        assert self.scale_arg is not None
        self.arguments = dict(extra_args)
        if scheduled:
            low, high = extremes(expected)
            rows = expected.view(-1, *[1] * (self.x.ndim - 1)) if isinstance(expected, Tensor) else expected
            self.arguments[self.scale_arg] = high if low == high else rows
        return self._locked(self.x, self.sigma, self.arguments)

    def guided(self, cond: Tensor, scale: Scalar) -> Tensor:
        """Already done by the model."""
        return cond

    def probe(self, x: Tensor, sigma: float) -> Tensor:
        """The model's x0-hat at other points, one batch after another."""
        level = torch.full_like(self.sigma, sigma)
        return torch.cat([self._locked(rows, level, self.arguments) for rows in x.split(len(self.x))])

    def _locked(self, x: Tensor, sigma: Tensor, arguments: dict[str, Any]) -> Tensor:
        if self.z is None:
            self.passes += 1
            return self.model(x, sigma, **arguments)
        given = {**arguments, **self.source_args}
        frame = Frame("capture", self._ratio)
        with ExitStack() as stack:
            self._frame(stack, frame)
            if self.branch is not None:
                drop = ("uncond", self.scale_arg)
                self.branch(self.z, sigma, **{k: v for k, v in given.items() if k not in drop})
            else:
                if "cond" in given and "uncond" in given:
                    given["uncond"] = given["cond"]  # whatever chunk is kept, it is the source under its own prompt
                self.model(self.z, sigma, **given)
        with ExitStack() as stack:
            self._frame(stack, Frame("inject", frame.ratio, store=frame.store))
            out = self.model(x, sigma, **arguments)
        self.passes += 2
        return out
