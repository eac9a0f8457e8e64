"""For users' own tests: the suite that every built-in policy passes, and denoisers whose answers are known exactly.

from kvlock_sampling.testing import check_policy
def test_mine(): check_policy(Hysteresis(on=1.2, off=0.8))
"""

from .denoisers import GaussianDenoiser, MixtureDenoiser, toy_denoisers
from .policy import check_policy

__all__ = ["GaussianDenoiser", "MixtureDenoiser", "check_policy", "toy_denoisers"]
