"""Intercept a transformer's calls: a pipeline makes them, and the lock decides when and how they are evaluated.

A pipeline calls its transformer once per branch. The call is recorded and answered with a blank tensor. When all
branches of a step are known, the lock calls the transformer itself, for the branches and for the source.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...types import RunError


class Call(NamedTuple):
    """One call of a transformer: its arguments by name."""

    network: nn.Module
    arguments: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """Noisy latents and appended channels, (batch, channels, time, height, width)."""
        return self.arguments["hidden_states"]

    @property
    def timestep(self) -> Tensor:
        """(batch,), or (batch, tokens)."""
        return self.arguments["timestep"]

    @property
    def channels(self) -> int:
        """The number of channels that are latents."""
        config: Any = self.network.config
        return int(getattr(config, "out_channels", None) or config.in_channels)

    def blank(self, dtype: torch.dtype) -> Tensor:
        """A tensor like the prediction, to be filled in later."""
        return torch.zeros_like(self.hidden[:, : self.channels], dtype=dtype)


@contextmanager
def intercepted(network: nn.Module, answer: Callable[[Call], Tensor | None]) -> Iterator[None]:
    """Inside the block `answer(call)` replaces calls of the transformer.

    The instance gets a subclass of its class with another `__call__`. A hook on `forward` would not last: accelerate
    renews all of them at the end of every call of an offloaded pipeline. While an answer is made, the transformer has
    its own class. An answer of None lets the call through. Raises RunError if another lock intercepts the transformer.
    """
    kind: Any = type(network)
    if hasattr(kind, "_kvlock_intercepts"):
        raise RunError(
            f"this {kind.__name__} is under a lock already; leave its `with` block, or take its guider out, before "
            "another lock begins."
        )

    # Hooks replace the instance's forward, so the class is asked. torch.compile(network) keeps the network inside.
    inner: Any = getattr(network, "_orig_mod", network)
    signature = inspect.signature(type(inner).forward)

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        object.__setattr__(module, "__class__", kind)
        try:
            arguments = signature.bind(module, *args, **kwargs).arguments
            arguments.pop(next(iter(arguments)))
            arguments |= arguments.pop("kwargs", {})
            prediction = answer(Call(module, dict(arguments)))
            if prediction is None:
                return module(*args, **kwargs)
        finally:
            object.__setattr__(module, "__class__", intercepting)
        if not arguments.get("return_dict", True):
            return (prediction,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=prediction)

    about = {"__call__": call, "__module__": kind.__module__, "_kvlock_intercepts": True}
    intercepting = type(kind)(kind.__name__, (kind,), about)
    object.__setattr__(network, "__class__", intercepting)
    try:
        yield
    finally:
        object.__setattr__(network, "__class__", kind)
