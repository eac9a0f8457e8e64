"""Several seeds of one edit: what finishes equals its run alone, what stopped costs nothing."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

import kvlock_sampling as kv
from kvlock_sampling.types import RunError, SamplerError

search = importlib.import_module("kvlock_sampling.search")  # the function has the same name
SEEDS = [3, 1, 4, 5]
SAMPLERS = [n for n in kv.samplers.names() if n not in ("dpm_adaptive", "dpm_fast")]


def starts(setup, count=4):
    rows = [torch.randn(setup.source.shape[1:], generator=torch.Generator().manual_seed(s)) for s in SEEDS[:count]]
    return torch.stack(rows) * setup.sigmas[0]


def measured(setup, **options):
    """A full lock that measures."""
    return setup.lock(policy=kv.PID(kp=0.0, ki=0.0, bias=1.0), **options)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_finishes_is_bit_for_bit_its_run_alone(setup, sampler):
    lock, x = measured(setup), starts(setup)
    seeded = {"seed": SEEDS} if "ancestral" in sampler or "sde" in sampler else {}
    found = kv.search(lock, sampler, x, setup.sigmas, keep=2, extra_args=setup.cfg, **seeded)
    assert len(found.x) == len(found.chosen) == 2
    for row, made in zip(found.chosen, found.x, strict=True):
        own = {"seed": [SEEDS[row]]} if seeded else {}
        alone = lock.sample(sampler, x[row : row + 1], setup.sigmas, extra_args=setup.cfg, **own)
        assert torch.equal(made, alone[0])
        assert len(found.traces[row]) == len(lock.trace)
        assert torch.equal(found.candidates[row], alone[0])


def test_a_stopped_row_costs_nothing_more(setup):
    lock, x, levels = measured(setup), starts(setup), setup.sigmas[setup.sigmas > 0].tolist()
    at = {levels[2]: 3, levels[4]: 1}
    found = kv.search(lock, "euler", x, setup.sigmas, at=at, extra_args=setup.cfg)
    counts = sorted(len(trace) for trace in found.traces)
    assert counts == [2, 4, 4, len(levels)]
    assert found.nfe == sum(trace.nfe for trace in found.traces)
    assert list(found.scores) == [levels[2], levels[4], 0.0]
    assert [int((~scores.isnan()).sum()) for scores in found.scores.values()] == [4, 3, 1]


def test_the_judge_decides(setup):
    """Any function of the prediction, e.g. the lock's own measurement."""
    lock, x = measured(setup), starts(setup)
    liked: list[float] = []

    def judge(denoised, trace):
        liked.append(float(denoised.mean()))
        assert denoised.shape == (1, *setup.source.shape[1:])
        assert len(trace)
        return liked[-1]

    found = kv.search(lock, "euler", x, setup.sigmas, judge=judge, extra_args=setup.cfg)
    assert found.chosen == [max(range(4), key=lambda row: liked[row])]
    half = next(iter(found.scores))
    calm = kv.search(lock, "euler", x, setup.sigmas, judge=search.calm, extra_args=setup.cfg)
    last = [next(step for step in reversed(trace.steps) if step.sigma > half) for trace in calm.traces]
    assert calm.chosen == [min(range(4), key=lambda row: float(last[row].variance))]


def test_a_judge_may_work_in_place(setup):
    def harsh(denoised, trace):
        return -float(denoised.clamp_(-0.1, 0.1).square().mean())

    def gentle(denoised, trace):
        return harsh(denoised.clone(), trace)

    x = starts(setup)
    one, other = (
        kv.search(measured(setup), "dpmpp_2m", x, setup.sigmas, judge=judge, extra_args=setup.cfg)
        for judge in (harsh, gentle)
    )
    assert torch.equal(one.x, other.x)
    assert torch.equal(one.candidates, other.candidates)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number_is_refused(setup, score):
    with pytest.raises(RunError, match=f"gave start 0 {score:g}; expected a finite number"):
        kv.search(measured(setup), "euler", starts(setup), setup.sigmas, judge=lambda x, t: score, extra_args=setup.cfg)


def test_one_pass_of_the_source_serves_every_start(setup):
    lock = measured(setup, noise="fixed", kv_cache=kv.KVCache(every=1, ratio=1.0, format=None))
    found = kv.search(lock, "euler", starts(setup), setup.sigmas, extra_args=setup.cfg)
    passes = [sum(step.nfe for step in trace) - 2 * len(trace) for trace in found.traces]
    finished = found.chosen[0]
    steps = int((setup.sigmas > 0).sum())
    half = steps - steps // 2
    assert sum(passes) <= steps  # one for each noise level, whichever row came there first
    assert passes[finished] >= steps - len(found.traces[(finished + 1) % 4])
    assert half


