"""Suites for your own policies, estimators and networks, and denoisers with exact answers.

from kvlock_sampling.testing import check_estimator, check_policy, check_layers
def test_mine(): check_policy(Hysteresis(on=1.2, off=0.8))
def test_my_measure(): check_estimator(FrameVariance())
def test_my_network(): check_layers(denoiser, torch.randn(2, 16, 3, 8, 8), {"cond": texts})
"""

from .denoisers import GaussianDenoiser, MixtureDenoiser
from .estimator import check_estimator
from .layers import check_layers
from .pipelines import tiny_pipeline
from .policy import check_policy

__all__ = [
    "GaussianDenoiser",
    "MixtureDenoiser",
    "check_estimator",
    "check_layers",
    "check_policy",
    "tiny_pipeline",
]
