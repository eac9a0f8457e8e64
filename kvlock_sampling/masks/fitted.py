"""A mask at every resolution that a run needs: latents for compositing and measuring, tokens for locking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..batching import take
from ..types import MaskError
from . import as_mask, as_tensor, check_mask, grow, latent_mask, token_mask
from .tokens import Grid, Selection, token_grid

T = TypeVar("T")


def as_transition(transition: Any) -> tuple[float, float] | None:
    """Check a transition band: (width in tokens > 0, fraction of the lock in [0, 1]), or None.

    Raises:
        MaskError: Anything else.
    """
    if transition is None:
        return None
    pair = tuple(transition) if isinstance(transition, list | tuple) else ()
    if len(pair) != 2 or not all(isinstance(n, Real) for n in pair) or not (pair[0] > 0 and 0 <= pair[1] <= 1):
        raise MaskError(
            f"transition={transition!r}; expected (width in tokens > 0, fraction of the lock in [0, 1]), e.g. (1, 0.5)."
        )
    return float(pair[0]), float(pair[1])


class FittedMask:
    """A mask, 1 = edit, given in pixels or in latents, and fitted to latents on demand.

    The mask is copied, and every fitted form is remembered, because a run asks for the same few at every evaluation.
    """

    def __init__(self, mask: Any) -> None:
        with torch.inference_mode(False):
            self.given = as_tensor(mask).detach().clone()
        self._known: dict[Any, Any] = {}

    def subset(self, index: Tensor, batch: int, *, videos: bool) -> FittedMask:
        """The same mask for the clips `index` of a batch of `batch`. With `videos` its first axis is that of clips."""
        return FittedMask(take(as_mask(self.given) if videos else self.given, index, batch))

    def latent(self, like: Tensor) -> Tensor:
        """The mask at the resolution of latents.

        Args:
            like: Videos (batch, channels, time, height, width), or pictures (batch, channels, height, width). For
                packed latents, (batch, tokens, channels), and other forms the mask must already be broadcastable to
                them, e.g. (1, tokens, 1).

        Returns:
            Float, (batch or 1, 1, time, height, width) for videos.

        Raises:
            MaskError: The mask fits neither as it is nor by a whole compression factor.
        """
        return self._remember((like.shape, like.dtype, like.device), lambda: self._latent(like))

    def tokens(self, like: Tensor, patch: Grid) -> Tensor:
        """Which tokens are edited, (batch or 1, tokens), bool: a token is edited if any of its latents is."""
        return self._remember((like.shape, like.device, patch), lambda: self._tokens(like, patch))

    def background(self, like: Tensor, patch: Grid, transition: Sequence[float] | None = None) -> Tensor:
        """The fraction of the lock that each token takes, (batch or 1, tokens), float: 0 where edited, 1 elsewhere.

        Args:
            like: The latents.
            patch: Latents per token along (time, height, width).
            transition: (width in tokens, fraction): background tokens within `width` of the edit take this fraction.

        Raises:
            MaskError: The transition band is out of range, or the latents are packed.
        """
        band = as_transition(transition)
        return self._remember((like.shape, like.device, patch, band), lambda: self._background(like, patch, band))

    def selection(
        self, like: Tensor, patch: Grid, transition: Sequence[float] | None = None
    ) -> tuple[Selection, Tensor]:
        """Which tokens must be computed at full lock, and which latents belong to the other tokens: bool, broadcastable
        to `like`. Arguments as in `background`.
        """
        band = as_transition(transition)
        key = (like.shape, like.device, patch, band, "full")
        return self._remember(key, lambda: self._selection(like, patch, band))

    def _selection(self, like: Tensor, patch: Grid, transition: tuple[float, float] | None) -> tuple[Selection, Tensor]:
        background = self.background(like, patch, transition).to(like.device).expand(len(like), -1).contiguous()
        chosen = Selection(background)
        left_out = (background >= 1).all(0, keepdim=True)
        if like.ndim == 3:
            return chosen, left_out.unsqueeze(-1)
        cells = left_out.view(1, 1, *token_grid(like.shape, patch))
        for axis, size in enumerate(patch, start=2):
            cells = cells.repeat_interleave(size, axis)
        return chosen, cells[:, :, 0] if like.ndim == 4 else cells

    def _background(self, like: Tensor, patch: Grid, transition: tuple[float, float] | None) -> Tensor:
        edited = self.tokens(like, patch)
        weight = (~edited).to(torch.float32)
        if transition is None:
            return weight
        width, share = transition
        if like.ndim == 3:
            raise MaskError(
                f"transition={transition} needs the tokens' grid; latents of shape {tuple(like.shape)} are packed: "
                "leave transition away."
            )
        t, h, w = token_grid(like.shape, patch)
        near = grow(edited.view(len(edited), 1, t, h, w).float(), width).flatten(1).to(weight)
        return weight * torch.where(near > 0, share, 1.0)

    def _tokens(self, like: Tensor, patch: Grid) -> Tensor:
        mask = self.latent(like)
        if like.ndim == 3:
            return (mask > 0).any(-1).expand(-1, like.shape[1])
        if like.ndim == 4:
            mask = (
                mask.expand(-1, -1, *like.shape[2:]).amax(1, keepdim=True).unsqueeze(2).expand(-1, -1, patch[0], -1, -1)
            )
        return token_mask(mask, patch)

    def _remember(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self._known:
            with torch.inference_mode(False):
                self._known[key] = make()
        return self._known[key]

    def _latent(self, like: Tensor) -> Tensor:
        if like.ndim == 4:
            return self._picture(like)
        if like.ndim != 5:
            return self._broadcastable(like)
        mask = check_mask(as_mask(self.given))
        if mask.shape[0] not in (1, like.shape[0]):
            raise MaskError(
                f"mask has a batch of {mask.shape[0]}, the latents have {like.shape[0]}; expected the same, or 1."
            )
        if mask.shape[2:] == like.shape[2:]:
            return mask.to(like)
        (frames, height, width), (t, h, w) = mask.shape[2:], like.shape[2:]
        fits = height % h == 0 and width % w == 0
        if frames == 1:  # a still mask holds for every frame
            mask, temporal = mask.expand(-1, -1, t, -1, -1), 1
        elif frames == t:
            temporal = 1
        elif t > 1 and (frames - 1) % (t - 1) == 0:
            temporal = (frames - 1) // (t - 1)
        else:
            fits = False
        if not fits:
            raise MaskError(
                f"mask has frames x height x width {frames} x {height} x {width}, "
                f"the latents have {t} x {h} x {w}; no whole compression factor leads from one to the other.\n"
                f"  Pass the mask at the latents' size, or at the clip's own size, e.g. "
                f"{1 + 4 * (t - 1)} x {8 * h} x {8 * w} for a VAE of 4 x 8 x 8 "
                "(masks.resize(mask, frames, height, width) makes one)."
            )
        return latent_mask(mask, temporal=temporal, spatial=(height // h, width // w)).to(like)

    def _picture(self, like: Tensor) -> Tensor:
        """A mask for pictures: (height, width), (batch, height, width) or (batch, 1, height, width), of any whole
        compression factor; or one per channel, at the latents' size.
        """
        mask = self.given
        if mask.ndim == 4 and mask.shape[1] != 1:
            return self._broadcastable(like)
        if mask.ndim == 3:
            mask = mask[:, None]
        return FittedMask(mask[None, None, None] if mask.ndim == 2 else mask.unsqueeze(2)).latent(like.unsqueeze(2))[
            :, :, 0
        ]

    def _broadcastable(self, like: Tensor) -> Tensor:
        mask = self.given
        fits = mask.ndim == like.ndim and all(m in (1, s) for m, s in zip(mask.shape, like.shape, strict=True))
        if not fits:
            raise MaskError(
                f"mask of shape {tuple(mask.shape)} does not broadcast to latents of shape {tuple(like.shape)}.\n"
                f"  For latents that are not videos pass a mask of {like.ndim} axes, each the latents' size or 1."
            )
        check_mask(mask.reshape(len(mask), 1, 1, 1, -1))
        return mask.to(like)
