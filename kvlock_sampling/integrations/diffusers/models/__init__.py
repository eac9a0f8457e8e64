"""Diffusers pipelines as models to edit with: `from_pipeline(pipe)`, `load_pipeline(folder)`."""

from ....types import PipelineError
from .base import PipelineVideo
from .load import FAMILIES, from_pipeline, load_pipeline

__all__ = ["FAMILIES", "PipelineError", "PipelineVideo", "from_pipeline", "load_pipeline"]
