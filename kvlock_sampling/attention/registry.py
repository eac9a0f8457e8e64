"""The known architectures, and the search for their attention layers in a model."""

from dataclasses import replace
from typing import Any

from torch import nn

from ..types import AttentionError
from ..utils.modules import reachable_modules
from .architecture import Architecture
from .architectures import BUILT_IN
from .layers import AttentionLayers

_registered: list[Architecture] = []


def register(architecture: Architecture) -> Architecture:
    """Add a family to those that `find_layers`, and so KVLock, knows, ahead of the others; returns the declaration.
    Raises AttentionError for anything else.
    """
    if not isinstance(architecture, Architecture):
        raise AttentionError(
            f"register got a {type(architecture).__name__}; expected an Architecture, e.g.\n"
            '  Architecture("mine", ("my_package.model:MyDiT",), layers=("blocks.*.attn",), patch=(1, 2, 2))'
        )
    _registered.insert(0, architecture)
    return architecture


def find_layers(model: Any) -> AttentionLayers:
    """Find the attention layers of a model, or of a network wrapped in it.

    The search covers submodules, the attributes `inner_model`, `model`, `transformer`, `transformer_2` and `module` of
    wrappers, and closures of functions. Two networks of one family, such as the experts of Wan 2.2, are locked alike.

    Args:
        model: A denoiser, a network, or a function around one.

    Raises:
        AttentionError: No known architecture was found.
    """
    known, seen, found, inside = (*_registered, *BUILT_IN), [], [], set[nn.Module]()
    for module in reachable_modules(model):
        if module in inside:
            continue
        if family := next((a for a in known if a.matches(module)), None):
            found.append(family.find(module))
            inside.update(module.modules())
        else:
            seen.append(type(module).__name__)
    if found:  # networks that are built like the first, e.g. experts, count as one model
        first, *_ = built = [(f.architecture, f.patch, len(f.layers)) for f in found]
        alike = [f for f, like in zip(found, built, strict=True) if like == first]
        if len(alike) == 1:
            return found[0]
        layers = tuple(replace(layer, name=f"{i}.{layer.name}") for i, f in enumerate(alike) for layer in f.layers)
        blocks = tuple(block for f in alike for block in f.blocks)
        return replace(found[0], layers=layers, networks=tuple(f.networks[0] for f in alike), blocks=blocks)
    looked = ", ".join(dict.fromkeys(seen)) or f"{type(model).__name__} (no torch module inside)"
    families = ", ".join(dict.fromkeys(c.partition(":")[2] for a in known for c in a.classes))
    raise AttentionError(
        f"no attention layers found in {looked[:400]}.\n  Known architectures: {families}.\n"
        "  For another model that calls F.scaled_dot_product_attention, say where its tokens are:\n"
        "    KVLock(model, ..., layers=kv.sdpa_layers(transformer, patch=(1, 2, 2), start=0))\n"
        "  or declare it: kv.attention.Architecture(...). If the model holds a known one elsewhere:\n"
        "    KVLock(model, ..., layers=kv.find_layers(transformer))\n"
        "  For control of guidance alone: KVLock(model, policy=...)."
    )
