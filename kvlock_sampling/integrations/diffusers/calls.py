"""Intercept a transformer's calls: a pipeline makes them, and the lock decides when and how they are evaluated.

A pipeline calls its transformer once per branch. The call is recorded and answered with a blank tensor. When all
branches of a step are known, the lock calls the transformer itself, for the branches and for the source.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...attention.foreground import signature_of
from ...types import RunError
from ...utils.modules import plain_copies, wearing
from ...utils.threads import here


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
    signature, mine = signature_of(getattr(network, "_orig_mod", network)), here()  # torch.compile keeps it inside

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
            from diffusers.models.modeling_outputs import Transformer2DModelOutput

            return Transformer2DModelOutput(sample=prediction)

        return plain_copies(kind, {"__call__": call})

    with taken(network), wearing(network, intercepting):
        yield
