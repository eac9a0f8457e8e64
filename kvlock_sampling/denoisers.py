"""Wrap a model as a denoiser  D(x, sigma) = E[x0 | x],  x = x0 + sigma * noise,  which k-diffusion's samplers call.

    D(x, sigma) = c_skip * x + c_out * F(c_in * x, time)          F: the wrapped model

| wrapper               | c_skip            | c_out                      | c_in                  | time                |
| --------------------- | ----------------- | -------------------------- | --------------------- | ------------------- |
| FlowDenoiser velocity | 1 / (1 + sigma)   | -sigma / (1 + sigma)       | 1 / (1 + sigma)       | sigma / (1 + sigma) |
| FlowDenoiser x0       | 0                 | 1                          | 1 / (1 + sigma)       | sigma / (1 + sigma) |
| EpsDenoiser           | 1                 | -sigma                     | 1 / sqrt(1 + sigma^2) | 2/pi atan(sigma)    |
| VDenoiser             | 1 / (1 + sigma^2) | -sigma / sqrt(1 + sigma^2) | 1 / sqrt(1 + sigma^2) | 2/pi atan(sigma)    |

For a discrete schedule (Stable Diffusion 1, 2) use k-diffusion's own wrappers: `samplers.external().CompVisDenoiser`.
Sources: k-diffusion `external.py`; Karras et al. 2022 (arXiv 2206.00364), section 5.
"""

import math
from collections.abc import Callable
from itertools import islice
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .batching import join_calls, per_row
from .guidance import guide
from .types import KVLockError
from .utils.denoiser import DenoiserProxy, method_of
from .utils.fields import check_number

ScalarOrTensor = TypeVar("ScalarOrTensor", float, Tensor)
Call: TypeAlias = Callable[..., Tensor]


class DenoiserError(KVLockError, ValueError):
    """Invalid settings or arguments of a denoiser, or a model that returns the wrong shape."""


class DenoiserWrapper(nn.Module):
    """A variance-exploding denoiser around `inner_model`, to which it forwards unknown attributes (config, dtype)."""

    def __init__(self, inner_model: Callable[..., Any]) -> None:
        super().__init__()
        self.inner_model = inner_model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner_model" or (name.startswith("__") and name.endswith("__")):
                raise  # The attribute is not set yet (copy, pickle), or it is a protocol of the inner model.
            return getattr(self.inner_model, name)


