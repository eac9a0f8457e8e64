"""The table of families: a pipeline's class name -> the file and class here that know it."""

from __future__ import annotations

import difflib
import inspect
from importlib import import_module
from typing import Any

from ..errors import PipelineError
from .base import PipelineVideo

FAMILIES = {
    "WanPipeline": "wan:WanVideo",
    "WanVideoToVideoPipeline": "wan:WanVideo",
    "WanImageToVideoPipeline": "wan_image:WanImageVideo",
    "WanVACEPipeline": "wan_vace:WanVaceVideo",
    "LTXPipeline": "ltx:LTXVideo",
    "CogVideoXPipeline": "cogvideox:CogVideoXVideo",
    "CogVideoXVideoToVideoPipeline": "cogvideox:CogVideoXVideo",
    "HunyuanVideoPipeline": "hunyuan:HunyuanVideo",
    "HunyuanVideo15Pipeline": "hunyuan15:Hunyuan15Video",
    "MochiPipeline": "mochi:MochiVideo",
}


def from_pipeline(pipe: Any, **options: Any) -> PipelineVideo:
    """A diffusers pipeline as a denoiser with its codec, prompts and schedule: what `edit_video(model=...)` takes.

    pipe: a loaded pipeline; the classes are the keys of `pipelines.FAMILIES`.  options: of `PipelineVideo`
    (cfg_scale, negative_prompt, shift, max_sequence_length, t_max) and of the family, see its file, e.g. `image=` for
    Wan image to video.

    >>> from kvlock_sampling.testing.pipelines import tiny_pipeline
    >>> model = kv.from_pipeline(tiny_pipeline("wan"))
    >>> model.sigmas(3).shape, model.prompt("a red square")["text"].shape
    (torch.Size([4]), torch.Size([1, 512, 32]))

    Raises:
        PipelineError: an unknown class, an unknown option, or a scheduler that the model cannot mean.
    """
    names = [kind.__name__ for kind in type(pipe).__mro__]  # also a subclass of somebody's own
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
    """The class here for a pipeline class of this name. Raises PipelineError for an unknown one."""
    if name not in FAMILIES:
        sibling = next((k for k in FAMILIES if k.startswith(_stem(name))), None)
        same = f"\n  If it has the parts of {sibling}: {sibling}.from_pipe(pipe)." if sibling else ""
        raise PipelineError(
            f"{name} is of no known family; there are {', '.join(FAMILIES)}.{same}\n"
            "  Any other model works in your own script: wrap its transformer, kv.FlowDenoiser(transformer, "
            "time_scale=1000, call=...),\n"
            "  and if its attention is not found, say where its tokens are: kv.sdpa_layers(transformer, patch=(1, 2, 2))."
        )
    file, _, kind = FAMILIES[name].partition(":")
    return getattr(import_module(f".{file}", __package__), kind)


def _stem(name: str) -> str:
    """The first capitalised word: "LTXConditionPipeline" -> "LTX"."""
    stem = name.removesuffix("Pipeline")
    for known in ("CogVideoX", "HunyuanVideo", "Wan", "LTX"):
        if stem.startswith(known):
            return known
    return f"{stem}\0"  # matches nothing


def _options(family: type[PipelineVideo]) -> set[str]:
    """Keyword-only arguments of the class and of what it passes the rest on to."""
    return {
        name
        for kind in family.__mro__
        if "__init__" in vars(kind)
        for name, p in inspect.signature(vars(kind)["__init__"]).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
