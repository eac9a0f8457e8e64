"""A source without the old object: how it is filled, and that only its keys and values come from there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvlock_sampling as kv
from kvlock_sampling.masks.fill import fill
from kvlock_sampling.policy import Constant
from kvlock_sampling.types import EstimatorError, KVLockError, SourceError
from kvlock_sampling.variance import Divergence, Sparse, TrajectoryVariance
from kvlock_sampling.variance.base import pooled

SHAPE = (2, 3, 2, 8, 12)


def values(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def box(shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    mask = torch.zeros(shape[0], 1, *shape[2:])
    mask[..., 2:6, 3:9] = 1
    return mask


def test_what_is_kept_stays_bit_for_bit_and_what_is_filled_does_not_depend_on_what_was_there():
    clip, mask = values(), box()
    filled, other = fill(clip, mask), fill(torch.where(mask > 0, 1e3, clip), mask)
    kept = (mask == 0).expand_as(clip)
    assert torch.equal(filled[kept], clip[kept])
    torch.testing.assert_close(filled, other)


@pytest.mark.parametrize("shape", [SHAPE, (1, 2, 7, 5), (2, 1, 3, 1, 9), (2, 10, 4)])
def test_a_constant_is_filled_by_itself(shape):
    clip = torch.full(shape, 0.7, dtype=torch.float64)
    mask = torch.zeros(shape[0], shape[1], 1) if len(shape) == 3 else torch.zeros(shape[0], 1, *shape[2:])
    mask.flatten(1)[:, 2:5] = 1
    torch.testing.assert_close(fill(torch.where(mask > 0, 9.0, clip), mask), clip)


@given(st.integers(0, 1000))
def test_a_fill_stays_within_its_surroundings(seed):
    clip, mask = values(seed), box()
    filled = fill(clip, mask)
    pages = (tensor.flatten(0, 2) for tensor in (filled, clip, mask.expand(SHAPE)))
    for page, original, region in zip(*pages, strict=True):
        known = original[region == 0]
        assert known.min() - 1e-5 <= page.min()
        assert page.max() <= known.max() + 1e-5


def test_a_ramp_is_continued():
    ramp = torch.linspace(-1, 1, 32).expand(1, 1, 1, 32, 32)
    mask = torch.zeros(1, 1, 1, 32, 32)
    mask[..., 12:20, 12:20] = 1
    assert (fill(torch.where(mask > 0, 5.0, ramp), mask) - ramp).abs().max() < 0.15


def test_a_frame_without_known_values_takes_the_clips_mean():
    clip, mask = values(), torch.zeros(2, 1, 2, 8, 12)
    mask[:, :, 1] = 1
    torch.testing.assert_close(
        fill(clip, mask)[:, :, 1], clip[:, :, 0].mean((2, 3))[..., None, None].expand(2, 3, 8, 12)
    )
    assert torch.isfinite(fill(clip, torch.ones_like(mask))).all()


class Recorder(torch.nn.Module):
    """A Wan denoiser that keeps what it was called with."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.seen = denoiser, []

    def forward(self, x, sigma, cond):
        self.seen.append((x.clone(), cond.clone()))
        return self.denoiser(x, sigma, cond=cond)


@pytest.mark.parametrize("batched", [True, False])
def test_only_the_source_of_keys_and_values_is_erased(setup, batched):
    recorder = Recorder(setup.model)
    lock = kv.KVLock(
        recorder, source=setup.source, mask=setup.mask, policy=Constant(lock=0.5), erase=True, batched=batched
    )
    x = lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg, disable=True)
    kept = (setup.mask == 0).expand_as(x)
    torch.testing.assert_close(x[kept], setup.source[kept])  # pasted from the clip itself
    sigma, erased = setup.sigmas[0], fill(setup.source, setup.mask)
    wanted = erased + (setup.x - setup.source)  # the run's own noise
    rows = [
        (row, cond) for x, conds in recorder.seen for row, cond in zip(x, conds.expand(len(x), -1, -1), strict=True)
    ]
    found = [cond for row, cond in rows if torch.allclose(row, wanted[0], atol=1e-4 * float(sigma))]
    assert len(found) == 1
    assert torch.equal(found[0], setup.uncond[0])  # the edit's prompt does not name what was erased


