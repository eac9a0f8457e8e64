"""A mask at every resolution that a run needs: latents for compositing and measuring, tokens for locking."""

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..batching import take
from ..types import MaskError, Scalar
from ..utils.fields import check_number, within
from ..utils.warn import warn
from . import as_mask, check_mask, grow, latent_mask, token_mask
from .form import as_tensor
from .tokens import Grid, Selection, on_latents, token_grid

F = TypeVar("F", bound=Callable[..., Any])


def as_transition(transition: Any) -> tuple[float, float] | None:
    """Check a transition band: (width in tokens > 0, fraction of the lock in [0, 1]), or None."""
    if transition is None:
        return None
    width, lock = transition if isinstance(transition, list | tuple) and len(transition) == 2 else (None, None)
    width, lock = within(width, above=0.0), within(lock, at_least=0.0, at_most=1.0)
    if width is None or lock is None:
        raise MaskError(f"transition={transition!r}; expected (width in tokens > 0, lock in [0, 1]), e.g. (1, 0.5).")
    return width, lock


def _remembered(make: F) -> F:
    @wraps(make)
    def method(self: "FittedMask", like: Tensor, *options: Any) -> Any:
        key = (make.__name__, like.shape, like.dtype, like.device, *(option and tuple(option) for option in options))
        if key not in self._known:
            with torch.inference_mode(False):
                self._known[key] = make(self, like, *options)
        return self._known[key]

    return cast(F, method)


