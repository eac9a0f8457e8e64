"""Off is identical, bit for bit: every sampler, every architecture, hooks installed and not."""

from __future__ import annotations

import pytest
import torch
from networks import FAMILIES, random_network

import kvlock_sampling as kv
from kvlock_sampling.samplers import names
from kvlock_sampling.types import KVLockError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:In CPU autocast", "ignore:.*deprecated")]

POLICIES = {
    "off": "off",  # the lock knows that nothing is ever locked
    "lock 0": kv.stateless(lambda obs: kv.Control(lock=0.0), uses_risk=False),  # it learns that at every evaluation
}


@pytest.mark.parametrize("name", FAMILIES)
def test_off_is_the_bare_model_under_every_sampler(name):
    try:
        made = random_network(name)
    except KVLockError as error:
        pytest.skip(str(error).splitlines()[0])
    sigmas = torch.tensor([3.0, 1.0, 0.4, 0.0])
    source, mask = torch.randn_like(made.x), torch.zeros_like(made.x[:, :1] if made.x.ndim > 3 else made.x[..., :1])
    (mask if made.x.ndim > 3 else mask.movedim(1, -1))[..., :1] = 1
    for sampler in names():

        def run(model, sampler=sampler):
            torch.manual_seed(0)  # some samplers draw from the global generator
            with torch.no_grad():
                return kv.samplers.run(sampler, model, made.x * 3, sigmas, extra_args=made.extra_args, seed=0)

        bare = run(made.denoiser)
        for policy in POLICIES.values():
            lock = kv.KVLock(
                made.denoiser, source=source, mask=mask, policy=policy, layers=made.layers, composite=False
            )
            with lock:
                assert torch.equal(run(lock), bare), (sampler, policy)
        assert torch.equal(run(made.denoiser), bare), sampler
