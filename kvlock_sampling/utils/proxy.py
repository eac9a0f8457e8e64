"""Proxy unknown attributes to the wrapped model: samplers and scripts look for more than a call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..types import Denoiser

_RETURNS_SELF = frozenset(
    ("to", "eval", "train", "requires_grad_", "half", "bfloat16", "float", "double", "cpu", "cuda", "type")
)
"""Methods of a module that return the module. On a proxy they return the proxy, so that a chain of calls keeps it."""


class DenoiserProxy:
    """A wrapper with every attribute of `model` that it does not define, and with a `forward` like a module."""

    model: Denoiser

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "model" not in self.__dict__:
            raise AttributeError(name)
        found = getattr(self.model, name)
        if name in _RETURNS_SELF and callable(found):

            def applied(*arguments: Any, **options: Any) -> DenoiserProxy:
                found(*arguments, **options)
                return self

            return applied
        return found

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """The same as a call."""
        return self(x, sigma, **extra_args)