class Conditioned(torch.nn.Module):
    """A denoiser with a second condition per clip, of which it keeps what it was called with."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.seen = denoiser, []

    def forward(self, x, sigma, cond, frame):
        self.seen += zip(cond.expand(len(x), -1, -1), frame.tolist(), strict=True)
        return self.denoiser(x, sigma, cond=cond)


class ConditionedAndGuided(Conditioned):
    """The same, with guidance of its own."""

    def forward(self, x, sigma, cond, frame, uncond=None, cond_scale=1.0):
        super().forward(x, sigma, uncond, frame)
        return super().forward(x, sigma, cond, frame)


@pytest.mark.parametrize("kind", [Conditioned, ConditionedAndGuided])
@pytest.mark.parametrize("erase", [True, False])
def test_of_the_sources_own_arguments_only_the_prompt_is_erased(setup, kind, erase):
    model, prompt = kind(setup.model), setup.cfg["cond"] + 1
    source_args = {"cond": prompt, "frame": torch.tensor([7.0])}
    options = {"source": setup.source, "mask": setup.mask, "policy": Constant(lock=0.5), "source_args": source_args}
    with kv.KVLock(model, **options, erase=erase) as lock:
        lock(setup.x, setup.sigmas[0], **setup.cfg, frame=torch.tensor([1.0]))
    wanted = setup.uncond[0] if erase else prompt[0]
    assert {frame for _, frame in model.seen} == {1.0, 7.0}
    assert all(torch.equal(cond, wanted) for cond, frame in model.seen if frame == 7.0)


@pytest.mark.parametrize("policy", ["release", "static"])
def test_a_script_that_does_not_guide_may_pass_no_unconditional_prompt(setup, policy):
    found = []
    for args in ({"cond": setup.cfg["cond"], "uncond": None, "cond_scale": 1.0}, {"cond": setup.cfg["cond"]}):
        lock = kv.KVLock(setup.model, source=setup.source, mask=setup.mask, policy=policy)
        found.append(lock.sample("euler", setup.x, setup.sigmas, extra_args=args))
    assert torch.equal(*found)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("lock", [0.0, 0.5])
def test_an_estimator_sees_the_source_as_it_is_under_its_own_prompt(setup, lock, batched):
    own, seen = torch.full_like(setup.cond, 0.3), []

    class Watch(Divergence):
        def step(self, state, evaluation):
            seen.append(evaluation)
            return super().step(state, evaluation)

    policy = kv.PID(kp=0.0, ki=0.0, bias=lock)
    options = {"policy": policy, "estimator": Watch(), "erase": True, "source_args": {"cond": own}, "batched": batched}
    with setup.lock(**options) as locked:
        for sigma in setup.sigmas[:2]:
            locked(setup.source + sigma, sigma[None], **setup.cfg)
    sigma = setup.sigmas[0]
    noise = (setup.source + sigma - setup.source) / sigma  # the run's own
    for evaluation in seen:
        level = torch.tensor([evaluation.sigma])
        wanted = setup.model(setup.source + level * noise, level, cond=own)
        torch.testing.assert_close(evaluation.source, wanted, rtol=1e-4, atol=1e-4)
    # uncond, cond and the source as it is; under a lock also the erased one
    assert [step.nfe for step in locked.trace] == [4 if lock else 3] * 2


def test_errors():
    with pytest.raises(KVLockError, match="erase='yes'; expected True or False"):
        kv.KVLock(lambda x, sigma: x, erase="yes", policy="off")
    with pytest.raises(SourceError, match="erase= without source="):
        kv.KVLock(lambda x, sigma: x, erase=True, policy="off")


def test_a_preset_may_ask_for_it():
    text = 'erase = true\n[policy]\ntype = "ReleaseBelow"\nbelow = 3.0\nlock = 0.5\n'
    preset = kv.presets.load_preset(text)
    assert preset.erase is True
    assert kv.presets.load_preset(kv.presets.to_toml(preset)) == preset


def test_a_local_estimator_takes_the_models_patch(setup):
    for estimator in (
        Divergence(patch="model"),
        TrajectoryVariance(patch="model"),
        Sparse(Sparse(TrajectoryVariance(patch="model"), every=2), every=1),
        Sparse(Divergence(patch="model"), every=2),
    ):
        lock = setup.lock(policy=kv.PID(), estimator=estimator)
        assert lock.settings.estimator.patch in ((1, 2, 2), None)
        assert "model" not in repr(lock.settings.estimator)
    with pytest.raises(EstimatorError, match=r'patch="model", and no locked layers.*\n.*patch=\(1, 2, 2\)'):
        pooled(setup.x, None, "model")


def test_a_longer_prompt_of_the_source_does_not_part_the_erased_one_from_the_edit(setup):
    longer = torch.cat([setup.cond, setup.cond], dim=1)
    options = {"policy": Constant(lock=0.5), "erase": True, "source_args": {"cond": longer}}
    with setup.lock(**options) as locked:
        locked(setup.x, setup.sigmas[:1], **setup.cfg)
    assert [step.route for step in locked.trace] == ["lockstep"]


def test_a_source_is_moved_once_whether_or_not_it_is_erased(setup):
    for erase, copies in ((False, 1), (True, 2)):
        with setup.lock(policy=Constant(lock=0.5), erase=erase) as locked:
            locked(setup.x, setup.sigmas[:1], **setup.cfg)
        assert len(locked.settings.source._placed) == copies