class Preconditioned(DenoiserWrapper):
    """D(x, sigma) = c_skip * x + c_out * F(c_in * x, time); subclasses define the scalings and the time.

    Args:
        inner_model: The model F.
        call: `call(model, z, time, **extra_args) -> prediction`. Default: `model(z, time, **extra_args)`.
            For diffusers: `lambda m, z, t, **kw: m(hidden_states=z, timestep=t, return_dict=False, **kw)[0]`.
        model_dtype: Dtype of the model's input. Default: that of its first large parameter, or of x. Time stays at
            least float32, because 999 rounds to 1000 in bfloat16.
    """

    scalings: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    """sigma -> (c_skip, c_out, c_in), each shaped like sigma."""
    time: Call
    """sigma -> the model's time, shaped like sigma."""

    def __init__(
        self, inner_model: Callable[..., Any], call: Call | None = None, model_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(inner_model)
        if not isinstance(model_dtype, torch.dtype | None):
            raise DenoiserError(f"model_dtype={model_dtype!r}; expected a dtype, e.g. model_dtype=torch.bfloat16.")
        self.call, self.model_dtype = call, model_dtype

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """Return x0 + sigma * noise in the dtype of x0, for sigma of shape () or (batch,)."""
        return (x0 + per_row(torch.as_tensor(sigma, device=x0.device), x0) * noise).to(x0.dtype)

    def to_ve(self, sigma: ScalarOrTensor) -> ScalarOrTensor:
        """Return the noise level in variance-exploding form: sigma itself."""
        return sigma

    def expert(self, sigma: Tensor) -> Any:
        """Return the network that runs at this noise level if the model has a method `expert(time)`, else None."""
        inner = method_of(self.inner_model, "expert")
        return None if inner is None else inner(self.time(torch.as_tensor(sigma, dtype=torch.float32)))

    def forward(self, x: Float[Tensor, "batch ..."], sigma: Tensor, **extra_args: Any) -> Float[Tensor, "batch ..."]:
        """Return x0-hat, shaped like x = x0 + sigma * noise, with arithmetic in x's dtype, at least float32. sigma >= 0
        is () or (batch,), and extra_args go to the model. Raises DenoiserError for sigma or a result of another shape.
        """
        work = torch.promote_types(x.dtype, torch.float32)
        sigma = torch.as_tensor(sigma, dtype=work, device=x.device)
        if sigma.shape not in ((), (1,), (len(x),)):
            raise DenoiserError(f"sigma has shape {tuple(sigma.shape)}; expected () or (batch,) = ({len(x)},)")
        sigma = sigma.expand(len(x))
        c_skip, c_out, c_in = (per_row(c, x) for c in self.scalings(sigma))
        parameters = self.inner_model.parameters() if isinstance(self.inner_model, nn.Module) else ()
        # One-byte (quantised) weights compute in another dtype.
        own = (p for p in parameters if p.is_floating_point() and p.element_size() > 1)
        dtype = self.model_dtype or max(islice(own, 8), key=Tensor.numel, default=x).dtype  # Wan's first is in float32
        z, time = (x * c_in).to(dtype), self.time(sigma).to(torch.promote_types(dtype, torch.float32))
        model, call = self.inner_model, self.call
        prediction = model(z, time, **extra_args) if call is None else call(model, z, time, **extra_args)
        if not isinstance(prediction, Tensor) or prediction.shape != x.shape:
            got = tuple(prediction.shape) if isinstance(prediction, Tensor) else type(prediction).__name__
            raise DenoiserError(
                f"the model returned {got}; expected a tensor like x, {tuple(x.shape)}. Unpack it with "
                f"{type(self).__name__}(model, call=lambda m, z, t, **kw: m(z, t, return_dict=False, **kw)[0])"
            )
        return (x * c_skip + prediction.to(work) * c_out).to(x.dtype)


class FlowDenoiser(Preconditioned):
    """A rectified-flow model (Wan, HunyuanVideo, LTX, Mochi, Flux) as an exact variance-exploding denoiser.

    Flow: z_t = (1 - t) * x0 + t * noise. With sigma = t / (1 - t) and x = z_t / (1 - t) this is x = x0 + sigma * noise,
    so the model is called at z_t = x / (1 + sigma), t = sigma / (1 + sigma): exactly. See `samplers.flow_sigmas`.

    Args:
        inner_model: Called as `inner_model(z_t, t * time_scale, **extra_args)`, with times (batch,).
        prediction: "velocity", v = noise - x0, hence x0 = z_t - t * v; or "x0".
        time_scale: Factor of t; 1000 for the models of diffusers.
        options: `call` and `model_dtype` of `Preconditioned`.

    Raises:
        DenoiserError: `prediction` is unknown, or `time_scale` no number.

    >>> model = FlowDenoiser(lambda z, t: torch.zeros_like(z))  # velocity 0: z_t is x0 already
    >>> model(torch.full((1, 2), 8.0), torch.tensor([3.0]))
    tensor([[2., 2.]])
    """

    def __init__(
        self,
        inner_model: Callable[..., Any],
        prediction: Literal["velocity", "x0"] = "velocity",
        time_scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(inner_model, **options)
        if prediction not in ("velocity", "x0"):
            raise DenoiserError(f"prediction={prediction!r}; expected 'velocity' or 'x0'. Else EpsDenoiser, VDenoiser")
        self.prediction, self.time_scale = prediction, check_number("time_scale", time_scale, DenoiserError)

    @staticmethod
    def t_from_sigma(sigma: ScalarOrTensor) -> ScalarOrTensor:
        """Return the flow time t = sigma / (1 + sigma) in [0, 1)."""
        return sigma / (1 + sigma)

    @staticmethod
    def sigma_from_t(t: ScalarOrTensor) -> ScalarOrTensor:
        """Return the noise level sigma = t / (1 - t), for t in [0, 1)."""
        return t / (1 - t)

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c_in = 1 / (1 + sigma)
        if self.prediction == "x0":
            return torch.zeros_like(sigma), torch.ones_like(sigma), c_in
        return c_in, -self.t_from_sigma(sigma), c_in

    def time(self, sigma: Tensor) -> Tensor:
        return self.t_from_sigma(sigma) * self.time_scale


def angle(sigma: Tensor) -> Tensor:
    """Return 2/pi * atan(sigma) in [0, 1), the time of the cosine schedule of v-diffusion."""
    return sigma.atan() / math.pi * 2


class EpsDenoiser(Preconditioned):
    """A model that predicts the noise, with continuous time:  D = x - sigma * eps(x / sqrt(1 + sigma^2), time(sigma)).

    Args:
        inner_model: The model.
        time: Maps noise levels (batch,) to the model's time. Default: `angle`.
        options: `call` and `model_dtype` of `Preconditioned`.
    """

    def __init__(self, inner_model: Callable[..., Any], time: Call = angle, **options: Any) -> None:
        super().__init__(inner_model, **options)
        self.time = time

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1) ** 0.5


class VDenoiser(EpsDenoiser):
    """Like EpsDenoiser, for a model that predicts v = (noise - sigma * x0) / sqrt(1 + sigma^2)."""

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1) ** 0.5, 1 / (sigma**2 + 1) ** 0.5


