"""What one evaluation takes of the source, and the route by which it reaches the edit: decided once per evaluation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from torch import Tensor

from .attention import FusionContext, Hooks, fusion_ratio
from .kv_cache import CacheEntry
from .masks.tokens import token_grid
from .run import Run, Step
from .settings import LockSettings

WORTH_NARROWING = 0.9
"""If more than this fraction of the tokens must be computed, gathering them costs more than it saves."""


class Route(Enum):
    """How the source's K/V reach the edit in one evaluation.

    UNLOCKED: not at all. LOCKSTEP: the source rides as more rows of the edit's call. INTERLEAVED: likewise, but each
    block runs on the source's rows, then on the edited tokens alone. SOURCE_PASS: from a source pass just before.
    CACHED: from the KV cache, which a source pass fills where it has nothing for this noise level.
    """

    UNLOCKED = "unlocked"
    LOCKSTEP = "lockstep"
    INTERLEAVED = "interleaved"
    SOURCE_PASS = "source pass"
    CACHED = "cached"


def choose_route(*, locked: bool, narrow: bool, cached: bool, one_call: bool, interleaves: bool, probes: bool) -> Route:
    """The route of one evaluation, from this evaluation alone.

    `one_call`: source and edit can be rows of one call; `interleaves`: each block can be called for the source and then
    for the edit; `probes`: the estimator evaluates the model again, and then needs the source's K/V again.
    """
    if not locked:
        return Route.UNLOCKED
    if cached:
        return Route.CACHED
    if not one_call or probes or (narrow and not interleaves):
        return Route.SOURCE_PASS
    return Route.INTERLEAVED if narrow else Route.LOCKSTEP


@dataclass(frozen=True)
class Locked:
    """What one evaluation takes of the source: the hooks that make locked calls; what the layers fuse, of which
    each call has its own copy; the source at this noise level, and clean; the latents that are not computed (None if
    all are); and what opens the KV cache's entry for the arguments of the source's pass (None without a cache).
    """

    hooks: Hooks
    context: FusionContext
    x: Tensor
    clean: Tensor
    left_out: Tensor | None
    entry: Callable[[Mapping[str, Any]], CacheEntry] | None


def source_for(settings: LockSettings, run: Run, step: Step) -> Locked | None:
    """What this evaluation takes of the source; None if it locks nothing."""
    tools, source, mask, layers = run.tools(settings), settings.source, settings.mask, settings.layers
    low, high = step.reads.range(step.state.lock)
    if high == 0 or source is None or mask is None or layers is None or tools.hooks is None:
        return None
    noise = run.noise
    assert noise is not None  # since the run's first evaluation with layers
    # What is left out of the computation has no prediction of its own, so its background must be the source's.
    full = settings.foreground and low == 1 and step.reads.range(step.composite)[0] == 1
    selection = left_out = entry = None
    if full or tools.cached is not None:
        selection, left_out = mask.selection(step.x, layers.patch, settings.transition)
    narrow = full and selection is not None and selection.fraction <= WORTH_NARROWING and not tools.hooks.watched
    if tools.cached is not None and selection is not None:
        own: Any = noise if source.noise is None else (source.noise, noise.dtype)
        entry = partial(tools.cached.entry, source.reference, own, selection, step.state.expert)
    background = mask.background(step.x, layers.patch, settings.transition).expand(len(step.x), -1)
    context = FusionContext(
        "inject",
        fusion_ratio(step.observation.lock, background),
        grid=token_grid(step.x.shape, layers.patch),
        selection=selection if narrow or entry is not None else None,
        narrow=narrow,
        # A model that guides itself may measure the whole prediction.
        left=None if settings.policy.uses_risk or settings.scale_arg is not None else 0,
        text_first=any(layer.text == "first" for layer in layers.layers),
    )
    at_sigma, clean = source.at(step.x, step.model_sigma, noise), source.matching(step.x)
    return Locked(tools.hooks, context, at_sigma, clean, left_out if narrow else None, entry)
