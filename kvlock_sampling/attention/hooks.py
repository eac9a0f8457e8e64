"""Fuse K/V at the attention layers of a model, for single calls of it: install, call, remove.

While a layer runs, its attention call is intercepted (`interception.py`), so K and V are seen after qk-norm and rotary
embedding, whatever kernel computes attention. Calls of the model that do not come from a lock run untouched.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..types import AttentionError
from ..utils.modules import signature_of
from ..utils.threads import setting, without_compiler
from ..utils.warn import warn
from .compat.comfy import overridden
from .compat.context_parallel import local_piece, refuse_cut
from .compat.torch_compile import call_compiled
from .context import FusionContext, acting, current
from .foreground import interleaving, narrow_mask, narrowing
from .forward_hooks import ForwardHook, hooked, patched
from .interception import Fused, intercepted
from .layers import AttentionLayer, AttentionLayers

T = TypeVar("T")


class Hooks:
    """The hooks of one run. They exist only while `run` makes its call."""

    def __init__(self, layers: AttentionLayers) -> None:
        self.layers = layers
        self._most = 0  # layers that fired in one call
        self._acted: dict[int, int] = {}  # an interleaved source's attention calls, by an evaluation's first network
        self._leave_compiler_out = self._gradients = False

    @cached_property
    def plain(self) -> bool:
        """Whether a block may be called apart from its network: nothing counts on whole calls. Offloading, step caches,
        casting and most tools put hooks on modules; compiled code would be compiled once more.
        """
        return not any(_runs_more(module) for network in self.layers.networks for module in network.modules())

    @cached_property
    def watched(self) -> bool:
        """Whether a user's hooks (not torch's own, as FSDP's) or functions in the place of a forward see tokens."""
        parts = [part for blocks in self.layers.blocks for block in blocks for part in block.modules()]
        hooks = (hook for part in parts for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values()))
        own = ("torch.", __name__.partition(".")[0])
        foreign = any(not str(getattr(h, "__module__", "")).startswith(own) for h in hooks)
        return foreign or any(map(patched, (*parts, *self.layers.networks)))

    def run(self, context: FusionContext, call: Callable[[], T], *, may_skip: bool = False) -> T:
        """Make one call of the model in which the layers act on `context`; its record says which layers did.

        Raises AttentionError if no layer has fired in the run, or one is missing that no step cache `may_skip`.
        """
        self._gradients = torch.is_grad_enabled()

        def fused() -> T:
            context.record.clear()
            with setting(acting, context), hooked(self._forward_hooks(context)):
                return call()

        def acted() -> bool:
            return bool(self._most or context.record.fired)

        if self._leave_compiler_out:
            with without_compiler():
                out = fused()
        else:
            out, self._leave_compiler_out = call_compiled(fused, acted)
        if not acted():
            raise AttentionError(self.layers.never_fired(context.ratio.shape[1], context.record.passed_over))
        self._most = max(self._most, len(context.record.fired))
        if context.mode == "lockstep" and context.narrow:
            self._acted[context.record.first] = context.record.entered
        if context.mode != "capture" and not may_skip:
            self._check_all_fired(context)
        return out

    def _forward_hooks(self, context: FusionContext) -> Iterator[ForwardHook]:
        layers = self.layers
        if layers.watch is not None:
            refuse_cut(layers.watch)
            yield ForwardHook(layers.watch, around=self._watch)
        for network, blocks in zip(layers.networks, layers.blocks or [()] * len(layers.networks), strict=True):
            # Also without text to count: a network's forward is a loop over its blocks, and the compiler gives up for
            # good on a function that breaks inside a loop. Blocks that are compiled by themselves stay compiled.
            yield ForwardHook(network, around=partial(self._count_text, network))
            if (flow := layers.flow) is not None and context.narrow and context.mode != "capture":
                lockstep = context.mode == "lockstep"
                yield from interleaving(blocks, flow) if lockstep else narrowing(network, blocks, flow)
        for layer in layers.layers:
            yield ForwardHook(layer.module, around=partial(self._intercept, partial(self._fuse_layer, layer)))

    def _count_text(self, network: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Note how many rows, and text tokens beside the video's, this call of the network has."""
        context, names = current(), self.layers.text_arguments
        record = context.record
        record.first = record.first or id(network)
        if context.mode != "lockstep":
            record.entered = 0
        if context.narrowed is not None and any("controlnet" in n and v is not None for n, v in kwargs.items()):
            raise AttentionError("a ControlNet adds to all tokens, and only the edited ones run: foreground=False.")
        if kwargs.get("image_noise_mask") is not None:
            raise AttentionError("reference images come before the picture's tokens here: lock a call without them.")
        called = next((len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 2), 0)
        bound = signature_of(network).bind_partial(network, *args, **kwargs).arguments if names else {}
        text = sum(bound[name].shape[1] for name in names if isinstance(bound.get(name), Tensor)) if names else None
        # As in the evaluation before, a whole one at first. A checkpoint around the lock may run this one again.
        left = None if context.left is None or self._gradients else self._acted.get(record.first)
        with setting(acting, replace(context, text=text, called=called, left=left)):
            return call(*args, **kwargs)

    def _watch(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Intercept a call of the watched module. One that guides itself makes rows of its own: as many as in its x."""
        context = current()
        if context.rows is None:
            rows = next((len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1), None)
            context = replace(context, rows=rows)
        with setting(acting, context):
            return self._intercept(self._fuse_matching, call, args, kwargs)

    def _intercept(self, fuse: Callable[..., Fused], call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if torch.jit.is_tracing():  # the trace would keep fusing after the block
            return call(*args, **kwargs)
        calls = itertools.count()

        def checked(*given: Any) -> Fused:
            if self._gradients and _checkpointed():
                raise AttentionError(
                    "gradient checkpointing runs layers again in backward, where no lock acts: wrong gradients.\n"
                    "  transformer.disable_gradient_checkpointing(), or sample under torch.no_grad()."
                )
            return fuse(calls, *given)

        with intercepted(checked):
            return call(*args, **overridden(kwargs))

    def _fuse_layer(
        self, layer: AttentionLayer, calls: Iterator[int], query: Tensor, key: Tensor, value: Tensor, mask: Any
    ) -> Fused:
        context, length = current(), key.shape[-2]
        ratio, text = local_piece(self.layers, layer, context, length)
        tokens = ratio.shape[1] if context.narrowed is None else len(context.narrowed.computed)
        try:
            start = layer.video_start(length, tokens, text, self.layers.extra)
        except AttentionError:
            if query.shape[-2] == length or layer.name not in context.record.fired:
                raise
            context.record.passed_over.append((query.shape[-2], length))  # it attends to an image besides
            return key, value, mask
        if self.layers.rows_apart:
            clip, alone = next(calls) % len(ratio), replace(context, rows=None)
            return *alone.process(f"{layer.name}[{clip}]", key, value, start, ratio[clip : clip + 1]), mask
        if mask is not None and context.narrowed is not None:
            mask = narrow_mask(mask, context, start, length)
        return *context.process(layer.name, key, value, start, ratio), mask

    def _fuse_matching(self, calls: Iterator[int], query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Fused:
        layers, context, length = self.layers, current(), key.shape[-2]
        rest = length - layers.start - context.ratio.shape[1]
        fits = query.shape[-2] == length and (rest >= 0 if layers.trailing is None else rest == layers.trailing)
        number = next(calls) if fits else None
        if number is None or (layers.calls is not None and number not in layers.calls):
            context.record.passed_over.append((query.shape[-2], length))
            return key, value, mask
        return *context.process(f"call.{number}", key, value, layers.start, context.ratio), mask

    def _check_all_fired(self, context: FusionContext) -> None:
        """Warn of layers that were not locked; raise if the others computed the edited tokens only."""
        met, fired = {name.partition("[")[0] for name in context.record.turns}, context.record.fired
        expected = max(self.layers.per_network or self._most, len(met))
        if len(fired) >= expected:
            return
        silent = [layer.name for layer in self.layers.layers if layer.name not in fired][:3]
        text = (
            f"{len(fired)} of {expected} layers saw their attention{'; not ' * bool(silent)}{', '.join(silent)}. Is it "
            "computed by a kernel of the model's own, or was the layer skipped?"
        )
        if self.layers.watch is not None and not fired and context.record.passed_over:
            text = self.layers.never_fired(context.ratio.shape[1], context.record.passed_over)
        if context.narrow:
            raise AttentionError(
                f"{text} With only the edited tokens computed such a layer misses the rest.\n"
                "  Pass foreground=False to KVLock, or lock only layers that can be seen: layers=[...]."
            )
        warn(f"{text} The others are not locked.")


def _checkpointed() -> bool:
    """Whether a checkpoint of the network's own, not one around the lock, runs this."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not Hooks.run.__code__:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


def _runs_more(module: nn.Module) -> bool:
    """Whether a call of this very module runs more than the forward of its class: compiled code or hooks."""
    own = vars(module)
    compiled = module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
    # The registry of diffusers stays when its hooks are removed.
    registered = getattr(own["_diffusers_hook"], "hooks", True) if "_diffusers_hook" in own else ()
    hooks = module._forward_hooks or module._forward_pre_hooks or own.get("_hf_hook") or registered
    return bool(compiled or hooks or patched(module))
