"""The source clip at the noise level of the edit:  z = x0_src + sigma * noise,  with one fixed noise for the whole run.

There is no inversion. By default the noise is the run's own: the one that leads from the source to the sampler's first
x. The source's trajectory then starts at the same point, and stays on it where the background is composited.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .batching import take
from .types import SourceError
from .utils.warn import warn

AddNoise = Callable[[Tensor, Tensor, Any], Tensor]


def variance_exploding(x0: Tensor, noise: Tensor, sigma: Any) -> Tensor:
    """k-diffusion's noising rule."""
    return x0 + sigma * noise


def share_of(sigma: float, add_noise: AddNoise) -> tuple[float, float]:
    """The factors of clip and noise in x at this noise level of an affine rule."""
    one = torch.ones((), dtype=torch.float64)
    return float(add_noise(one, one * 0, one * sigma)), float(add_noise(one * 0, one, one * sigma))


def check_noise(word: Any) -> None:
    """Raise SourceError for a noise that is neither a tensor nor "fixed"."""
    if not (isinstance(word, str) and word == "fixed"):
        raise SourceError(f'noise={word!r}; expected a tensor like source, "fixed", or None for the run\'s own.')


class Source:
    """Clean source latents (batch or 1, ...), the run's noise (None: left to it; "fixed": seed 0, for K/V alone), and
    the rule `add_noise(x0, noise, sigma)`; default: variance exploding. Raises SourceError for a wrong kind or shape.

    Latents and noise are copied: cached K/V, and latents placed on another device, would not follow a change in place.
    """

    def __init__(
        self, latents: Tensor, *, noise: Tensor | Literal["fixed"] | None = None, add_noise: AddNoise | None = None
    ) -> None:
        if not (isinstance(latents, Tensor) and latents.is_floating_point()):
            given = latents.dtype if isinstance(latents, Tensor) else f"a {type(latents).__name__}"
            raise SourceError(
                f"source is {given}; expected the clean latents of the clip, a floating tensor of the shape the "
                "sampler works on, e.g. (batch, channels, time, height, width)."
            )
        if fixed := noise is not None and not isinstance(noise, Tensor):
            check_noise(noise)
            # The same for every clip, so that one in a batch gets what it gets alone.
            seeded: Any = {"generator": torch.Generator().manual_seed(0), "device": "cpu", "dtype": torch.float32}
            noise = torch.randn(1, *latents.shape[1:], **seeded).to(latents)
        if not (noise is None or (noise.is_floating_point() and noise.shape[1:] == latents.shape[1:] and len(noise))):
            raise SourceError(
                f"noise has shape {tuple(noise.shape)}, {noise.dtype}; expected floating noise like source, "
                f"{tuple(latents.shape)}: noise=torch.randn_like(source)."
            )
        with torch.inference_mode(False):
            latents = latents.detach().clone()
            noise = None if noise is None else noise.detach().clone()
        for name, values in (("source latents", latents), ("numbers of noise=", noise)):
            if values is not None and not torch.isfinite(values).all():
                raise SourceError(
                    f"{name} hold {int((~torch.isfinite(values)).sum())} non-finite values (NaN or inf).\n"
                    "  Make them again; of a clip e.g. with the VAE in float32: source=vae.encode(clip.float())."
                )
        if noise is not None and not 0.25 < (size := float(noise.float().square().mean().sqrt())) < 4:
            raise SourceError(f"noise has a standard deviation of {size:.2g}; expected 1, not yet times a noise level.")
        self.latents, self.noise = latents, noise
        self.of_run = None if fixed else noise  # the noise in x; None: what leads from the source to the first x
        self.reference = latents  # what gives keys and values; another clip if the source is erased
        self._placed: dict[int, Tensor] = {}
        self.add_noise: AddNoise = add_noise or variance_exploding

    def matching(self, x: Tensor) -> Tensor:
        """The clean latents on x's device and in its dtype, one row per clip. Raises SourceError for another shape."""
        if self.latents.shape[1:] != x.shape[1:] or len(self.latents) not in (1, len(x)):
            raise SourceError(
                f"source latents have shape {tuple(self.latents.shape)}, the sampler's x has {tuple(x.shape)}; "
                "expected the same, or a batch of 1.\n  Start the sampler from torch.randn_like(source) * sigmas[0]."
            )
        return self._like(self.latents, x)

    def _like(self, clean: Tensor, x: Tensor) -> Tensor:
        """Latents or reference, moved once and not at every evaluation."""
        placed = self._placed.get(id(clean))
        if placed is None or (placed.device, placed.dtype) != (x.device, x.dtype):
            with torch.inference_mode(False):
                placed = self._placed[id(clean)] = clean.to(x)
        return placed.expand_as(x)

    def noise_of_run(self, x: Tensor, sigma: float, compares: bool = True) -> Tensor:
        """The noise in x: as given, or what leads from the source to a run's first x, at noise level sigma, by any
        affine rule; if nothing `compares` with the source, any that was given. SourceError for noise of other clips.
        """
        if self.noise is not None and len(self.noise) not in (1, len(x)):
            raise SourceError(f"noise has {len(self.noise)} rows for {len(x)} clips; expected 1, or 1 per clip.")
        if (own := self.of_run if compares else self.noise) is not None:
            return own.to(x)
        signal, spread = share_of(sigma, self.add_noise)
        noise = (x.detach() - signal * self.matching(x)) / spread
        # Not too much: a clip that is restarted at a low level is far from the source.
        if (size := float(noise.float().square().mean().sqrt())) < 0.25:
            warn(
                f"x lies {size:.2g} sigma from the source at sigma={sigma:.4g}; expected noise of standard deviation 1 "
                "sigma. Start the sampler from torch.randn_like(source) * sigmas[0].",
            )
        return noise

    def at(self, x: Tensor, sigma: float, noise: Tensor, *, erased: bool = True) -> Tensor:
        """The clip noised to sigma, like x: as it gives K/V, under its own noise if it has one; or as it is."""
        clean = self.matching(x)
        if erased:
            clean, noise = self._like(self.reference, x), noise if self.noise is None else self._like(self.noise, x)
        return self.add_noise(clean, noise.to(x).expand_as(x), torch.as_tensor(sigma, dtype=x.dtype, device=x.device))

    def subset(self, index: Tensor, batch: int) -> "Source":
        """The same source for the clips `index` of a batch of `batch`."""
        part, part_of = copy.copy(self), functools.partial(take, index=index, batch=batch)
        with torch.inference_mode(False):
            part.latents, part.noise, part._placed = part_of(self.latents), part_of(self.noise), {}
            part.of_run = None if self.of_run is None else part.noise
            part.reference = part.latents if self.reference is self.latents else part_of(self.reference)
        return part
