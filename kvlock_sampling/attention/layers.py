"""Which attention calls are locked: the self-attention layers over the video's tokens.

`find_layers(model)` finds them in a model of a known architecture; `sdpa_layers` watches the calls of any other model.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, NamedTuple

from torch import nn

from ..masks.tokens import Grid
from ..types import AttentionError
from ..utils.fields import as_patch, within


class Table(NamedTuple):
    """An argument of a block with one entry per token: a rotary table, or a modulation per token.

    Attributes:
        name: The argument. In a tensor the rows, or 1, come first; several tables without rows go as a tuple.
        axis: The axis of tokens.
        ndim: Only tensors with this number of axes; None for all.
        item: Only this item of a tuple that also holds the text's table; None for all.
    """

    name: str
    axis: int
    ndim: int | None = None
    item: int | None = None


@dataclass(frozen=True)
class TokenFlow:
    """How tokens pass through a network, so that some can be left out on the way.

    Attributes:
        leave: Name of the module after the blocks that takes all tokens, (rows, tokens, dim), as its first argument.
        tokens: The blocks' arguments (rows, tokens, ...) that hold the video's tokens.
        tables: The blocks' arguments with one entry per token. Entries of the text may stand before or after.
        supported: Tells whether a network of the family is built like this; None if every network is.
        interleaves: Whether source and edit may go through the blocks one after the other: a bool, or a function of the
            network. What a block takes or returns per row must have the rows as its first axis.
    """

    leave: str
    tokens: tuple[str, ...] = ("hidden_states",)
    tables: tuple[Table, ...] = ()
    supported: Callable[[Any], bool] | None = None
    interleaves: bool | Callable[[Any], bool] = True


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention module.

    Attributes:
        name: The module's name in the network.
        module: The module.
        text: Where text tokens stand in the layer's sequence: "none", "first" or "last".
        padded_to: Text and video are each padded at their end to a multiple of so many tokens.
    """

    name: str
    module: nn.Module = field(repr=False)
    text: str = "none"
    padded_to: int = 1

    def video_start(self, length: int, tokens: int, text: int | None, extra: tuple[int, int]) -> int:
        """The position of the first video token; raises AttentionError if the parts do not add up to `length`.

        `text` is the network's number of text tokens, None if unknown; `extra` as in `AttentionLayers`.
        """
        text = None if text is None else text + -text % self.padded_to
        before, after = extra[0], extra[1] + -tokens % self.padded_to
        rest = length - before - tokens - after
        fits = rest == 0 if self.text == "none" else rest >= 0 if text is None else rest == text
        if fits or (self.text == "last" and 0 <= rest <= (text or 0)):  # some models drop the padding of the text
            return before + (rest if self.text == "first" else 0)
        parts = "" if self.text == "none" else f" + {'its' if text is None else text} text tokens"
        others = f" + {before + after} others" if before + after else ""
        surplus = rest - (text or 0)
        hint = "The mask's grid and the model's patches differ: check the latents' shape."
        if surplus > 0:
            call = f"layers=kv.find_layers(model).with_extra(after={surplus})"
            hint = f"If {surplus} tokens are reference frames or guides, declare them: {call}, or before= if first."
        raise AttentionError(
            f"layer {self.name!r} attends over {length} tokens; expected the mask's {tokens}{parts}{others}.\n  {hint}"
        )


