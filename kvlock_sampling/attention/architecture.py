"""How one family of models arranges its attention: all a lock must know of it, in one small declaration.

A built-in family is one file in `architectures/` with a constant `ARCHITECTURE`. For a model of your own, write the
same declaration and pass `layers=architecture.find(network)`, or `register(architecture)` once and let it be found.
`kvlock_sampling.testing.check_layers` says whether a declaration is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from ..types import AttentionError
from .foreground import TokenFlow
from .layers import AttentionLayer, AttentionLayers, Patch

Text = Literal["none", "first", "last"]


@dataclass(frozen=True)
class LayerPattern:
    """A pattern of layer names that is not like the others of its architecture.

    pattern: as in `Architecture.layers`.  text: where text stands in these layers; None: as everywhere.
    kind: only modules of this class name, where layers of one name differ, e.g. in global and windowed attention.
    optional: smaller members of the family have no such layers.
    """

    pattern: str
    text: Text | None = None
    kind: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Architecture:
    """A family of diffusion transformers.

    name: what messages call it.
    classes: the network's classes, by the module that defines them, as "package.module:Class"; `*` stands for anything,
        e.g. for where a copy was put. A subclass is of the family too. Nothing is imported.
    layers: patterns of the names of its self-attention modules, `*` standing for one component, in the order in which
        `layers=` counts them, e.g. ("blocks.*.attn1",); or `Layers`, which say more. Cross-attention, refiners and
        text-only layers stay out.
    patch: (time, height, width) latents per token, or a function of the network that says so.
    text: where text tokens stand in the sequence of a layer: "none" of them, "first", or "last".
    text_arguments: the arguments of the network's forward, (batch, length, dim), that become text tokens. Empty where
        none has that form: then whatever is not video counts as text.
    layer_patch: for networks whose layers have larger tokens than the first, as in a pyramid: a function of the network
        and a layer's name that gives that layer's patch; None where it is `patch`.
    rows_apart: attention is called once for each row of the batch, one after another.
    rows_first: whatever a block is given or returns for each row of the batch has the rows as its first axis, and no
        other tensor is as long there; or a function of the network that says so. The source's rows then leave a call
        early, see `ending.py`.
    axes: order of the latents' axes as the network takes them; a note for those who write a denoiser around it.
    flow: how locked tokens may be left out of the network; None: they are not. See `foreground.TokenFlow`.
    """

    name: str
    classes: tuple[str, ...]
    layers: tuple[str | LayerPattern, ...]
    patch: Patch | Callable[[Any], Sequence[int]]
    text: Text = "none"
    text_arguments: tuple[str, ...] = ("encoder_hidden_states",)
    layer_patch: Callable[[Any, str], Sequence[int] | None] | None = None
    rows_apart: bool = False
    rows_first: bool | Callable[[Any], bool] = False
    axes: str = "b c t h w"
    flow: TokenFlow | None = None

    def __post_init__(self) -> None:
        for name in ("classes", "layers", "text_arguments"):
            if isinstance(getattr(self, name), str):
                given = getattr(self, name)
                raise AttentionError(
                    f"Architecture({self.name!r}): {name}={given!r} is one string; expected a tuple, "
                    f"{name}=({given!r},)"
                )
        places = [self.text, *(s.text for s in self.layers if isinstance(s, LayerPattern) and s.text is not None)]
        wrong = [place for place in places if place not in ("none", "first", "last")]
        if wrong:
            raise AttentionError(
                f'Architecture({self.name!r}): text={wrong[0]!r}; expected "none", "first" or "last": where text '
                "tokens stand in the sequences that the layers attend over."
            )

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is a network of this family."""
        lineage = [f"{kind.__module__}:{kind.__qualname__}" for kind in type(module).__mro__]
        return any(fnmatchcase(kind, entry) for kind in lineage for entry in self.classes)

    def find(self, module: nn.Module) -> AttentionLayers:
        """The layers of one network of this family.

        Raises:
            AttentionError: a pattern names no module of it.
        """
        names = dict(module.named_modules())
        layers: list[AttentionLayer] = []
        for given in self.layers:
            pattern = LayerPattern(given) if isinstance(given, str) else given
            found = [name for name in names if _fits(name, pattern.pattern) and _is_kind(names[name], pattern.kind)]
            if not found and not pattern.optional:
                raise AttentionError(self._nothing(module, pattern, names))
            for name in found:
                larger = None if self.layer_patch is None else self.layer_patch(module, name)
                text = pattern.text or self.text
                layers.append(AttentionLayer(name, names[name], text, None if larger is None else _three(larger)))
        if not layers:
            raise AttentionError(self._nothing(module, pattern, names))
        joint = any(layer.text != "none" for layer in layers)
        rows_first = self.rows_first(module) if callable(self.rows_first) else self.rows_first
        return AttentionLayers(
            patch=_three(self.patch(module) if callable(self.patch) else self.patch),
            layers=tuple(layers),
            architecture=self.name,
            networks=(module,),
            text_arguments=self.text_arguments if joint else (),
            rows_apart=self.rows_apart,
            rows_first=rows_first,
            blocks=tuple(names[parent] for parent in dict.fromkeys(s.name.rpartition(".")[0] for s in layers)),
            flow=self.flow if self.flow is None or self.flow.supported is None or self.flow.supported(module) else None,
        )

    def _nothing(self, module: nn.Module, layers: LayerPattern, names: Mapping[str, nn.Module]) -> str:
        last = layers.pattern.rpartition(".")[2]
        near = [f"{n} ({type(names[n]).__name__})" for n in names if n.rpartition(".")[2] == last]
        kind = "" if layers.kind is None else f" and is a {layers.kind}"
        return (
            f"architecture {self.name!r}: no module of {type(module).__name__} is named {layers.pattern!r}{kind}.\n"
            f"  Modules of that last name: {', '.join(near[:3]) or 'none'}. "
            "A pattern has one * for each number, e.g. 'blocks.*.attn1'."
        )


def _three(patch: Sequence[int]) -> Patch:
    t, h, w = (int(size) for size in patch)
    return t, h, w


def _fits(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _is_kind(module: nn.Module, kind: str | None) -> bool:
    return kind is None or type(module).__name__ == kind


_registered: list[Architecture] = []


def register(architecture: Architecture) -> Architecture:
    """Let `find_layers`, and so every KVLock, know a family of models. Returns `architecture`; the latest wins."""
    if not isinstance(architecture, Architecture):
        raise AttentionError(
            f"register got a {type(architecture).__name__}; expected an Architecture, e.g.\n"
            '  Architecture("mine", ("my_package.model:MyDiT",), layers=("blocks.*.attn",), patch=(1, 2, 2))'
        )
    _registered.insert(0, architecture)
    return architecture


def architectures() -> tuple[Architecture, ...]:
    """Every family that is known now, the registered ones first."""
    from .architectures import BUILT_IN

    return (*_registered, *BUILT_IN)
