"""The route of an evaluation: a pure function, a column of the trace, and nothing outside the call decides it."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import kvlock_sampling as kv
from kvlock_sampling.route import Route, choose_route

FACTS = ("locked", "narrow", "cached", "one_call", "interleaves", "probes")

TABLE = [
    # locked, narrow, cached, one_call, interleaves, probes (None: either)
    ((False, None, None, None, None, None), Route.UNLOCKED),
    ((True, None, True, None, None, None), Route.CACHED),
    ((True, None, False, False, None, None), Route.SOURCE_PASS),
    ((True, False, False, True, None, False), Route.LOCKSTEP),
    ((True, True, False, True, True, False), Route.INTERLEAVED),
    ((True, True, False, True, False, False), Route.SOURCE_PASS),
    ((True, None, False, True, None, True), Route.SOURCE_PASS),
]


@pytest.mark.parametrize(("pattern", "route"), TABLE)
def test_the_table_of_routes(pattern, route):
    for facts in product(*[(fact,) if fact is not None else (True, False) for fact in pattern]):
        assert choose_route(**dict(zip(FACTS, facts, strict=True))) is route


def test_the_table_is_complete():
    covered = {
        facts for pattern, _ in TABLE for facts in product(*[(f,) if f is not None else (True, False) for f in pattern])
    }
    assert covered == set(product((True, False), repeat=len(FACTS)))


@pytest.mark.parametrize(
    ("options", "route"),
    [
        ({"policy": "off"}, Route.UNLOCKED),
        ({"policy": "half"}, Route.LOCKSTEP),
        ({"policy": "full"}, Route.INTERLEAVED),
        ({"policy": "full", "foreground": False}, Route.LOCKSTEP),
        ({"policy": "full", "batched": False}, Route.SOURCE_PASS),
        ({"policy": "full", "kv_cache": kv.KVCache()}, Route.CACHED),
    ],
)
def test_the_trace_names_the_route(setup, options, route):
    lock = setup.lock(**options)
    lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    assert {step.route for step in lock.trace} == {route.value}
    assert f"{route.value} x {len(lock.trace)}" in repr(lock.trace)
    assert {row["route"] for row in lock.trace.rows()} == {route.value}


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@pytest.mark.parametrize("policy", ["full", "half"])
def test_the_number_of_frames_does_not_change_the_route(setup, frames, policy):
    """With guidance one clip has three rows. Clips of as many frames take the same route."""
    source, mask, x = (t[:, :, :1].expand(-1, -1, frames, -1, -1) for t in (setup.source, setup.mask, setup.x))
    lock = kv.KVLock(setup.model, source=source, mask=mask, policy=policy)
    with lock:
        lock(x, torch.ones(1), **setup.cfg)
    assert lock.trace.steps[0].route == (Route.INTERLEAVED if policy == "full" else Route.LOCKSTEP).value


@pytest.mark.parametrize("policy", ["full", "half"])
def test_a_function_compiled_elsewhere_changes_nothing(setup, policy):
    def run():
        lock = setup.lock(policy=policy)
        return lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg), [s.route for s in lock.trace]

    before = run()
    torch.compile(lambda a: a * 2, backend="eager")(torch.ones(3))
    after = run()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def test_the_sources_own_prediction_reaches_the_estimator(pair):
    """In lockstep it costs nothing; a fresh source pass gives the same."""
    seen = []

    class Noting(kv.TrajectoryVariance):
        def step(self, state, evaluation):
            seen.append(evaluation.source)
            return super().step(state, evaluation)

    for options in ({}, {"batched": False}):
        lock = pair.lock(policy=kv.policy.Clamped(kv.Linear(), lock=(0.5, 0.5)), estimator=Noting(), **options)
        lock.sample("euler", pair.x, pair.sigmas[:3], extra_args=pair.cfg)
    together, apart = seen[:2], seen[2:]
    assert all(each is not None and each.shape == pair.x.shape for each in seen)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