@dataclass(frozen=True)
class AttentionLayers:
    """The attention layers of one model that a lock acts on.

    Attributes:
        patch: Latents per token along (time, height, width).
        layers: The layers; empty for a watched module.
        watch: A module whose matching attention calls are the layers, in call order, as in `sdpa_layers`.
        start: As in `sdpa_layers`; `trailing` and `calls` likewise.
        architecture: Name of the architecture; `text_arguments`, `rows_apart` and `flow` are from its declaration.
        networks: The modules whose calls are one evaluation each: two if experts share a run.
        extra: Numbers of tokens before and after the video's that are neither text nor video, e.g. reference images.
        complete: Every layer of the model is in `layers`.
        blocks: By network, the modules that hold the layers, or are them; also of layers that are not locked.
    """

    patch: Grid
    layers: tuple[AttentionLayer, ...] = ()
    watch: nn.Module | None = field(default=None, repr=False)
    start: int = 0
    trailing: int | None = 0
    calls: frozenset[int] | None = None
    architecture: str = "generic"
    networks: tuple[nn.Module, ...] = field(default=(), repr=False)
    text_arguments: tuple[str, ...] = ()
    rows_apart: bool = False
    extra: tuple[int, int] = (0, 0)
    flow: TokenFlow | None = None
    complete: bool = True
    blocks: tuple[tuple[nn.Module, ...], ...] = field(default=(), repr=False)

    @property
    def narrows(self) -> bool:
        """Whether fully locked tokens can be left out of the network: every layer must be locked."""
        return self.flow is not None and self.complete and not self.rows_apart and self.extra == (0, 0)

    @property
    def interleaves(self) -> bool:
        """Whether source and edit may go through these networks block by block."""
        return self.narrows and self.flow is not None and bool(self.flow.interleaves)

    @property
    def per_network(self) -> int:
        """The number of layers in each network."""
        return len(self.layers) // max(1, len(self.networks))

    def select(self, chosen: Iterable[int] | slice | None) -> "AttentionLayers":
        """Keep layers by indices (negative: from the end) or a slice, the same of each expert; None keeps all.
        Raises AttentionError for an index out of range, if no layer is left, or for a watched module.
        """
        if chosen is None:
            return self
        if self.watch is not None:
            raise AttentionError("layers of a watched module are its calls; choose by kv.sdpa_layers(..., calls=[0]).")
        count = self.per_network
        asked = chosen.tolist() if hasattr(chosen, "tolist") else chosen  # an array of indices
        asked = range(count)[asked] if isinstance(asked, slice) else asked
        indices = list(asked) if isinstance(asked, Iterable) else [asked]
        if any(not isinstance(i, Integral) or isinstance(i, bool) for i in indices):
            raise AttentionError(f"layers={chosen!r}; expected indices or a slice, e.g. layers=range(8, 16), or None.")
        if (wrong := [i for i in indices if not -count <= i < count]) or not indices:
            raise AttentionError(
                f"layers={indices!r} names {wrong or 'no layer'}; this model has {count} layers, 0 to {count - 1}.\n"
                f"  Try layers=range({count // 2}, {count}) for the later half."
            )
        keep = {i % count for i in indices}
        kept = tuple(layer for n, layer in enumerate(self.layers) if n % count in keep)
        return replace(self, layers=kept, complete=self.complete and len(kept) == len(self.layers))

    def with_extra(self, *, before: int = 0, after: int = 0) -> "AttentionLayers":
        """The same layers in sequences that hold `before` + `after` other tokens around the video's, which never fuse.
        Raises AttentionError for a negative number.
        """
        if min(before, after) < 0:
            raise AttentionError(f"with_extra(before={before}, after={after}); expected counts of tokens >= 0.")
        if self.watch is not None:
            trailing = None if self.trailing is None else self.trailing + after
            return replace(self, start=self.start + before, trailing=trailing)
        return replace(self, extra=(self.extra[0] + before, self.extra[1] + after))

    def never_fired(self, tokens: int, passed_over: Sequence[tuple[int, int]]) -> str:
        """The message of a run in which no layer acted, with the lengths (query, key) of the calls that were seen."""
        if self.watch is None:
            return (
                f"none of the model's {len(self.layers)} attention layers fired in this evaluation.\n"
                "  If another copy of the model runs (a replica, an exported graph), pass layers= of that copy.\n"
                "  If a kernel of the model's own computes attention: model.set_attention_backend('native')."
            )
        if not passed_over and self.calls is None:
            return (
                "the network's forward never called F.scaled_dot_product_attention, so nothing was locked.\n"
                "  Its attention is computed in another way: by hand, by a kernel, or by nn.MultiheadAttention with "
                "need_weights=True,\n  which leaves that function out: call F.scaled_dot_product_attention(q, k, v).\n"
                "  Or another method of it was called: call the network itself, network(x, t)."
            )
        seen = ", ".join(f"{q} x {k}" for q, k in dict.fromkeys(passed_over)) or "none"
        after = "any" if self.trailing is None else self.trailing
        chosen = "" if self.calls is None else f", at calls {sorted(self.calls)}, counted from 0"
        return (
            f"no attention call fitted, so nothing was locked. Expected {self.start} + {tokens} video tokens + {after} "
            f"after them{chosen}; other calls (query x key): {seen}.\n"
            "  Set start=, trailing= (the numbers of tokens before and after the video's) or patch= of sdpa_layers."
        )


def sdpa_layers(
    module: nn.Module, *, patch: Grid, start: int = 0, trailing: int | None = 0, calls: Iterable[int] | None = None
) -> AttentionLayers:
    """The attention layers of any module that calls `F.scaled_dot_product_attention` on tokens in the order t, h, w.

    A call counts as a layer if queries and keys are `start` + the video's + `trailing` tokens long. This excludes
    cross-attention, unless its text has exactly as many tokens: then pad the text by one token, or name the calls.

    Args:
        module: The network.
        patch: Latents per token along (time, height, width), >= 1 each.
        start: Position of the first video token: 0 for video first, the text's length for text first.
        trailing: The number of tokens after the video's; None for any number.
        calls: Numbers of the calls to lock, counted from 0 in call order; None for all.

    Raises:
        AttentionError: `module` is no torch module, or a number is out of range.
    """
    if not isinstance(module, nn.Module):
        raise AttentionError(f"sdpa_layers watches a torch module; got {type(module).__name__}. Pass the network.")
    inner: Any = module
    while type(inner).__module__ == "kvlock_sampling.denoisers" and isinstance(inner.inner_model, nn.Module):
        inner = inner.inner_model
    if inner._compiled_call_impl is not None or hasattr(inner, "_orig_mod"):  # hooks around it would be compiled too
        module = getattr(inner, "_orig_mod", inner)
    if start < 0 or (trailing is not None and trailing < 0):
        raise AttentionError(f"start={start}, trailing={trailing}; expected counts of tokens >= 0, e.g. start=0.")
    chosen = None if calls is None else frozenset(calls if isinstance(calls, Iterable) else [calls])
    if wrong := [call for call in chosen or () if within(call, at_least=0, whole=True) is None]:
        raise AttentionError(f"calls={calls!r}: {wrong} count no call; expected whole numbers >= 0, e.g. calls=[0].")
    return AttentionLayers(as_patch(patch, AttentionError), watch=module, start=start, trailing=trailing, calls=chosen)
