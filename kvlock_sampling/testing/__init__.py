"""For users' own tests: the suites that every built-in policy and estimator passes, and denoisers with exact answers.

from kvlock_sampling.testing import check_estimator, check_policy
def test_mine(): check_policy(Hysteresis(on=1.2, off=0.8))
def test_my_measure(): check_estimator(FrameVariance())
"""

from .denoisers import GaussianDenoiser, MixtureDenoiser, toy_denoisers
from .estimator import check_estimator
from .policy import check_policy

__all__ = ["GaussianDenoiser", "MixtureDenoiser", "check_estimator", "check_policy", "toy_denoisers"]