@pytest.mark.parametrize("every", [1, 2])
def test_the_last_start_refreshes_as_alone_once_the_first_has_stopped(setup, every):
    """What another start stored meanwhile is no earlier run's."""
    levels = kv.samplers.flow_sigmas(12)

    def lock():
        return measured(setup, noise="fixed", kv_cache=kv.KVCache(every=every, ratio=None, format=None))

    found = kv.search(lock(), "euler", starts(setup, 2), levels, judge=second_is_best(), extra_args=setup.cfg)
    assert found.chosen == [1]
    alone = lock().sample("euler", starts(setup, 2)[1:], levels, extra_args=setup.cfg)
    assert torch.equal(found.x, alone)


def second_is_best():
    scores = iter([0.0, 1.0, 1.0])
    return lambda denoised, trace: next(scores)


def test_a_mask_without_a_border_gives_the_seam_nothing_to_judge_by(setup):
    mask = torch.zeros(1, 1, 3, 8, 8)
    mask[:, :, 1:] = 1  # whole frames
    lock = measured(setup, mask=mask)
    with pytest.raises(RunError, match=r"has no border to judge by. Give judge="):
        kv.search(lock, "euler", starts(setup), setup.sigmas, extra_args=setup.cfg)
    assert not lock.trace.steps  # before anything is sampled
    with pytest.raises(RunError, match="this lock has none"):
        search.seam(kv.KVLock(setup.model, policy="off"))


def test_the_last_measurement_counts_where_the_last_evaluation_has_none(setup):
    lock = measured(setup, estimator=kv.variance.Sparse(kv.variance.TrajectoryVariance(), every=2))
    at = {float(setup.sigmas[4]): 1}
    found = kv.search(lock, "euler", starts(setup), setup.sigmas, judge=search.calm, at=at, extra_args=setup.cfg)
    assert len(found.chosen) == 1


def test_without_a_source_guidance_alone_is_searched(setup):
    lock = kv.KVLock(setup.model, policy=kv.PID(kp=0.0, ki=0.0, lock_range=(0.0, 0.0)))
    found = kv.search(lock, "euler", starts(setup), setup.sigmas, extra_args=setup.cfg)
    assert math.isfinite(float(found.x.sum()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 1}, "two or more starts"),
        ({"keep": 0}, "keep=0"),
        ({"keep": 5}, "keep=5"),
        ({"at": {1.0: 0}}, "at=0"),
        ({"at": {1e-9: 1}}, "at=1e-09; expected a finite number >= 0"),
        ({"at": {float("nan"): 1}}, "at=nan"),
    ],
)
def test_numbers_that_do_not_fit(setup, change, message):
    options = {"x": 4, **change}
    with pytest.raises(RunError, match=message):
        kv.search(measured(setup), "euler", starts(setup, options.pop("x")), setup.sigmas, **options)


def test_a_level_as_it_is_written_is_one_of_the_schedule(setup):
    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.1, 0.0])
    for level in (1.0, 0.7, 0.1):
        found = kv.search(measured(setup), "euler", starts(setup, 3), sigmas, at={level: 1}, extra_args=setup.cfg)
        assert len(found.x) == 1
    with pytest.raises(RunError, match=r"at=0\.05; expected"):
        kv.search(measured(setup), "euler", starts(setup, 3), sigmas, at={0.05: 1}, extra_args=setup.cfg)


def test_a_sampler_whose_steps_depend_on_all_starts_is_refused(setup):
    for sampler in ("dpm_adaptive", kv.samplers.get("dpm_adaptive")):
        with pytest.raises(RunError, match="chooses its steps for all seeds together"):
            kv.search(measured(setup), sampler, starts(setup, 4), setup.sigmas)


def test_several_clips_and_a_lock_that_measures_nothing(setup, pair):
    with pytest.raises(RunError, match="for 2 clips"):
        kv.search(measured(pair), "euler", pair.x.repeat(2, 1, 1, 1, 1), pair.sigmas, extra_args=pair.cfg)
    full, given = setup.lock(policy="full"), {"extra_args": setup.cfg}
    with pytest.raises(RunError, match="measured nothing to judge"):
        kv.search(full, "euler", starts(setup), setup.sigmas, judge=search.calm, **given)


