"""A transformer as the lock's denoiser, called the way its pipeline calls it.

    D(x, sigma) = z - t * v(z, t),   z = (1 - t) x0 + t noise,   x = z / (1 - t),   sigma = t / (1 - t)

The change of variables is `FlowDenoiser`'s. What differs: at the pipeline's own noise level the transformer is asked
with the very latents and the very timestep the pipeline gave, so that what is not changed stays as it is, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call
from .time import sigma_of

_ASKED_HERE = ("hidden_states", "timestep", "return_dict")
_NOT_PER_CLIP = ("control_hidden_states_scale", "attention_kwargs")
"""Arguments with no row per clip, whatever their first axis is: VACE has one scale per layer."""


class FlowCalls:
    """`calls(x, sigma, cond=...) -> x0-hat` for one transformer, at the step that `at` describes.

    index: which of the pipeline's experts it is.
    """

    def __init__(self, network: nn.Module, index: int = 0, train_steps: float = 1000.0) -> None:
        self.transformer, self.index, self.train_steps = network, index, train_steps
        self._shared: dict[str, Any] = {}
        self._branches: list[dict[str, Tensor]] = []
        self.raw: dict[int, Tensor] = {}

    def expert(self, sigma: Tensor) -> int:
        """Which expert is in charge now; a lock starts measuring anew where that changes."""
        return self.index

    def at(self, call: Call, time: float, latents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Stand at the step of this call: x and sigma, in variance-exploding form.

        latents: the pipeline's state, if it is known more exactly than what the transformer was given.
        """
        z = call.hidden[:, : call.channels] if latents is None else latents
        self.z = z.to(torch.promote_types(z.dtype, torch.float32))
        self.time, self.level, self._dtype = time, sigma_of(time), call.hidden.dtype
        self._timestep = call.timestep
        self._shared = {k: v for k, v in call.arguments.items() if k not in self._rows(call) and k not in _ASKED_HERE}
        self.raw = {}
        self.x = self.z * (1 + self.level)
        self.sigma = torch.full((len(z),), self.level, device=z.device, dtype=self.z.dtype)
        return self.x, self.sigma

    def branch(self, call: Call) -> dict[str, Tensor]:
        """What a branch is told beside latents and time, one row per clip."""
        rows = self._rows(call)
        beside = call.hidden[:, call.channels :]
        return self.known(rows | ({"beside": beside} if beside.shape[1] else {}))

    def known(self, branch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same branch as an earlier one, if it is: a KV cache knows its arguments again by identity."""
        for other in self._branches:
            if other.keys() == branch.keys() and all(other[name] is branch[name] for name in branch):
                return other
        self._branches = [branch, *self._branches[:3]]
        return branch

    def _rows(self, call: Call) -> dict[str, Tensor]:
        skip = (*_ASKED_HERE, *_NOT_PER_CLIP)
        given = {k: v for k, v in call.arguments.items() if k not in skip and isinstance(v, Tensor) and v.ndim}
        return {k: v for k, v in given.items() if len(v) == len(call.hidden)}

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """x0-hat, shaped like x.  cond: of `branch`, or several of them as the rows of one."""
        cond: dict[str, Tensor] = extra_args["cond"]
        own = x is self.x
        z = self.z if own else x / _rows_of(1 + sigma, x)
        if sigma is self.sigma:
            time, timestep = torch.full_like(sigma, self.time), self._timestep
        else:
            here = (sigma - self.level).abs() <= 1e-5 * self.level
            time = torch.where(here, self.time, sigma / (1 + sigma))
            given = self._timestep.reshape(len(self.x), -1)[:1, 0].to(sigma)
            timestep = torch.where(here, given, time * self.train_steps)
            if self._timestep.ndim == 2:
                timestep = timestep.unsqueeze(1)
        timestep = timestep.expand(len(x), *self._timestep.shape[1:])
        given_beside = cond.get("beside")
        hidden = z.to(self._dtype)
        if given_beside is not None:
            hidden = torch.cat([hidden, given_beside.to(hidden)], dim=1)
        velocity = self.transformer(
            hidden_states=hidden,
            timestep=timestep,
            **self._shared,
            **{k: v for k, v in cond.items() if k != "beside"},
            return_dict=False,
        )[0]
        if own:
            self.raw[id(cond)] = velocity
        return z - _rows_of(time, x) * velocity.to(z.dtype)

    def velocity(self, denoised: Tensor) -> Tensor:
        """The velocity that leads from the pipeline's latents to `denoised`."""
        return (self.z - denoised) / self.time


def _rows_of(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (x.ndim - 1))
