"""Intercept a transformer's calls: a pipeline makes them, and the lock decides when and how they are evaluated.

A pipeline calls its transformer once per branch. The call is recorded and answered with a blank tensor. When all
branches of a step are known, the lock calls the transformer itself, for the branches and for the source.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ...batching import per_row
from ...types import RunError
from ...utils.modules import plain_copies, signature_of, wearing
from ...utils.threads import here
from .schedule import sigmas_of

_OWN = ("hidden_states", "timestep", "return_dict")  # every call sets them anew
_NOT_PER_CLIP = (*_OWN, "control_hidden_states_scale", "attention_kwargs")  # VACE has one scale per layer


class Call(NamedTuple):
    """One call of a transformer: its arguments by name."""

    network: nn.Module
    arguments: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """Noisy latents and appended channels, (batch, channels, time, height, width) or (batch, tokens, channels)."""
        return self.arguments["hidden_states"]

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """The noisy latents, and the appended channels, of which there may be none."""
        config: Any = self.network.config
        packed = self.hidden.ndim == 3
        count = int(getattr(config, "out_channels", None) or config.in_channels)
        count *= int(getattr(config, "patch_size", 1)) ** 2 if packed else 1
        latents, appended = self.hidden.tensor_split([count], dim=1 + packed)
        return latents, appended

    def blank(self, dtype: torch.dtype) -> Tensor:
        """A tensor like the prediction, to be filled in later; NaN, so that one that never is cannot be missed."""
        return torch.full_like(self.parts[0], torch.nan, dtype=dtype)


class FlowCalls:
    """`calls(x, sigma, cond=...) -> x0-hat` for one transformer, the expert `index`, at the step that `at` sets.

        D(x, sigma) = z - t * v(z, t),   z = (1 - t) x0 + t noise,   x = z / (1 - t),   sigma = t / (1 - t)
    At the pipeline's own noise level the transformer gets the very latents and timestep that the pipeline gave, so that
    an evaluation without a lock has the pipeline's own bits.
    """

    def __init__(self, network: nn.Module, index: int = 0) -> None:
        self.transformer, self.index = network, index
        self.shared: dict[str, Any] = {}  # of all branches; public, so that a KV cache sees it
        self._branches: list[dict[str, Tensor]] = []
        self._raw: dict[int, Tensor] = {}

    def expert(self, sigma: Tensor) -> int:
        """The index of the expert: a lock starts to measure anew where it changes."""
        return self.index

    def at(self, call: Call, time: float, latents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Go to the step of this conditional call, and return its x and sigma in variance-exploding form."""
        z = call.parts[0] if latents is None else latents
        self._z = z.to(torch.promote_types(z.dtype, torch.float32))
        self._time, self._level = time, float(sigmas_of(torch.tensor(time, dtype=torch.float64)))
        self._dtype, self._timestep = call.hidden.dtype, call.arguments["timestep"]
        self.shared = {k: v for k, v in call.arguments.items() if k not in self._rows(call) and k not in _OWN}
        self._raw = {}
        self._x = self._z * (1 + self._level)
        self._sigma = torch.full((len(z),), self._level, device=z.device, dtype=self._z.dtype)
        return self._x, self._sigma

    def branch(self, call: Call) -> dict[str, Tensor]:
        """The arguments of a branch beside latents and time, one row per clip."""
        rows, (_, appended) = self._rows(call), call.parts
        return self.known(rows | ({"appended": appended} if appended.numel() else {}))

    def known(self, branch: dict[str, Tensor]) -> dict[str, Tensor]:
        """An earlier branch of the same tensors if there is one: a KV cache recognises its arguments by identity."""
        for other in self._branches:
            if other.keys() == branch.keys() and all(other[name] is branch[name] for name in branch):
                return other
        self._branches = [branch, *self._branches[:3]]
        return branch

    def raw(self, branch: Any) -> Tensor | None:
        """What the transformer itself predicted for a branch at the pipeline's own latents; None if it did not run."""
        return self._raw.get(id(branch))

    def velocity(self, denoised: Tensor) -> Tensor:
        """The velocity from the pipeline's latents to this x0-hat."""
        return (self._z - denoised) / self._time

    def _rows(self, call: Call) -> dict[str, Tensor]:
        given = {k: v for k, v in call.arguments.items() if k not in _NOT_PER_CLIP and isinstance(v, Tensor) and v.ndim}
        return {k: v for k, v in given.items() if len(v) == len(call.hidden)}

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """Return x0-hat, like x. `cond` is what `branch` returned, or several of those as rows of one."""
        cond = {name: rows.expand(len(x), *rows.shape[1:]) for name, rows in extra_args["cond"].items()}
        own = x is self._x
        z = self._z if own else x / per_row(1 + sigma, x)
        if sigma is self._sigma:
            time, timestep = torch.full_like(sigma, self._time), self._timestep
        else:
            here = (sigma - self._level).abs() <= 1e-5 * self._level
            time = torch.where(here, self._time, sigma / (1 + sigma))
            given = self._timestep.reshape(len(self._x), -1)[:1, 0].to(sigma)
            timestep = torch.where(here, given, time / self._time * given)
            if self._timestep.is_floating_point():
                timestep = timestep.to(self._timestep.dtype)  # some networks take no other
            if self._timestep.ndim == 2:
                timestep = timestep.unsqueeze(1)
        timestep = timestep.expand(len(x), *self._timestep.shape[1:])
        hidden, appended = z.to(self._dtype), cond.pop("appended", None)
        if appended is not None:
            hidden = torch.cat([hidden, appended.to(hidden)], dim=1 + (z.ndim == 3))
        given = {"hidden_states": hidden, "timestep": timestep, "return_dict": False}
        velocity = self.transformer(**given, **self.shared, **cond)[0]
        if own:
            self._raw[id(extra_args["cond"])] = velocity
        return z - per_row(time, x) * velocity.to(z.dtype)


_taken: dict[int, object] = {}


@contextmanager
def taken(thing: Any) -> Iterator[None]:
    """Hold a thing inside the block. Raises RunError if another block holds it."""
    if _taken.setdefault(id(thing), mine := object()) is not mine:  # in one step, for another thread may ask as well
        raise RunError(
            f"this {type(thing).__name__} is under a lock already, maybe in another thread or task.\n"
            "  Leave that lock's `with` block, wait for the end of its run, or take its guider out."
        )
    try:
        yield
    finally:
        del _taken[id(thing)]


@contextmanager
def intercepted(network: nn.Module, answer: Callable[[Call], Tensor]) -> Iterator[None]:
    """Inside the block `answer(call)` replaces calls of the transformer that this thread or task makes.

    The instance gets a subclass of its class with another `__call__`. A hook on `forward` would not last: accelerate
    renews all of them at the end of every call of an offloaded pipeline. While an answer is made, the transformer has
    its own class. Raises RunError if another lock intercepts the transformer.
    """
    signature, mine = signature_of(network), here()

    def intercepting(kind: Any) -> Any:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module is not network or not mine():
                return kind.__call__(module, *args, **kwargs)
            arguments = signature.bind(module, *args, **kwargs).arguments
            arguments.pop(next(iter(arguments)))
            arguments |= arguments.pop("kwargs", {})
            with wearing(module, intercepting, False):
                prediction = answer(Call(module, dict(arguments)))
            if not arguments.get("return_dict", True):
                return (prediction,)
            return Transformer2DModelOutput(sample=prediction)

        return plain_copies(kind, {"__call__": call})

    with taken(network), wearing(network, intercepting):
        yield
