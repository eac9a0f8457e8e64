"""What makes a lock pass for the model it wraps: samplers and scripts look for more than a call."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor

from .types import Denoiser

_RETURNS_SELF = frozenset(
    ("to", "eval", "train", "requires_grad_", "half", "bfloat16", "float", "double", "cpu", "cuda", "type")
)
"""Methods of a module that return the module: of a lock they return the lock, or it would be lost in a chain."""


class DenoiserProxy:
    """Answers for every attribute of `model` that it does not have itself, can be copied and pickled, and has a
    `forward` like a module. What belongs to a thread is in `_local`.
    """

    model: Denoiser
    _local: threading.local

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        # Runs belong to a thread, and are not copied: a copied or unpickled lock is the same lock at rest.
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def __getattr__(self, name: str) -> Any:
        # Samplers look for attributes of the model they were given; a wrapper hands them on.
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
        """The same as calling the lock."""
        return self(x, sigma, **extra_args)
