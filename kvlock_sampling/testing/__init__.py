"""Suites for your own policies, estimators and networks, and denoisers with exact answers."""

from .denoisers import GaussianDenoiser, MixtureDenoiser
from .estimator import check_estimator
from .layers import check_layers
from .pipelines import tiny_pipeline
from .policy import check_policy

__all__ = ["GaussianDenoiser", "MixtureDenoiser", "check_estimator", "check_layers", "check_policy", "tiny_pipeline"]
