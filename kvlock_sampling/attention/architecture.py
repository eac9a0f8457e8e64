"""How one family of models arranges its attention: all a lock must know of it, in one small declaration.

A built-in family is one file in `architectures/` with a constant `ARCHITECTURE`. For a model of your own, write the
same declaration and pass `sites=architecture.sites(model)`, or `register(architecture)` once and let it be found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from ..types import SiteError
from .sites import Site, Sites

Text = Literal["none", "first", "last"]


@dataclass(frozen=True)
class Architecture:
    """A family of diffusion transformers.

    name: what messages call it.
    classes: the network's classes as "package.module:Class". Nothing is imported: a class whose module was never
        imported cannot have instances.
    sites: patterns of the names of its self-attention modules, `*` standing for one component, in the order in which
        `layers=` counts them, e.g. ("blocks.*.attn1",). Cross-attention, refiners and text-only layers stay out.
    patch: (time, height, width) latents per token, or a function of the network that says so.
    text: where text tokens stand in the sequence of a site: "none" of them, "first", or "last".
    text_arguments: the arguments of the network's forward, (batch, length, dim), that become text tokens.
    site_patch: for networks whose layers have larger tokens than the first, as in a pyramid: a function of the network
        and a site's name that gives that layer's patch; None where it is `patch`.
    rows_apart: attention is called once for each row of the batch, one after another.
    axes: order of the latents' axes as the network takes them; a note for those who write a denoiser around it.
    """

    name: str
    classes: tuple[str, ...]
    sites: tuple[str, ...]
    patch: tuple[int, int, int] | Callable[[Any], Sequence[int]]
    text: Text = "none"
    text_arguments: tuple[str, ...] = ("encoder_hidden_states",)
    site_patch: Callable[[Any, str], Sequence[int] | None] | None = None
    rows_apart: bool = False
    axes: str = "b c t h w"

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is a network of this family."""
        known = []
        for entry in self.classes:
            file, _, name = entry.partition(":")
            if file in sys.modules:
                known.append(getattr(sys.modules[file], name, None))
        return isinstance(module, tuple(k for k in known if isinstance(k, type)))

    def find(self, module: nn.Module) -> Sites:
        """The sites of one network of this family.

        Raises:
            SiteError: a pattern names no module of it.
        """
        names = dict(module.named_modules())
        sites: list[Site] = []
        for pattern in self.sites:
            found = [name for name in names if _fits(name, pattern)]
            if not found:
                near = [name for name in names if name.rpartition(".")[2] == pattern.rpartition(".")[2]][:3]
                raise SiteError(
                    f"architecture {self.name!r}: no module of {type(module).__name__} is named {pattern!r}.\n"
                    f"  Modules of that last name: {', '.join(near) or 'none'}. "
                    "A pattern has one * for each number, e.g. 'blocks.*.attn1'."
                )
            for name in found:
                larger = None if self.site_patch is None else self.site_patch(module, name)
                sites.append(Site(name, names[name], self.text, None if larger is None else _three(larger)))
        return Sites(
            patch=_three(self.patch(module) if callable(self.patch) else self.patch),
            sites=tuple(sites),
            architecture=self.name,
            networks=(module,),
            text_arguments=self.text_arguments if self.text != "none" else (),
            rows_apart=self.rows_apart,
        )


def _three(patch: Sequence[int]) -> tuple[int, int, int]:
    t, h, w = (int(size) for size in patch)
    return t, h, w


def _fits(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


_registered: list[Architecture] = []


def register(architecture: Architecture) -> Architecture:
    """Let `find_sites`, and so every KVLock, know a family of models. The latest wins. Returns what it was given."""
    if not isinstance(architecture, Architecture):
        raise SiteError(
            f"register got a {type(architecture).__name__}; expected an Architecture, e.g.\n"
            '  Architecture("mine", ("my_package.model:MyDiT",), sites=("blocks.*.attn",), patch=(1, 2, 2))'
        )
    _registered.insert(0, architecture)
    return architecture


def architectures() -> tuple[Architecture, ...]:
    """Every family that is known now, the registered ones first."""
    from .architectures import BUILT_IN

    return (*_registered, *BUILT_IN)