def test_the_seam_is_just_inside_the_mask(setup):
    """A difference to the source counts there, and nowhere else."""
    judge, source = search.seam(setup.lock(policy="full")), setup.source
    assert judge(source, None) == 0
    inside, deep, outside = source.clone(), source.clone(), source.clone()
    inside[..., 2, 3] += 2  # the mask is rows 2 to 4, columns 1 to 5
    deep[..., 3, 3] += 2
    outside[..., 1, 3] += 2
    assert judge(deep, None) == judge(outside, None) == 0
    assert judge(inside, None) == pytest.approx(-4 / 12)
    best = kv.search(setup.lock(policy="full"), "euler", starts(setup), setup.sigmas, extra_args=setup.cfg)
    scores = next(iter(best.scores.values()))
    assert best.chosen == [int(scores.argmax())]


@pytest.mark.parametrize("at", [[2.0], {"a": 1}], ids=str)
def test_levels_of_another_form_are_told(setup, at):
    x = setup.x.repeat(2, 1, 1, 1, 1)
    with pytest.raises(RunError, match=r"expected how many go on from each noise level, e\.g\. at="):
        kv.search(setup.lock(policy="full"), "euler", x, setup.sigmas, at=at, extra_args=setup.cfg)


def test_a_judge_without_an_answer_is_told(setup):
    x = setup.x.repeat(2, 1, 1, 1, 1)
    with pytest.raises(RunError, match="gave start 0 None; expected a finite number"):
        kv.search(setup.lock(policy="full"), "euler", x, setup.sigmas, judge=lambda *_: None, extra_args=setup.cfg)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_starts_in_half_precision(setup, sampler):
    """Some samplers go on in float32 after their first step."""
    x = starts(setup, 2).bfloat16()
    found = kv.search(measured(setup), sampler, x, setup.sigmas, extra_args=setup.cfg)
    alone = measured(setup).sample(sampler, x[found.chosen], setup.sigmas, extra_args=setup.cfg)
    assert torch.equal(found.x, alone)


def test_one_step_in_half_precision(setup):
    found = kv.search(measured(setup), "euler", starts(setup, 2).half(), setup.sigmas[[0, -1]], extra_args=setup.cfg)
    assert found.candidates.dtype == found.x.dtype
    assert torch.equal(found.candidates[found.chosen], found.x)


def test_the_seam_tells_near_predictions_of_half_precision_apart(setup):
    judge = search.seam(measured(setup))
    near = [torch.ones_like(setup.source).bfloat16() * scale for scale in (1.0, 1.0 + 2**-7)]
    exact = [judge(clip.double(), None) for clip in near]
    assert [judge(clip, None) for clip in near] == pytest.approx(exact, rel=1e-5)


def test_a_judge_by_name_is_told_before_anything_is_sampled(setup):
    lock = measured(setup)
    with pytest.raises(RunError, match="judge='calm'; expected a function of"):
        kv.search(lock, "euler", starts(setup), setup.sigmas, judge="calm", extra_args=setup.cfg)
    assert not lock.trace.steps


def test_a_bare_model_is_told(setup):
    with pytest.raises(RunError, match=r"search got a function.*search\(KVLock\(model"):
        kv.search(lambda x, sigma: x, "euler", starts(setup), setup.sigmas)


@pytest.mark.parametrize("sigmas", [30, torch.zeros(1)])
def test_what_is_no_schedule(setup, sigmas):
    with pytest.raises(SamplerError, match="no schedule"):
        kv.search(measured(setup), "euler", starts(setup), sigmas, extra_args=setup.cfg)


def test_packed_latents_under_a_policy_that_measures_nothing_are_told_before_sampling(setup):
    packed = kv.KVLock(
        setup.model, source=torch.zeros(1, 12, 4), mask=torch.arange(12).view(1, 12, 1) % 2.0, policy="full"
    )
    with pytest.raises(RunError, match=r"measured nothing to judge seeds by. Give judge="):
        kv.search(packed, "euler", torch.zeros(2, 12, 4), setup.sigmas, extra_args=setup.cfg)
    assert not packed.trace.steps


def test_numbers_that_rise_are_refused(setup):
    at = {float(setup.sigmas[1]): 1, float(setup.sigmas[3]): 2}
    with pytest.raises(RunError, match="expected no more to go on from a lower level"):
        kv.search(measured(setup), "euler", starts(setup), setup.sigmas, at=at, extra_args=setup.cfg)
