"""Which attention calls are layers: self-attention over the video's tokens, found per architecture.

`find_layers(model)` looks through the model for a family it knows, see `architecture.py`. For anything else use
`sdpa_layers`, which watches the calls of `torch.nn.functional.scaled_dot_product_attention` themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..masks.tokens import token_grid
from ..types import AttentionError
from ..utils.modules import reachable_modules
from .compat.context_parallel import is_cut
from .foreground import TokenFlow

Patch = tuple[int, int, int]


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention module. `text` says where text tokens stand in its sequence: "none", "first" or "last".

    `patch` is set where this layer's tokens are larger than the model's, as in a pyramid.
    """

    name: str
    module: nn.Module
    text: str = "none"
    patch: Patch | None = None


@dataclass(frozen=True)
class AttentionLayers:
    """The layers of one model. `patch` is the patch size (time, height, width) that turns latents into tokens.

    `networks` are the modules whose calls are one evaluation each: two where experts share a run; `text_arguments`
    name what becomes text tokens there. `extra` counts tokens that stand before and after the video's and are neither
    text nor video, e.g. reference images.

    `flow` says how tokens may be left out on the way, None where that is unknown; `whole` is False where only some of
    the layers are layers. `blocks` are the modules that hold them, and those whose layers are not locked; for
    `rows_first` see `Architecture`.

    With `watch` set there is no list: every matching attention call inside that module is a layer, numbered in call
    order (the generic route), and `select` picks among the numbers.
    """

    patch: Patch
    layers: tuple[AttentionLayer, ...] = ()
    watch: nn.Module | None = None
    start: int = 0
    trailing: int | None = 0
    calls: frozenset[int] | None = None
    architecture: str = "generic"
    networks: tuple[nn.Module, ...] = ()
    text_arguments: tuple[str, ...] = ()
    rows_apart: bool = False
    extra: tuple[int, int] = (0, 0)
    flow: TokenFlow | None = None
    whole: bool = True
    blocks: tuple[nn.Module, ...] = ()
    rows_first: bool = False

    @property
    def narrows(self) -> bool:
        """Whether fully locked tokens can be left out of the network: every layer must be locked, and alike."""
        alike = all(s.patch is None for s in self.layers)
        apart = self.rows_apart or is_cut(self.networks)
        return self.flow is not None and self.whole and alike and not apart and self.extra == (0, 0)

    def select(self, chosen: Iterable[int] | slice | None) -> AttentionLayers:
        """Keep only some layers: indices (negative ones count from the end) or a slice. None keeps all.

        Of a model of several experts the same layers of each are kept.

        Raises:
            AttentionError: an index is out of range, or nothing is left.
        """
        if chosen is None:
            return self
        if not isinstance(chosen, slice):
            chosen = _indices(chosen)
        if self.watch is not None:
            if isinstance(chosen, slice):
                raise AttentionError(
                    "layers of a generic model are known only as calls; give indices: layers=[0, 1, 2]."
                )
            return replace(self, calls=frozenset(chosen))
        experts = max(1, len(self.networks))
        count = len(self.layers) // experts
        indices = range(count)[chosen] if isinstance(chosen, slice) else chosen
        wrong = [i for i in indices if not -count <= i < count]
        if wrong or not len(indices):
            raise AttentionError(
                f"layers={chosen!r} names {wrong or 'no layer'}; this model has {count} layers, 0 to {count - 1}.\n"
                f"  Try layers=range({count // 2}, {count}) for the later half."
            )
        keep = sorted({i % count for i in indices})
        kept = tuple(self.layers[e * count + i] for e in range(experts) for i in keep)
        return replace(self, layers=kept, whole=len(kept) == len(self.layers))

    def with_extra(self, *, before: int = 0, after: int = 0) -> AttentionLayers:
        """The same layers where other tokens stand beside the video's, e.g. appended reference images. They are never
        touched, in the source's pass neither.
        """
        if min(before, after) < 0:
            raise AttentionError(f"with_extra(before={before}, after={after}); expected counts of tokens >= 0.")
        if self.watch is not None:
            trailing = None if self.trailing is None else self.trailing + after
            return replace(self, start=self.start + before, trailing=trailing)
        return replace(self, extra=(before, after))

    def grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """Tokens along (time, height, width) for latents of a shape; see `grid.token_grid`.

        Raises:
            AttentionError: the shape has no such tokens.
        """
        for layer in self.layers:
            if layer.patch is not None:
                token_grid(latent_shape, layer.patch)
        return token_grid(latent_shape, self.patch)


