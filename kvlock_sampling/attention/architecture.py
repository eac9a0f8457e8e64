"""The declaration of one family of models: where its attention layers, tokens and text are.

Pass `layers=architecture.find(network)`, or call `register(architecture)` once; `testing.check_layers` tests one.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from ..masks.tokens import Grid
from ..types import AttentionError
from ..utils.fields import as_patch
from ..utils.modules import signature_of, unhooked
from .layers import AttentionLayer, AttentionLayers, TokenFlow

Text = Literal["none", "first", "last"]


def config_patch(network: Any) -> Grid:
    """The patch by the config of a diffusers network: `patch_size`, three sizes or one, and `patch_size_t`."""
    config = getattr(network, "config", None)
    size, time = (getattr(config, name, None) for name in ("patch_size", "patch_size_t"))
    return as_patch((time or 1, size, size) if isinstance(size, int) else size, AttentionError)


@dataclass(frozen=True)
class LayerPattern:
    """A pattern of layer names that differ from the other layers of their architecture.

    Attributes:
        pattern: As in `Architecture.layers`.
        text: Where text stands in these layers; None: as in the architecture.
        optional: Some members of the family have no such layers.
    """

    pattern: str
    text: Text | None = None
    optional: bool = False


ATTN1 = ("transformer_blocks.*.attn1",)
DOUBLE_AND_SINGLE = ("transformer_blocks.*.attn", LayerPattern("single_transformer_blocks.*.attn", optional=True))
"""The layers of networks built like FLUX."""


@dataclass(frozen=True)
class Architecture:
    """A family of diffusion transformers. Raises AttentionError for a `text` or a patch of another form, or no tuple.

    Attributes:
        name: The name in messages.
        classes: The network's classes as "package.module:Class"; `*` stands for any text. Subclasses match too.
        layers: Name patterns of the self-attention modules, without cross-attention, refiners and text-only layers, in
            the order of their indices; `*` stands for one component, e.g. ("blocks.*.attn1",). Or `LayerPattern`s.
        patch: Latents per token along (time, height, width), or a function of the network that returns them. Default:
            what the network's config says, see `config_patch`.
        text: Where text tokens stand in the sequence of a layer: "none", "first" or "last".
        text_arguments: Arguments of the network's forward, (batch, length, dim), that become text tokens; () is all.
        rows_apart: Attention is called for each row of the batch separately.
        flow: How locked tokens can be left out of the network; None if they cannot.
        padding: The network's attribute that says to a multiple of how many tokens text and video are padded, if any.
    """

    name: str
    classes: tuple[str, ...]
    layers: tuple[str | LayerPattern, ...]
    patch: Grid | Callable[[Any], Sequence[int]] = config_patch
    text: Text = "none"
    text_arguments: tuple[str, ...] = ("encoder_hidden_states",)
    rows_apart: bool = False
    flow: TokenFlow | None = None
    padding: str = ""

    def __post_init__(self) -> None:
        for name in ("classes", "layers", "text_arguments"):
            if isinstance(given := getattr(self, name), str):
                raise AttentionError(f"{self.name}: {name}={given!r} is one string; expected a tuple, ({given!r},).")
        if wrong := [name for name in self.classes if ":" not in str(name)]:
            raise AttentionError(f'{self.name}: classes={wrong[0]!r}; expected the name "package.module:Class".')
        for text in (self.text, *(s.text for s in self.layers if isinstance(s, LayerPattern) and s.text is not None)):
            if text not in ("none", "first", "last"):
                raise AttentionError(f'Architecture({self.name!r}): text={text!r}; expected "none", "first" or "last".')
        if not callable(self.patch):
            as_patch(self.patch, AttentionError)

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is a network of this family."""
        lineage = [f"{kind.__module__}:{kind.__qualname__}" for kind in type(module).__mro__]
        return any(fnmatchcase(kind, entry) for kind in lineage for entry in self.classes)

    def find(self, module: nn.Module) -> AttentionLayers:
        """The layers of `module`, one network of this family. Raises AttentionError if a pattern names no module."""
        names = {n.replace("._orig_mod", ""): part for n, part in module.named_modules()}  # of compiled blocks
        layers: list[AttentionLayer] = []
        wrapped, padded_to = False, (getattr(module, self.padding, None) or 1) if self.padding else 1
        for given in self.layers:
            pattern = LayerPattern(given) if isinstance(given, str) else given
            wanted, paths = pattern.pattern.split("."), {name: name.split(".") for name in names}
            held = {n: (*path[: len(wanted) - 1],) for n, path in paths.items() if len(path) >= len(wanted)}
            fits = [n for n, block in held.items() if all(map(fnmatchcase, (*block, paths[n][-1]), wanted))]
            # A block may be inside a module of a user's, where its layer lies deeper. It is known by the class of other
            # blocks, or where all are inside such modules, by being the only module there.
            inner, count = {n: names[n.rpartition(".")[0]] for n in fits}, Counter(held[n] for n in fits)
            kinds = {type(inner[n]) for n in fits if len(paths[n]) == len(wanted)}
            alone = {n for n in fits if len([*names[".".join(held[n])].children()]) == 1}
            deep = {n for n in fits if count[held[n]] == 1 and (type(inner[n]) in kinds if kinds else n in alone)}
            found = [n for n in fits if len(paths[n]) == len(wanted) or n in deep]
            wrapped |= any(len(paths[n]) > len(wanted) for n in found)
            layers += [AttentionLayer(name, names[name], pattern.text or self.text, padded_to) for name in found]
            if not found and (not pattern.optional or (not layers and given is self.layers[-1])):
                near = [f"{n} ({type(names[n]).__name__})" for n in names if paths[n][-1] == wanted[-1]]
                raise AttentionError(
                    f"architecture {self.name!r}: no module of {type(module).__name__} is named {pattern.pattern!r}.\n"
                    f"  Modules of that last name: {', '.join(near[:3]) or 'none'}. "
                    "A pattern has one * for each number, e.g. 'blocks.*.attn1'."
                )
        holders = [(layer.module, names[layer.name.rpartition(".")[0]]) for layer in layers]
        blocks = dict.fromkeys(m if isinstance(held, nn.ModuleList | nn.ModuleDict) else held for m, held in holders)
        flow = self.flow if self.flow and (self.flow.supported is None or self.flow.supported(module)) else None
        if flow is not None:
            named, tables = [signature_of(block).parameters.keys() for block in blocks], {t.name for t in flow.tables}
            shown = all(not names.isdisjoint(flow.tokens) and (not tables or tables & names) for names in named)
            # Answered for this network, because functions of it cannot be pickled.
            interleaves = flow.interleaves(module) if callable(flow.interleaves) else flow.interleaves
            if flow.leave not in dict(module.named_modules(remove_duplicate=False)):
                raise AttentionError(f"architecture {self.name!r}: no module is named {flow.leave!r}, as flow= says.")
            # Code around a block, or in the place of one, may need all tokens, as may a user's in a class of diffusers.
            wrapped |= self.classes[0].startswith("diffusers.") and _runs_foreign_code(module, blocks)
            flow = replace(flow, supported=None, interleaves=interleaves) if shown and not wrapped else None
        return AttentionLayers(
            patch=as_patch(self.patch(module) if callable(self.patch) else self.patch, AttentionError),
            layers=tuple(layers),
            architecture=self.name,
            networks=(module,),
            text_arguments=self.text_arguments if any(layer.text != "none" for layer in layers) else (),
            rows_apart=self.rows_apart,
            blocks=(tuple(blocks),),
            flow=flow,
        )


def _runs_foreign_code(network: nn.Module, blocks: Iterable[nn.Module]) -> bool:
    """Whether network, blocks or attention processors run code of neither diffusers nor torch; linear ones may."""
    parts: list[Any] = [network, *(m for block in blocks for m in block.modules() if not hasattr(m, "in_features"))]
    for part in (*parts, *(m.processor for m in parts if getattr(m, "processor", None) is not None)):
        kind = unhooked(type(part))
        code = getattr(kind, "forward", kind.__call__)
        homes = getattr(code, "__module__", ""), getattr(code, "__globals__", {}).get("__name__")  # where it was made
        if any(str(home).partition(".")[0] not in ("diffusers", "torch") for home in homes):
            return True
    return False
