"""check_layers: are these the attention layers of this network, and does a lock keep its word there?"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import AttentionLayers, find_layers
from ..run import names_parameter
from ..types import AttentionError, Denoiser, KVLockError
from ._parts import in_precision, some
from ._promises import Promises


def check_layers(
    denoiser: Denoiser,
    x: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    *,
    layers: AttentionLayers | None = None,
    expected: int | None = None,
    sigma: float | Sequence[float] = 0.7,
    half: torch.dtype | None = torch.bfloat16,
    tolerance: float | None = None,
    seed: int = 0,
) -> None:
    """Checks that a network can be locked: its layers are where they are said to be, and a lock keeps its word.

    denoiser: as for KVLock, `denoiser(x, sigma, **extra_args)`.
    x: example latents of two clips or more, (batch, channels, time, height, width) or as the sampler has them, with two
        tokens or more along some axis. Their values do not matter; small ones are quick.
    extra_args: of a call; what belongs to a clip has the batch first. With `cond` in it guidance is checked too;
        `uncond` and `cond_scale` are left away, as a lock does, unless the denoiser names one of them.
    layers: to be checked; default: those that are found.  expected: how many layers one evaluation should fuse.
    sigma: noise levels > 0 to check at. Of a model of several experts name one for each: sigma=(8.0, 0.5).
    half: a copy of the denoiser keeps the first six promises in this precision too, where it is a torch module; None:
        that is not checked.
    tolerance: what counts as rounding, in standard deviations of the output; default: 0.001 in float32.

    Checked, in this order:
    - the denoiser answers the same twice, and a clip alone as in a batch;
    - every layer runs, and holds the video's tokens in the order, and at the place, that it is said to: one token of the
      latents is changed, and the keys and values that change most must be its own;
    - where the architecture says that rows come first, the source's can leave a call after the last layer;
    - off is identical bit for bit, inside the block and after it, and nothing stays behind on any module;
    - at lock 1 the background's keys and values are exactly the source's, the edit's own elsewhere, text included;
    - with the source's own noise and prompt any lock changes nothing; with another source it changes something;
    - the source beside the edit in one call, or in a pass of its own, gives the same; so does guidance;
    - clips of one batch, of different masks and locks, come out as they do alone;
    - leaving fully locked tokens out changes nothing, where the architecture says how that is done.

    Raises:
        AttentionError: names the promise that is not kept, what was seen, and what to change.

    Example:
        def test_my_network():
            check_layers(denoiser, torch.randn(2, 16, 3, 8, 8), {"cond": texts}, expected=30)
    """
    extra_args = dict(extra_args or {})
    if "cond" in extra_args and not any(names_parameter(denoiser, name) for name in ("uncond", "cond_scale")):
        extra_args = {k: v for k, v in extra_args.items() if k not in ("uncond", "cond_scale")}
    levels = [float(s) for s in (sigma if isinstance(sigma, Sequence) else [sigma])]
    if x.ndim < 3 or len(x) < 2 or not x.is_floating_point():
        raise AttentionError(
            f"check_layers got x of shape {tuple(x.shape)}, {x.dtype}; expected floating latents of two clips or more, "
            "e.g. torch.randn(2, 16, 3, 8, 8): whether clips stay apart shows only in a batch."
        )
    layers = layers or find_layers(denoiser)
    _answers(denoiser, x, extra_args, levels[0])
    precisions: list[tuple[Denoiser, AttentionLayers, Tensor, dict[str, Any]]] = [(denoiser, layers, x, extra_args)]
    if half is not None and isinstance(denoiser, nn.Module):
        other, its_layers = copy.deepcopy((denoiser, layers))
        precisions.append((other.to(half), its_layers, x.to(half), in_precision(extra_args, half)))
        _runs(*precisions[-1], levels[0])
    with torch.no_grad():
        for index, (model, its_layers, latents, arguments) in enumerate(precisions):
            fired: set[str] = set()
            for level in levels:
                promises = Promises(model, its_layers, latents, arguments, level, expected, tolerance, seed)
                fired |= promises.keep(all_of_them=index == 0)
            silent = [layer.name for layer in its_layers.layers if layer.name not in fired]
            if silent:
                raise AttentionError(
                    f"{len(silent)} of {len(its_layers.layers)} layers never ran at sigma={levels}: {some(silent)}.\n"
                    "  Leave out layers that the model skips. If another expert is in charge at other noise levels "
                    "name those too: check_layers(..., sigma=(8.0, 0.5))."
                )


def _answers(denoiser: Denoiser, x: Tensor, extra_args: dict[str, Any], level: float) -> None:
    """A first call, so that what is no denoiser, or is given what it cannot take, is told from a broken promise."""
    names = "".join(f", {name}=" for name in extra_args)
    call = f"{type(denoiser).__name__}(x, sigma{names}), x of shape {tuple(x.shape)}, sigma of shape ({len(x)},)"
    advice = (
        "Expected denoiser(x, sigma, **extra_args) -> x0-hat, shaped like x, of a video (batch, channels, time, "
        "height, width).\n  A network itself becomes one by a wrapper, e.g. kv.FlowDenoiser(network, time_scale=1000, "
        'call=...); what it reads belongs in extra_args: check_layers(denoiser, x, {"cond": text}).'
    )
    try:
        with torch.no_grad():
            out = denoiser(x, torch.full((len(x),), level, device=x.device), **extra_args)
    except KVLockError:
        raise
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        raise AttentionError(f"{call} raised {type(error).__name__}: {said[0]}\n  {advice}") from error
    if not isinstance(out, Tensor) or out.shape != x.shape:
        given = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"type {type(out).__name__}"
        raise AttentionError(f"{call} returned something of {given}.\n  {advice}")


def _runs(model: Denoiser, layers: AttentionLayers, x: Tensor, extra_args: dict[str, Any], level: float) -> None:
    """A network that cannot run in half precision is not one whose layers are wrong."""
    try:
        with torch.no_grad():
            model(x, torch.full((len(x),), level, device=x.device), **extra_args)
    except RuntimeError as error:
        raise AttentionError(
            f"a copy of the denoiser in {x.dtype} fails: {str(error).splitlines()[0]}\n"
            "  Does it cast time and text to the weights' dtype? If it need not run so: check_layers(..., half=None)."
        ) from error