class CFGDenoiser(DenoiserWrapper):
    """Classifier-free guidance in one call of `inner_model(x, sigma, cond=...)` on the doubled batch [uncond, cond].
    Raises DenoiserError if the branches cannot share a call, or around a lock, which guides by itself.
    """

    def __init__(self, inner_model: Callable[..., Any]) -> None:
        super().__init__(inner_model)
        if isinstance(inner_model, DenoiserProxy):
            raise DenoiserError(
                "CFGDenoiser was given a KVLock; expected a denoiser, because a lock does the guidance itself.\n"
                "  Pass the lock to the sampler, with extra_args={'cond': ..., 'uncond': ..., 'cond_scale': ...}."
            )

    def forward(
        self, x: Float[Tensor, "batch ..."], sigma: Tensor, uncond: Any, cond: Any, cond_scale: float | Tensor
    ) -> Float[Tensor, "batch ..."]:
        """Return D_u + (D_c - D_u) * cond_scale, shaped like the noisy latents x; sigma is () or (batch,), cond_scale a
        float or (batch,). The prompts cond and uncond are tensors (batch, ...) or (1, ...), lists of one text per clip,
        or mappings of these. Raises DenoiserError if they differ in shape or keys.
        """
        if (joined := join_calls([{"cond": uncond}, {"cond": cond}], len(x))) is None:
            given = tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf, (uncond, cond))
            raise DenoiserError(
                f"uncond is {given[0]}, cond {given[1]} in shape; expected the same keys, and the same shapes but for "
                f"one row or one for each of {len(x)} clip(s): pad the shorter prompt."
            )
        cond_scale = cond_scale if isinstance(cond_scale, float | int) else torch.as_tensor(cond_scale)
        if isinstance(cond_scale, Tensor) and cond_scale.numel() not in (1, len(x)):
            raise DenoiserError(f"cond_scale has {cond_scale.numel()} values for {len(x)} clips; pass 1 or {len(x)}.")
        dtype = None if isinstance(sigma, Tensor) else torch.promote_types(x.dtype, torch.float32)
        sigma = torch.as_tensor(sigma, dtype=dtype, device=x.device).expand(len(x))
        d_uncond, d_cond = self.inner_model(torch.cat([x, x]), torch.cat([sigma, sigma]), **joined).chunk(2)
        return guide(d_uncond, d_cond, cond_scale)