class FittedMask:
    """A mask as in `as_mask`, in pixels or in latents, fitted to latents on demand. It is copied.

    `reach` is how far from the mask the background may be released, in widths of the edited tokens: the square root of
    their number in a frame, in the mean of a clip's frames with any.
    """

    def __init__(self, mask: Any, reach: Any = math.inf) -> None:
        if not (isinstance(reach, float) and reach == math.inf):
            check_number("reach", reach, MaskError, " In widths of the mask; math.inf is anywhere.", above=0.0)
        self.reach = reach
        with torch.inference_mode(False):
            self.given = as_tensor(mask).clone()
        self._known: dict[Any, Any] = {}

    def subset(self, index: Tensor, batch: int, *, videos: bool) -> "FittedMask":
        """The same mask for the clips `index` of a batch of `batch`. With `videos` its first axis is that of clips."""
        given = as_mask(self.given) if videos else self.given[None] if self.given.ndim == 2 else self.given
        return FittedMask(take(given, index, batch), self.reach)

    @_remembered
    def latent(self, like: Tensor) -> Tensor:
        """The mask at the resolution of latents, float, (batch or 1, 1, time, height, width) for videos.

        For packed latents (batch, tokens, channels) and other forms the mask must be broadcastable already.
        """
        if like.ndim == 5:
            return self._video(like)
        mask = self.given
        if like.ndim != 4 or (mask.ndim == 4 and mask.shape[1] != 1):
            return self._broadcastable(like)
        # A picture's mask is (height, width), (batch, height, width) or (batch, 1, height, width).
        clips = as_mask(mask[:, None] if mask.ndim == 3 else mask)
        return FittedMask(clips).latent(like.unsqueeze(2))[:, :, 0]

    @_remembered
    def tokens(self, like: Tensor, patch: Grid) -> Tensor:
        """Which tokens are edited, (batch or 1, tokens), bool: a token is edited if any of its latents is."""
        mask = self.latent(like)
        if like.ndim == 3:
            return (mask > 0).any(-1).expand(-1, like.shape[1])
        if like.ndim == 4:
            mask = mask.expand(-1, -1, *like.shape[2:]).amax(1, keepdim=True)
            mask = mask.unsqueeze(2).expand(-1, -1, patch[0], -1, -1)
        return token_mask(mask, patch)

    @_remembered
    def background(self, like: Tensor, patch: Grid, transition: Sequence[float] | None = None) -> Tensor:
        """The fraction of the lock that each token takes, float, (batch or 1, tokens): 0 where edited, 1 elsewhere."""
        weight = (~self.tokens(like, patch)).to(torch.float32)
        if transition is None:
            return weight
        width, fraction = transition
        near = grow(self._cells(like, patch, f"transition={tuple(transition)}", "no transition"), width)
        return weight * torch.where(near.flatten(1).to(weight) > 0, fraction, 1.0)

    def kept(self, weight: Scalar, like: Tensor, patch: Grid) -> Scalar:
        """A weight of the source in the background, which is 1 beyond the reach: (batch, tokens), or as given."""
        if self.reach == math.inf or (not isinstance(weight, Tensor) and weight == 1):
            return weight
        far = self._beyond(like, patch).expand(len(like), -1)
        if not isinstance(weight, Tensor):
            return far.clamp(min=weight)
        return torch.maximum(far, (weight.unsqueeze(-1) if weight.ndim == 1 else weight).to(far))

    @_remembered
    def _beyond(self, like: Tensor, patch: Grid) -> Tensor:
        """1 on tokens beyond the reach of the edited ones of their frame, else 0, float."""
        cells = self._cells(like, patch, f"reach={self.reach:g}", "reach=math.inf, which releases anywhere")
        counts = cells.flatten(3).sum(-1)
        widths = (counts.sum(-1) / (counts > 0).sum(-1).clamp_min(1)).sqrt().flatten().tolist()
        near = [grow(clip[None], self.reach * width) for clip, width in zip(cells, widths, strict=True)]
        return 1 - torch.cat(near).flatten(1)

    def _cells(self, like: Tensor, patch: Grid, option: str, without: str) -> Tensor:
        """Which tokens are edited, 1 or 0 on their grid, (batch or 1, 1, time, height, width)."""
        if like.ndim == 3:
            raise MaskError(f"{option} needs the tokens' grid, and these latents are packed: pass {without}.")
        edited = self.tokens(like, patch)
        return edited.view(len(edited), 1, *token_grid(like.shape, patch)).float()

    @_remembered
    def selection(self, like: Tensor, patch: Grid, transition: Sequence[float] | None) -> tuple[Selection, Tensor]:
        """The tokens that must be computed at full lock, and where the latents of the others are, bool, like `like`."""
        background = self.background(like, patch, transition).to(like.device).expand(len(like), -1).contiguous()
        chosen = Selection(background)
        _ = chosen.stored  # found now, outside of inference mode, because a later run may take gradients
        return chosen, on_latents((background >= 1).all(0, keepdim=True), like.shape, patch)

    def _video(self, like: Tensor) -> Tensor:
        mask = check_mask(self.given)
        if mask.shape[0] not in (1, like.shape[0]):
            raise MaskError(f"mask has a batch of {len(mask)}, the latents have {len(like)}; expected the same, or 1.")
        if mask.shape[2:] == like.shape[2:]:
            return mask.to(like)
        (frames, height, width), (t, h, w) = mask.shape[2:], like.shape[2:]
        temporal = 1
        if frames == 1:  # a still mask holds for every frame
            mask = mask.expand(-1, -1, t, -1, -1)
        elif frames != t:
            temporal, rest = divmod(frames - 1, t - 1) if t > 1 else (0, 0)
            temporal = temporal if rest == 0 and temporal in (2, 4, 6, 8) and height > h else 0  # as VAEs compress
            usual, step = (8 if height // h > 16 else 4), height // h  # LTX's VAE takes 8 frames, and 32 pixels a side
            if temporal not in (0, usual):
                speed = {0.5: "half", 2.0: "twice"}.get(temporal / usual, f"{temporal / usual:g} times")
                warn(
                    f"the mask has {frames} frames for {t} of latents; expected {1 + usual * (t - 1)}. If the clip has "
                    f"that many, the mask runs at {speed} its speed: pass its frames alone, or say what the VAE takes, "
                    f"mask=kv.masks.latent_mask(mask, temporal={temporal}, spatial={step})."
                )
        if not temporal or height % h or width % w or height // h != width // w:
            turned = "Are its axes time, height, width? mask.permute(2, 0, 1) puts the last one first. "
            raise MaskError(
                f"mask has frames x height x width {frames} x {height} x {width}, the latents have {t} x {h} x {w}; no "
                f"whole compression factor leads to it, one for both sides.\n  {turned * (height * w != width * h)}"
                "Pass the mask at the latents' size, or at the clip's, e.g. "
                f"masks.resize(mask, {1 + 4 * (t - 1)}, {8 * h}, {8 * w}) for a VAE of 4 x 8 x 8."
            )
        return latent_mask(mask, temporal=temporal, spatial=(height // h, width // w)).to(like)

    def _broadcastable(self, like: Tensor) -> Tensor:
        mask = self.given
        if mask.ndim != like.ndim or any(m not in (1, s) for m, s in zip(mask.shape, like.shape, strict=True)):
            raise MaskError(
                f"mask of shape {tuple(mask.shape)} does not broadcast to latents of shape {tuple(like.shape)}.\n"
                f"  For latents that are not videos pass a mask of {like.ndim} axes, each the latents' size or 1."
            )
        return check_mask(mask.reshape(len(mask), 1, 1, 1, -1)).reshape(mask.shape).to(like)
