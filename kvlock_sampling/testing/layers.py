"""`check_layers`: test the attention layers of a network, and what a lock promises there."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..attention import AttentionLayers, find_layers
from ..types import AttentionError, Denoiser, KVLockError
from ..utils.denoiser import parameters_of
from ._promises import Promises, some


def check_layers(
    denoiser: Denoiser,
    x: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    *,
    layers: AttentionLayers | None = None,
    expected: int | None = None,
    sigma: float | Sequence[float] = 0.7,
    half: torch.dtype | None = torch.bfloat16,
) -> None:
    """Test that a network can be locked: its layers are where the declaration says, and a lock keeps its promises.

    Tested in this order:

    - the denoiser answers the same twice, and a clip alone like a clip in a batch;
    - every layer runs, and if one token of the latents changes, the keys and values that change most are its own;
    - off is identical bit for bit, inside the block and after it, and no hook stays on any module;
    - at lock 1 the background's keys and values are exactly the source's, and the edit's own elsewhere;
    - with the source's own noise and prompt a lock changes nothing; with another source it changes something;
    - the source and guidance give the same in one call and in passes of their own;
    - clips with different masks and locks come out as they do alone, also if fully locked tokens are left out.

    >>> check_layers(denoiser, x, {"cond": text}, expected=30)  # doctest: +SKIP

    Args:
        denoiser: As for KVLock, `denoiser(x, sigma, **extra_args)`.
        x: Example latents as the sampler has them, of two clips or more and two tokens or more.
        extra_args: Arguments of a call; entries per clip have the batch first. With `cond`, guidance is tested too.
        layers: The layers to test. Defaults to those that are found.
        expected: How many layers one evaluation should fuse. Defaults to as many as run for the source.
        sigma: Noise levels > 0 to test at, for a model with several experts one for each. Defaults to 0.7.
        half: A torch module is also tested in this precision, unless it is None. Defaults to bfloat16.

    Raises:
        AttentionError: Names the broken promise, what was seen, and what to change.
    """
    extra_args = dict(extra_args or {})
    if "cond" in extra_args and not {"uncond", "cond_scale"} & parameters_of(denoiser).keys():
        extra_args = {k: v for k, v in extra_args.items() if k not in ("uncond", "cond_scale")}
    levels = [float(s) for s in (sigma if isinstance(sigma, Sequence) else [sigma])]
    if x.ndim < 3 or len(x) < 2 or not x.is_floating_point():
        given = f"x of shape {tuple(x.shape)}, {x.dtype}"
        raise AttentionError(f"{given}; expected floating latents of two clips or more, like randn(2, 16, 3, 8, 8).")
    layers = layers or find_layers(denoiser)
    _answers(denoiser, x, extra_args, levels[0])
    precisions: list[tuple[Denoiser, AttentionLayers, Tensor, dict[str, Any]]] = [(denoiser, layers, x, extra_args)]
    if half is not None and isinstance(denoiser, nn.Module):
        other, its_layers = copy.deepcopy((denoiser, layers))
        arguments = tree_map(lambda v: v.to(half) if isinstance(v, Tensor) and v.is_floating_point() else v, extra_args)
        precisions.append((other.to(half), its_layers, x.to(half), arguments))
        try:
            _call(other, x.to(half), arguments, levels[0])
        except RuntimeError as error:
            raise AttentionError(
                f"a copy of the denoiser in {half} fails: {str(error).splitlines()[0]}\n  Cast time and text to the "
                "weights' dtype, or give check_layers(..., half=None)."
            ) from error
    with torch.no_grad():
        for index, (model, its_layers, latents, arguments) in enumerate(precisions):
            fired: set[str] = set()
            for level in levels:
                fired |= Promises(model, its_layers, latents, arguments, level).keep(expected, all_of_them=index == 0)
            if silent := [layer.name for layer in its_layers.layers if layer.name not in fired]:
                raise AttentionError(
                    f"{len(silent)} of {len(its_layers.layers)} layers never ran at sigma={levels}: {some(silent)}.\n"
                    "  Leave them out, or give a noise level of each expert: check_layers(..., sigma=(8.0, 0.5))."
                )


def _answers(denoiser: Denoiser, x: Tensor, extra_args: dict[str, Any], level: float) -> None:
    """Call the model once first, to separate user errors from broken promises."""
    names = "".join(f", {name}=" for name in extra_args)
    call = f"{type(denoiser).__name__}(x, sigma{names}), x of shape {tuple(x.shape)}, sigma of shape ({len(x)},)"
    advice = (
        "Expected denoiser(x, sigma, **extra_args) -> x0-hat, shaped like x.\n  Wrap a network, e.g. "
        'kv.FlowDenoiser(network, call=...); what it reads is in extra_args: check_layers(denoiser, x, {"cond": text}).'
    )
    try:
        out = _call(denoiser, x, extra_args, level)
    except KVLockError:
        raise
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        raise AttentionError(f"{call} raised {type(error).__name__}: {said[0]}\n  {advice}") from error
    if not isinstance(out, Tensor) or out.shape != x.shape:
        given = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"type {type(out).__name__}"
        raise AttentionError(f"{call} returned something of {given}.\n  {advice}")


def _call(denoiser: Denoiser, x: Tensor, extra_args: dict[str, Any], level: float) -> Tensor:
    with torch.no_grad():
        return denoiser(x, torch.full((len(x),), level, device=x.device), **extra_args)
