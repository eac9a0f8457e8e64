"""A transformer's calls, recorded where a pipeline makes them and made where the lock wants them.

A pipeline asks its transformer once per branch. The hook notes the question and answers with an empty tensor; when all
branches of a step are known, the lock asks the transformer itself: the source beside the branches, as rows of one call
or in a pass before, again for an estimator that probes, and not at all for a branch that guidance does not need.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...types import RunError
from ...utils.torchvision import broken_torchvision_hidden

with broken_torchvision_hidden():
    from diffusers.hooks import HookRegistry, ModelHook

HOOK = "kvlock_sampling"


class Call(NamedTuple):
    """A question to a transformer: its arguments by name."""

    network: nn.Module
    arguments: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """(batch, channels, time, height, width): noisy latents, and whatever channels the pipeline puts beside."""
        return self.arguments["hidden_states"]

    @property
    def timestep(self) -> Tensor:
        """(batch,), or (batch, tokens)."""
        return self.arguments["timestep"]

    @property
    def channels(self) -> int:
        """How many channels are latents."""
        config: Any = self.network.config
        return int(getattr(config, "out_channels", None) or config.in_channels)

    def blank(self, dtype: torch.dtype) -> Tensor:
        """A tensor where the answer can be written later."""
        return torch.zeros_like(self.hidden[:, : self.channels], dtype=dtype)


class Interception(ModelHook):
    """Hands every call of a transformer to `answer(call) -> prediction`, except those made while `passing`."""

    def __init__(self, answer: Callable[[Call], Tensor], passing: Callable[[], bool]) -> None:
        super().__init__()
        self.answer, self.passing = answer, passing
        self.found_registry = False
        self.reached: list[bool] = []  # of the calls that are under way: whether they came through here

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the transformer's forward, outermost of all hooks there are now."""
        if self.reached:
            self.reached[-1] = True
        if self.passing():
            forward: Any = self.fn_ref.original_forward
            return forward(*args, **kwargs)
        return self.answered(module, args, kwargs)

    def answered(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The answer in the form in which the transformer gives its own."""
        # Of the class: other hooks replace the instance's forward.
        arguments = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        arguments.pop(next(iter(arguments)))
        arguments |= arguments.pop("kwargs", {})
        prediction = self.answer(Call(module, dict(arguments)))
        if not arguments.get("return_dict", True):
            return (prediction,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=prediction)


def intercept(network: nn.Module, hook: Interception) -> None:
    """Register the hook.

    Raises:
        RunError: another lock is at work on this transformer.
    """
    hook.found_registry = hasattr(network, "_diffusers_hook")
    registry = HookRegistry.check_if_exists_or_initialize(network)
    if registry.get_hook(HOOK) is not None:
        raise RunError(
            f"this {type(network).__name__} is under a lock already; leave its `with` block, or take the guider out of "
            "its pipeline, before another one begins."
        )
    registry.register_hook(hook, HOOK)


def release(network: nn.Module) -> None:
    """Take the hook out again, if it is there. Whatever else hooks the transformer stays."""
    registry: HookRegistry | None = getattr(network, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(HOOK)
    if registry is None or not isinstance(hook, Interception):
        return
    registry.remove_hook(HOOK, recurse=False)
    # What the registry leaves behind: itself, and the class's own forward as an attribute of the instance.
    if not registry.hooks and not hook.found_registry:
        del network._diffusers_hook
    if getattr(network.__dict__.get("forward"), "__func__", None) is type(network).forward:
        del network.forward


@contextmanager
def intercepted(network: nn.Module, hook: Interception) -> Iterator[None]:
    """The hook, for the length of a block, whatever others do to the transformer's forward meanwhile.

    Offloading takes its own hooks away at the end of every call of a pipeline and sets new ones; ours, which was
    around them, is then gone. A call that did not come through here is answered all the same, at the price of one
    pass in vain, and the hook is set anew.
    """

    def before(module: nn.Module, args: Any) -> None:
        hook.reached.append(False)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not hook.reached or hook.reached.pop() or hook.passing() or output is None:
            return None
        release(module)
        intercept(module, hook)
        return hook.answered(module, args, kwargs)

    intercept(network, hook)
    handles = [
        network.register_forward_pre_hook(before),
        network.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        release(network)
