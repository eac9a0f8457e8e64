"""Find the family of a pipeline: `from_pipeline`, and the table of pipeline classes."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from ..errors import PipelineError
from .base import PipelineVideo
from .cogvideox import CogVideoXVideo
from .hunyuan import Hunyuan15Video, HunyuanVideo
from .ltx import LTXVideo
from .mochi import MochiVideo
from .wan import WanImageVideo, WanVaceVideo, WanVideo

FAMILIES: dict[str, type[PipelineVideo]] = {
    "WanPipeline": WanVideo,
    "WanVideoToVideoPipeline": WanVideo,
    "WanImageToVideoPipeline": WanImageVideo,
    "WanVACEPipeline": WanVaceVideo,
    "LTXPipeline": LTXVideo,
    "CogVideoXPipeline": CogVideoXVideo,
    "CogVideoXVideoToVideoPipeline": CogVideoXVideo,
    "HunyuanVideoPipeline": HunyuanVideo,
    "HunyuanVideo15Pipeline": Hunyuan15Video,
    "MochiPipeline": MochiVideo,
}


def from_pipeline(pipe: Any, **options: Any) -> PipelineVideo:
    """Make a diffusers pipeline a model to edit with: a denoiser with its VAE, prompts and schedule.

    Args:
        pipe: A loaded pipeline of a known family: Wan, LTX, CogVideoX, HunyuanVideo or Mochi.
        options: Of `PipelineVideo`, and of one family: `image` (Wan image to video), `reactive` and
            `conditioning_scale` (VACE), `frame_rate`, `decode_timestep` and `decode_noise_scale` (LTX),
            `embedded_guidance` and `prompt_template` (HunyuanVideo).

    Returns:
        What `edit_video(model=...)` takes.

    Raises:
        PipelineError: The class or an option is unknown, or the scheduler does not fit the family.

    >>> from kvlock_sampling.testing.pipelines import tiny_pipeline
    >>> model = kv.from_pipeline(tiny_pipeline("wan"))
    >>> model.sigmas(3).shape, model.prompt("a red square")["text"].shape
    (torch.Size([4]), torch.Size([1, 512, 32]))
    """
    names = [kind.__name__ for kind in type(pipe).__mro__]  # A user's subclass is of the family, too.
    family = family_of(next((name for name in names if name in FAMILIES), names[0]))
    known = _options(family)
    if wrong := sorted(options.keys() - known):
        near = difflib.get_close_matches(wrong[0], known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise PipelineError(
            f"{wrong[0]!r} is no option for {type(pipe).__name__}.{hint} There are: {', '.join(sorted(known))}."
        )
    return family(pipe, **options)


def family_of(name: str) -> type[PipelineVideo]:
    """Return the class for pipelines of this class name. Raises PipelineError for an unknown one."""
    if name not in FAMILIES:
        stem = next(
            (s for s in ("CogVideoX", "HunyuanVideo15", "HunyuanVideo", "Wan", "LTX") if name.startswith(s)), "?"
        )
        sibling = next((known for known in FAMILIES if known.startswith(stem)), None)
        same = f"\n  If it has the parts of {sibling}: {sibling}.from_pipe(pipe)." if sibling else ""
        raise PipelineError(
            f"{name} is of no known family; there are {', '.join(FAMILIES)}.{same}\n"
            "  Other models: kv.KVLock(kv.FlowDenoiser(transformer, time_scale=1000, call=...), ...)."
        )
    return FAMILIES[name]


def _options(family: type[PipelineVideo]) -> set[str]:
    """Keyword-only arguments of the class and of the classes that it passes the rest to."""
    return {
        name
        for kind in family.__mro__
        if "__init__" in vars(kind)
        for name, p in inspect.signature(vars(kind)["__init__"]).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