def _indices(chosen: Any) -> list[int]:
    try:
        indices = list(chosen)
    except TypeError:
        indices = [chosen]
    if isinstance(chosen, str) or any(not isinstance(i, int) or isinstance(i, bool) for i in indices):
        raise AttentionError(
            f"layers={chosen!r}; expected indices or a slice, e.g. layers=range(8, 16), layers=[0, -1], "
            "layers=slice(None, 10), or None for all of them."
        )
    return indices


def sdpa_layers(
    module: nn.Module,
    *,
    patch: Patch,
    start: int = 0,
    trailing: int | None = 0,
    layers: Iterable[int] | None = None,
) -> AttentionLayers:
    """AttentionLayers of any module that calls `F.scaled_dot_product_attention`, with tokens in the order time, height, width.

    A call is a layer when its key sequence holds exactly `start` tokens, the video's, and `trailing` tokens, and the
    query sequence is as long. So cross-attention is left alone, unless its text has exactly as many tokens: it cannot
    be told apart then and is locked too; pad or cut the text by one token, or name the calls by `layers`.

    `patch` is the patch size (time, height, width) in latents, >= 1 each, that turns latents into tokens.
    `start` is the position of the first video token: 0 for video first, the length of the text for text first.
    `trailing` is what follows the video, None = any number. `layers`: which of these calls, counted in call order
    from 0; None = all.

    Raises:
        AttentionError: not a module, or numbers that cannot be meant.
    """
    if not isinstance(module, nn.Module):
        raise AttentionError(
            f"sdpa_layers watches a torch module; got {type(module).__name__}. Pass the network itself."
        )
    if len(patch) != 3 or min(patch) < 1 or start < 0 or (trailing is not None and trailing < 0):
        raise AttentionError(
            f"sdpa_layers(patch={patch}, start={start}, trailing={trailing}); expected patch=(time, height, width) of "
            "whole numbers >= 1, and counts of tokens >= 0, e.g. patch=(1, 2, 2), start=0."
        )
    select = None if layers is None else frozenset(layers)
    return AttentionLayers(patch=patch, watch=module, start=start, trailing=trailing, calls=select)


def find_layers(model: Any) -> AttentionLayers:
    """Find the attention layers of a model, or of a network wrapped in it.

    Looks at the model and everything a wrapper may hold: attributes `inner_model`, `model`, `transformer`,
    `transformer_2`, `module`, submodules, and what a plain function closes over. Two networks of one family, such as
    the experts of Wan 2.2, are locked alike.

    Raises:
        AttentionError: no known architecture; says what was seen and what to pass instead.
    """
    from .architecture import architectures

    known, seen, found = architectures(), [], []
    inside: set[int] = set()
    for module in reachable_modules(model):
        if id(module) in inside:
            continue
        family = next((a for a in known if a.matches(module)), None)
        if family is None:
            seen.append(type(module).__name__)
            continue
        found.append(family.find(module))
        inside.update(id(part) for part in module.modules())
    if found:
        return _together(found)
    looked = ", ".join(dict.fromkeys(seen)) if seen else f"{type(model).__name__} (no torch module inside)"
    families = ", ".join(dict.fromkeys(c.partition(":")[2] for a in known for c in a.classes))
    raise AttentionError(
        f"no attention layers found in {looked[:400]}.\n"
        f"  Known architectures: {families}.\n"
        "  For another model whose attention calls F.scaled_dot_product_attention say where its tokens are:\n"
        "    KVLock(model, ..., layers=kv.sdpa_layers(transformer, patch=(1, 2, 2), start=0))\n"
        "  or declare it: kv.Architecture(...).find(transformer).\n"
        "  For control of guidance alone, without a source: KVLock(model, policy=...)."
    )


def _together(found: list[AttentionLayers]) -> AttentionLayers:
    """The layers of several networks, e.g. experts, as those of one model: only networks built like the first count."""
    first = found[0]
    alike = [
        f
        for f in found
        if (f.architecture, f.patch, len(f.layers)) == (first.architecture, first.patch, len(first.layers))
    ]
    if len(alike) == 1:
        return first
    layers = [replace(s, name=f"{i}.{s.name}") for i, f in enumerate(alike) for s in f.layers]
    blocks = tuple(block for f in alike for block in f.blocks)
    return replace(first, layers=tuple(layers), networks=tuple(f.networks[0] for f in alike), blocks=blocks)
