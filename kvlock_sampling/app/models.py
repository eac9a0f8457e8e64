"""A model by its name or folder: the embedded one, weights of its architecture, or a pipeline of diffusers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..types import KVLockError

if TYPE_CHECKING:
    from .edit import VideoModel


def open_model(model: str | os.PathLike[str], **options: Any) -> VideoModel:
    """Load "tiny", a folder or file of its weights, or a folder of a diffusers pipeline.

    options: of `pipelines.load_pipeline`; those that are None, and offload="none", are as good as not given.

    Raises:
        KVLockError: nothing there, or options for a model that has none.
    """
    from ..integrations.diffusers.models.load import INDEX, is_pipeline_folder, load_pipeline
    from ..tiny import load

    given = {k: v for k, v in options.items() if v is not None and (k, v) != ("offload", "none")}
    path = Path(model)
    if is_pipeline_folder(path):
        return load_pipeline(path, **given)
    if str(model) != "tiny" and not path.is_file() and not (path / "weights.safetensors").is_file():
        hint = (
            "" if path.is_dir() else "\n  Nothing is downloaded; fetch it first: hf download NAME --local-dir FOLDER."
        )
        raise KVLockError(
            f"no model at {str(model)!r}; expected 'tiny' (the embedded model), a folder of a diffusers pipeline "
            f"({INDEX}), or a folder holding weights.safetensors of the embedded architecture.{hint}"
        )
    if given:
        name = sorted(given)[0]
        raise KVLockError(
            f"{name}={given[name]!r} is for a pipeline of diffusers, and {str(model)!r} is the embedded model's "
            f"architecture: leave it away, or name a folder with {INDEX}."
        )
    return load(model)
