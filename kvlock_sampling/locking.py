"""What one evaluation takes of the source: at which noise level, for which tokens, how much, and from where."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import AttentionLayers, Frame, fusion_ratio
from .attention.context import Mode
from .attention.foreground import ForegroundFrame, SelectedFrame, Selection
from .control import LockRatio
from .kv_cache import CacheEntry, CacheSession
from .masks.fitted import FittedMask
from .source import Source
from .variance import Estimator

WORTH_NARROWING = 0.9
"""Where more than this share of the tokens must be computed, gathering them costs what it saves."""


@dataclass(frozen=True)
class Locking:
    """`ratio` is the fusion ratio per token (batch, tokens) and `grid` the tokens' (time, height, width); `z` is the
    source at this noise level, `clean` the source itself.

    With a `selection` only the K/V it needs are kept of the source, on a `shelf` if there is one. With `left_out`, the
    latents of the tokens that are not computed, the edit runs on the others alone.
    """

    layers: AttentionLayers
    ratio: Tensor
    grid: tuple[int, int, int]
    z: Tensor
    clean: Tensor
    selection: Selection | None = None
    left_out: Tensor | None = None
    shelf: Callable[[Mapping[str, Any]], CacheEntry] | None = None

    @property
    def share(self) -> float:
        """Share of the tokens that the edit runs on."""
        return 1.0 if self.selection is None or self.left_out is None else self.selection.share

    def frame(self, mode: Mode) -> Frame:
        """What the layers are to do in one call of the model."""
        if self.selection is None:
            return Frame(mode, self.ratio, grid=self.grid)
        if self.left_out is None:
            return SelectedFrame(mode, self.ratio, grid=self.grid, selection=self.selection)
        text_first = self.layers.layers[0].text == "first"
        return ForegroundFrame(mode, self.ratio, grid=self.grid, selection=self.selection, text_first=text_first)

    def injecting(self, kept: Frame) -> Frame:
        """A frame that fuses in what another has kept."""
        frame = self.frame("inject")
        frame.store = kept.store
        if isinstance(frame, SelectedFrame) and isinstance(kept, SelectedFrame):
            frame.keys = kept.keys
        return frame

    def filled(self, prediction: Tensor) -> Tensor:
        """A prediction, with the source where nothing was computed."""
        return prediction if self.left_out is None else torch.where(self.left_out, self.clean, prediction)


@dataclass(frozen=True)
class Locker:
    """The settings from which each evaluation's `Locking` follows. narrows: tokens may be left out at full lock."""

    source: Source
    region: FittedMask
    layers: AttentionLayers
    transition: tuple[float, float] | None = None
    narrows: bool = False

    def at(
        self, x: Tensor, own: float, lock: LockRatio, noise: Tensor, keeper: CacheSession | None, expert: Any
    ) -> Locking:
        """What this evaluation takes of the source, at the model's own noise level `own`, under `noise`."""
        patch = self.layers.patch
        background = self.region.background(x, patch, self.transition)
        selection = left_out = shelf = None
        if lock.low == 1 and self.narrows:
            selection, left_out = self.region.selection(x, patch, self.transition)
            if selection.share > WORTH_NARROWING:
                selection = left_out = None
        if keeper is not None:
            selection, _ = self.region.selection(x, patch, self.transition)
            shelf = functools.partial(keeper.entry, self.source.latents, noise, selection, expert)
        return Locking(
            layers=self.layers,
            ratio=fusion_ratio(lock.rows(x.device), background.expand(len(x), -1)),
            grid=self.layers.grid(x.shape),
            z=self.source.at(x, own, noise),
            clean=self.source.matching(x),
            selection=selection,
            left_out=left_out,
            shelf=shelf,
        )


def why_not_narrow(
    layers: AttentionLayers, estimator: Estimator | None, *, composite: bool, rescale: bool
) -> str | None:
    """Why tokens at full lock must be computed all the same; None where they need not. estimator: if one measures."""
    if not composite:
        return "it needs composite=True"
    if estimator is not None and estimator.reads_background:
        return f"{estimator!r} measures the background too"
    if rescale:
        return "rescaled guidance measures the whole prediction"
    if not layers.narrows:
        return f"architecture {layers.architecture!r} declares no token flow, or not every layer is locked"
    return None


def can_narrow(requested: bool | None, why: str | None) -> bool:
    """Whether tokens at full lock are left out. why: the reason if they cannot be.

    Warns where it was asked for and cannot be.
    """
    if requested and why:
        warnings.warn(f"foreground=True: every token is computed all the same; {why}.", stacklevel=4)
    return requested is not False and why is None
