"""Hooks that exist only while a lock acts: for its own calls, in its own thread.

`hooks.acting(frame, call)` opens a door (see `doors.py`) at every layer, makes the call, and closes them. For the time a
layer runs its attention is watched (see `backends.py`). K and V are therefore seen after qk-norm and rotary embedding,
for fused and plain projections alike, whatever computes attention, compiled or not; everything else runs untouched.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..batching import NotBatchable
from ..types import AttentionError
from .compat.context_parallel import localiser, refuse_unknown
from .compat.torch_compile import anything_compiled, refuses_to_stop, warn_uncompiled, without_compiler
from .context import Frame
from .ending import end_if_seen, ending, may_end
from .foreground import ForegroundFrame, narrowing
from .forwards import Door, compiler_in_use, opened
from .interception import Rewrite, watching
from .interleaved import side_by_side
from .layers import AttentionLayer, AttentionLayers

T = TypeVar("T")


class Hooks:
    """The hooks of one run. They act inside `acting` and `frame`; otherwise there are none."""

    def __init__(self, layers: AttentionLayers) -> None:
        self.layers = layers
        self._worked = False
        self._uncompiled = False
        self._whole = False

    def acting(self, frame: Frame, call: Callable[[], T]) -> T:
        """Make a call of the model on which the layers act.

        Compiled code stops at the layers. Where it cannot, the call is made a second time without the compiler, and so
        are those that follow; a warning says so.

        Raises:
            AttentionError: no layer has fired in the whole run, or one does not fit.
        """
        if torch.is_grad_enabled() and any(getattr(n, "gradient_checkpointing", False) for n in self.layers.networks):
            raise AttentionError(
                "gradient checkpointing runs layers again in backward, where no lock acts: gradients would be wrong.\n"
                "  transformer.disable_gradient_checkpointing(), or sample under torch.no_grad()."
            )
        if not compiler_in_use():
            with self.frame(frame):
                return call()
        if not self._uncompiled:
            try:
                with self.frame(frame):
                    return call()
            except AttentionError:
                if not anything_compiled():
                    raise
                why = "a lock cannot reach into the compiled model"
            except Exception as error:
                if not refuses_to_stop(error):
                    raise
                why = "the model is compiled as a graph that must not break (fullgraph=True)"
            frame.fired.clear()
            frame.passed_over.clear()
        with without_compiler(), self.frame(frame):
            out = call()
        if not self._uncompiled:
            self._uncompiled = True
            warn_uncompiled(why)
        return out

    @contextmanager
    def frame(self, frame: Frame) -> Iterator[Frame]:
        """Let the layers act on calls made inside this block, from this thread.

        A layer that is skipped, say by a step cache, is not an error: `frame.fired` holds those that acted.

        Raises:
            AttentionError: on leaving, if no layer has fired in the whole run: the model never reached one.
        """
        try:
            with opened(self._doors(frame)):
                yield frame
        except NotBatchable:
            self._whole = True  # so it is with the next call, too
            raise
        self._worked = self._worked or bool(frame.fired)
        if not self._worked:
            raise AttentionError(self._never_fired(frame))

    def _never_fired(self, frame: Frame) -> str:
        layers = self.layers
        if layers.watch is None:
            return (
                f"none of the model's {len(layers.layers)} layers fired during this evaluation, so nothing was locked.\n"
                "  Is the model called through another copy (a replica, an exported graph)? Pass layers= of the module "
                "that really runs.\n"
                "  Or is attention computed by a kernel of the model's own? A lock sees "
                "F.scaled_dot_product_attention and every backend of diffusers: model.set_attention_backend('native')."
            )
        seen = ", ".join(f"{q} x {k}" for q, k in dict.fromkeys(frame.passed_over)) or "none"
        after = "any" if layers.trailing is None else layers.trailing
        chosen = "" if layers.calls is None else f", at calls {sorted(layers.calls)}"
        return (
            f"no attention call fitted, so nothing was locked. Expected {layers.start} + {frame.ratio.shape[1]} "
            f"video tokens + {after} after them{chosen}; other calls (query x key): {seen}.\n"
            "  Set start= and trailing= of sdpa_layers to the text tokens before and after the video, patch= to "
            "the model's patch size, layers= to calls that exist."
        )

    def _doors(self, frame: Frame) -> Iterator[Door]:
        layers = self.layers
        if layers.watch is not None:
            refuse_unknown(layers.watch)
            yield Door(layers.watch, around=_watched(functools.partial(self._rewrite_any, frame)))
        for network in layers.networks:
            # Also where there is no text to count. A network's forward is a loop over its blocks; the compiler gives up
            # for good on a function that has to stop inside a loop, and the user's own calls would be slower ever
            # after. So that function is not compiled while a lock acts. Blocks compiled by themselves stay compiled.
            yield Door(network, around=functools.partial(self._counting_text, frame, network))
        if isinstance(frame, ForegroundFrame) and frame.mode == "inject" and layers.flow is not None:
            for network, blocks in self._blocks:
                yield from narrowing(network, list(blocks), layers.flow, frame)
        if (
            frame.mode == "lockstep"
            and layers.rows_first
            and not (layers.rows_apart or self._whole or anything_compiled())
        ):
            for _, blocks in self._blocks:
                names = frozenset[str]().union(*blocks.values())
                if isinstance(frame, ForegroundFrame) and layers.flow is not None:
                    yield from side_by_side(names, blocks, layers.flow, frame)
                else:
                    yield from ending(names, blocks, frame)
        for layer in layers.layers:
            yield Door(layer.module, around=_watched(functools.partial(self._rewrite_site, layer, frame)))

    @cached_property
    def _blocks(self) -> list[tuple[nn.Module, dict[nn.Module, frozenset[str]]]]:
        """Of every network, its blocks with the names of the layers in each."""
        found = []
        for network in self.layers.networks:
            own = set(network.modules())
            found.append((network, {block: self._inside(block) for block in self.layers.blocks if block in own}))
        return found

    def _inside(self, block: nn.Module) -> frozenset[str]:
        parts = set(block.modules())
        return frozenset(layer.name for layer in self.layers.layers if layer.module in parts)

    def takes_both(self) -> bool:
        """Whether a lockstep call may take the source on all tokens and the edit on some, see `beside.py`."""
        return (
            self.layers.rows_first
            and self.layers.narrows
            and not self._whole
            and all(map(may_end, self.layers.networks))
        )

    def _counting_text(self, frame: Frame, network: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Note how many text tokens this call of the network has: its sequences hold them beside the video's."""
        if self.layers.text_arguments:
            # Of the class: offloading and caches replace the instance's forward, and may hide its signature.
            bound = inspect.signature(type(network).forward).bind_partial(network, *args, **kwargs).arguments
            given = [bound.get(name) for name in self.layers.text_arguments]
            frame.text = sum(text.shape[1] for text in given if isinstance(text, Tensor))
        return call(*args, **kwargs)

    def _rewrite_site(self, layer: AttentionLayer, frame: Frame) -> Rewrite:
        patch, extra = self.layers.patch, self.layers.extra
        t, h, w = (a // b for a, b in zip(layer.patch or patch, patch, strict=True))
        whole, rows = frame.ratio_at((t, h, w)), itertools.count()
        local = localiser(self.layers, layer, frame)

        def rewrite(
            query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            ratio, text = local(whole, key.shape[-2], frame.text)
            start = video_start(layer, key.shape[-2], frame.tokens or ratio.shape[1], text, extra)
            if self.layers.rows_apart:
                return *frame.process_row(layer.name, next(rows), key, value, start), mask
            used = frame.process(layer.name, key, value, start, ratio)
            end_if_seen(frame)
            return *used, frame.mask(mask, start, key.shape[-2])

        return rewrite

    def _rewrite_any(self, frame: Frame) -> Rewrite:
        calls = 0

        def rewrite(
            query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            nonlocal calls
            tokens, length = frame.ratio.shape[1], key.shape[-2]
            start, trailing = self.layers.start, self.layers.trailing
            rest = length - start - tokens
            if query.shape[-2] != length or not (rest == trailing or (trailing is None and rest >= 0)):
                frame.passed_over.append((query.shape[-2], length))
                return key, value, mask
            index, calls = calls, calls + 1
            if self.layers.calls is not None and index not in self.layers.calls:
                return key, value, mask
            return *frame.process(f"call.{index}", key, value, start), mask

        return rewrite


def _watched(make: Callable[[], Rewrite]) -> Any:
    def around(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if torch.jit.is_tracing():
            return call(*args, **kwargs)
        with watching(make()):
            return call(*args, **kwargs)

    return around


def video_start(layer: AttentionLayer, length: int, tokens: int, text: int | None, extra: tuple[int, int]) -> int:
    """Where the video's `tokens` begin in a sequence of `length`.

    `text` is how many text tokens the network was given (None: unknown), `extra` what else stands before and after.

    Raises:
        AttentionError: the sequence cannot be taken apart so.
    """
    before, after = extra
    rest = length - before - tokens - after
    fits = rest == 0 if layer.text == "none" else rest >= 0 if text is None else rest == text
    if layer.text == "last" and text is not None:
        fits = 0 <= rest <= text  # some models drop the padding of the text
    if fits:
        return before + (rest if layer.text == "first" else 0)
    parts = "" if layer.text == "none" else f" + {'its' if text is None else text} text tokens"
    others = "" if extra == (0, 0) else f" + {before + after} others"
    surplus = length - tokens - before - after - (text or 0)
    hint = (
        f"If {surplus} of them are reference frames or guides, say where they stand: "
        f"layers=kv.find_layers(model).with_extra(after={surplus})."
        if surplus > 0
        else "The mask's grid and the model's patches differ: check the latents' shape."
    )
    raise AttentionError(
        f"layer {layer.name!r} attends over {length} tokens; expected the mask's {tokens}{parts}{others}.\n  {hint}"
    )
