"""The lock as a whole: off is identical, every sampler and policy, per clip, all routes, errors for options."""

from __future__ import annotations

import inspect
import itertools
import pickle
from functools import partial

import pytest
import torch
import torch.utils.checkpoint

import kvlock_sampling as kv
from kvlock_sampling import attention, samplers
from kvlock_sampling.batching import take
from kvlock_sampling.source import Source
from kvlock_sampling.testing import GaussianDenoiser
from kvlock_sampling.types import MaskError, PolicyError, RunError, SourceError

SAMPLERS = samplers.names()
POLICIES = {
    "constant": kv.Constant(lock=0.6),
    "linear": kv.Linear(),
    "threshold": kv.policy.Threshold(),
    "sigmoid": kv.Sigmoid(),
    "pid": kv.PID(),
    "windowed": kv.Windowed(kv.Linear(), last=3),
    "smoothed": kv.Smoothed(kv.Linear(), half_life=0.5),
    "clamped": kv.policy.Clamped(kv.Linear(), lock=(0.1, 0.6)),
    "function": kv.stateless(
        lambda obs: kv.Control(lock=obs.risk.clamp(0, 1), cfg_scale=obs.requested_cfg_scale * 0.8)
    ),
    "paper": "paper",
    "default": "default",
}


def run(denoiser, setup, sampler, **kw):
    # Some samplers draw from the global generator where no seed reaches them.
    torch.manual_seed(0)
    return samplers.run(sampler, denoiser, setup.x, setup.sigmas, extra_args=setup.cfg, seed=3, **kw)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_off_is_bit_identical_with_hooks_installed(setup, sampler):
    bare = run(kv.CFGDenoiser(setup.model), setup, sampler)
    never = setup.lock(policy=kv.Constant(lock=0.0))
    with never:
        assert torch.equal(run(never, setup, sampler), bare)
    # A policy that may lock, and does not: the source is held, the layers are known, nothing stands at them.
    idle = setup.lock(policy=kv.stateless(lambda obs: kv.Control(0.0)), composite=False)
    with idle:
        assert "forward" not in vars(setup.model.inner_model.transformer.blocks[0].attn1)
        assert torch.equal(run(idle, setup, sampler), bare)
    assert torch.equal(run(kv.CFGDenoiser(setup.model), setup, sampler), bare)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_locked_with_every_policy(setup, sampler, policy):
    options = {"rtol": 0.5, "atol": 0.5} if sampler == "dpm_adaptive" else {}  # a random net is stiff
    lock = setup.lock(policy=POLICIES[policy])
    out = lock.sample(sampler, setup.x, setup.sigmas, extra_args=setup.cfg, seed=3, **options)
    assert torch.isfinite(out).all()
    assert len(lock.trace) >= len(setup.sigmas) - 1
    for step in lock.trace:
        assert ((step.lock >= 0) & (step.lock <= 1)).all()
        assert (step.fused_layers > 0) == bool((step.lock > 0).any())
    if min(float(step.composite.min()) for step in lock.trace) < 1:
        return  # the policy let go of something
    kept = setup.mask.expand_as(out) == 0
    left = 6 * float(setup.sigmas[-2]) if samplers.is_ranged(samplers.get(sampler)) else 1e-3  # those stop at sigma_min
    torch.testing.assert_close(out[kept], setup.source[kept], rtol=0, atol=left)


def test_every_sampler_of_k_diffusion_is_covered():
    assert len(SAMPLERS) == 13
    assert all("model" in inspect.signature(samplers.get(n)).parameters for n in SAMPLERS)


def test_self_consistency_a_source_equal_to_the_edit_changes_nothing(setup):
    """Same latents, same noise, same prompt: K/V of both streams agree, so any lock is a no-op beyond rounding."""
    sigma = torch.full((1,), 2.0)
    noise = torch.randn_like(setup.source)
    x = setup.source + 2.0 * noise
    plain = setup.model(x, sigma, cond=setup.cond)
    for value in (0.3, 1.0):
        with setup.lock(policy=kv.Constant(lock=value), noise=noise, composite=False) as lock:
            torch.testing.assert_close(lock(x, sigma, cond=setup.cond), plain, rtol=1e-4, atol=1e-5)
        assert lock.trace.steps[0].fused_layers == 2


@pytest.mark.parametrize("policy", ["constant", "linear", "pid", "smoothed", "default"])
def test_a_clip_in_a_batch_equals_the_clip_alone(pair, policy):
    both = pair.lock(policy=POLICIES[policy])
    out = both.sample("euler", pair.x, pair.sigmas, extra_args=pair.cfg)
    for i in range(2):
        one = slice(i, i + 1)
        alone = kv.KVLock(pair.model, source=pair.source[one], mask=pair.mask[one], policy=POLICIES[policy])
        cfg = {"cond": pair.cond[one], "uncond": pair.uncond[one], "cond_scale": 3.0}
        single = alone.sample("euler", pair.x[one], pair.sigmas, extra_args=cfg)
        torch.testing.assert_close(out[one], single, rtol=1e-3, atol=1e-3)
        for a, b in zip(both.trace, alone.trace, strict=True):
            torch.testing.assert_close(a.next_lock[one], b.next_lock, rtol=1e-3, atol=1e-4)


def test_branches_one_by_one_equal_the_batch(setup):
    def result(**kw):
        return setup.lock(policy=kv.Constant(0.7), **kw).sample("heun", setup.x, setup.sigmas, extra_args=setup.cfg)

    torch.testing.assert_close(result(batched=False), result(), rtol=1e-3, atol=1e-3)


def test_texts_of_different_lengths_fall_back_to_one_by_one(setup):
    cfg = {**setup.cfg, "uncond": torch.zeros(1, 1, 8)}
    lock = setup.lock(policy=kv.Constant(0.7))
    lock.sample("euler", setup.x, setup.sigmas, extra_args=cfg)
    assert {s.nfe for s in lock.trace} == {3}
    assert {s.fused_layers for s in lock.trace} == {2}


class ScriptCFG(torch.nn.Module):
    """The CFGDenoiser of Stable-Diffusion scripts: somebody else's, doing its own guidance."""

    def __init__(self, model) -> None:
        super().__init__()
        self.inner_model = model
        self.scales: list = []

    def forward(self, x, sigma, uncond, cond, cond_scale):
        self.scales.append(cond_scale)
        x_in, sigma_in = torch.cat([x] * 2), torch.cat([sigma] * 2)
        uncond, cond = self.inner_model(x_in, sigma_in, cond=torch.cat([uncond, cond])).chunk(2)
        return uncond + (cond - uncond) * cond_scale


def test_wrapping_a_guided_denoiser_off_is_identical(setup):
    bare = run(ScriptCFG(setup.model), setup, "euler")
    lock = kv.KVLock(ScriptCFG(setup.model), source=setup.source, mask=setup.mask, policy=kv.Constant(0.0))
    assert lock.settings.scale_arg == "cond_scale"
    with lock:
        assert torch.equal(run(lock, setup, "euler"), bare)


def test_wrapping_a_guided_denoiser_equals_owning_the_guidance(setup):
    arguments = {"source": setup.source, "mask": setup.mask, "policy": kv.Constant(0.8)}
    own = kv.KVLock(setup.model, **arguments).sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    for branch in (None, setup.model):
        guided = kv.KVLock(ScriptCFG(setup.model), branch=branch, **arguments)
        out = guided.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
        torch.testing.assert_close(out, own, rtol=1e-3, atol=1e-3)
        assert {s.fused_layers for s in guided.trace} == {2}


def test_the_lock_drives_a_guided_denoisers_scale(setup):
    model = ScriptCFG(setup.model)
    lock = kv.KVLock(model, policy=kv.stateless(lambda o: kv.Control(cfg_scale=o.requested_cfg_scale * 0.5)))
    lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    assert model.scales[0] == 3.0  # nothing measured yet
    assert model.scales[-1] == 1.5
    torch.testing.assert_close(lock.trace.steps[-1].cfg_scale, torch.tensor([1.5]))


def test_guidance_of_one_skips_the_unconditional_pass(setup):
    def counted(policy, scale):
        lock = setup.lock(policy=policy)
        lock.sample("euler", setup.x, setup.sigmas, extra_args={**setup.cfg, "cond_scale": scale})
        return [s.nfe for s in lock.trace]

    assert set(counted(kv.Constant(lock=0.0), 1.0)) == {1}
    assert set(counted(kv.Constant(lock=1.0), 1.0)) == {2}
    assert set(counted(kv.Constant(lock=1.0), 3.0)) == {3}
    # Skipped, then needed after all: the missing pass is made up for.
    back = kv.stateless(lambda o: kv.Control(0.0, 1.0 if o.sigma > 1 else 4.0), uses_risk=False)
    counts = counted(back, 3.0)
    assert counts[0] == 1  # the first control holds for the first evaluation
    assert max(counts) == 2
    assert counts[-1] == 2


def test_the_control_of_cfg_acts_at_once_and_of_the_lock_next(setup):
    seen = []

    def policy(obs):
        seen.append(obs)
        return kv.Control(lock=0.5, cfg_scale=2.0 + len(seen))

    lock = setup.lock(policy=kv.stateless(policy))
    lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    steps = lock.trace.steps
    assert float(steps[0].lock) == 0.0
    assert float(steps[0].cfg_scale) == 3.0
    assert torch.isnan(steps[0].risk).all()
    assert float(steps[1].lock) == 0.0  # decided at step 1, in force from step 2
    assert float(steps[1].cfg_scale) == 3.0  # 2 + 1: of this very step
    assert float(steps[2].lock) == 0.5
    assert float(steps[2].cfg_scale) == 4.0


def test_scheduled_guidance_is_floored_and_the_floor_can_be_lifted(setup):
    calm = kv.stateless(lambda o: kv.Control(0.0, 0.0), uses_risk=False)
    for floor, expected in ((None, 1.0), (0.0, 0.0), (2.0, 2.0)):
        lock = setup.lock(policy=calm, cfg_floor=floor)
        lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
        assert {float(s.cfg_scale) for s in lock.trace} == {expected}
    assert kv.KVLock(setup.model, policy="paper").settings.cfg_floor == 0.0


def test_the_paper_preset_is_the_papers():
    lock = kv.KVLock(lambda x, sigma: x, policy="paper")
    assert lock.settings.threshold == 0.01
    assert lock.settings.rescale is True
    assert lock.settings.estimator == kv.TrajectoryVariance(window=10)


def test_variance_control_without_a_source(setup):
    lock = kv.KVLock(setup.model, policy=kv.policy.Clamped(kv.Linear(), lock=(0.0, 0.0)))
    assert torch.isfinite(lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)).all()
    greedy = kv.KVLock(
        setup.model, policy=kv.Smoothed(kv.stateless(lambda obs: kv.Control(1.0), uses_risk=False), half_life=1.0)
    )
    with greedy, pytest.raises(SourceError, match=r"asks for lock 1, but there is nothing to lock to.*\n.*Clamped"):
        greedy(setup.x, setup.sigmas[:1], **setup.cfg)


def test_renoise_probes_are_counted_and_locked(setup):
    lock = setup.lock(policy=kv.Linear(), estimator=kv.variance.RenoiseVariance(passes=2), threshold=1e-6)
    lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    # cond + uncond + 2 probes; with the lock on, a source row beside the branches and one beside the probes, or where
    # only what can change is computed one source pass for all of them.
    assert lock.trace.steps[0].nfe == 4
    assert lock.trace.steps[-1].nfe == (5 if lock.trace.steps[-1].computed < 1 else 6)


def test_a_threshold_may_depend_on_sigma(setup):
    def risks(threshold):
        lock = setup.lock(policy=kv.policy.Clamped(kv.Linear(), lock=(0, 0)), threshold=threshold)
        lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
        return [(s.sigma, float(s.variance), float(s.risk)) for s in lock.trace][1:]

    for sigma, variance, risk in risks(lambda sigma: 0.1 * sigma):
        assert risk == pytest.approx(variance / (0.1 * sigma), rel=1e-5)


def test_calling_outside_the_block_says_so(setup):
    lock = setup.lock()
    with pytest.raises(RunError, match="outside its `with` block"):
        lock(setup.x, setup.sigmas[:1], cond=setup.cond)


def test_attributes_of_the_model_show_through(setup):
    lock = setup.lock()
    assert lock.inner_model is setup.model.inner_model
    assert lock.prediction == setup.model.prediction
    with pytest.raises(AttributeError):
        _ = lock.no_such_thing


def test_bad_inputs_name_the_fix(setup):
    with pytest.raises(MaskError, match="no whole compression factor"):
        kv.KVLock(setup.model, source=setup.source, mask=torch.ones(1, 1, 3, 5, 5).triu())
    with pytest.raises(MaskError, match=r"(?i)nothing to edit"):
        kv.KVLock(setup.model, source=setup.source, mask=torch.zeros_like(setup.mask))
    with pytest.raises(MaskError, match="from_keep_mask"):
        kv.KVLock(setup.model, source=setup.source, mask=torch.ones_like(setup.mask))
    with pytest.raises(SourceError, match="non-finite"):
        kv.KVLock(setup.model, source=setup.source / 0, mask=setup.mask)
    with pytest.raises(SourceError, match="without mask"):
        kv.KVLock(setup.model, source=setup.source)
    with pytest.raises(SourceError, match="the sampler's x has"), setup.lock(policy=kv.Constant(1.0)) as lock:
        lock(setup.x[:, :, :2], setup.sigmas[:1], **setup.cfg)
    with pytest.raises(kv.KVLockError, match="nosuch"):
        setup.lock(policy="nosuch")
    with pytest.raises(kv.KVLockError, match="dpmpp_2m"):
        setup.lock().sample("dpmpp2m", setup.x, setup.sigmas, extra_args=setup.cfg)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda o: kv.Control(torch.zeros(5)), r"lock of shape \(5,\); expected \(batch,\) = \(1,\)"),
        (lambda o: kv.Control(0.0, torch.zeros(1, 7)), r"cfg_scale of shape \(1, 7\)"),
        (lambda o: kv.Control(1.5), r"a lock in \[1.5, 1.5\]; expected \[0, 1\]"),
        (lambda o: kv.Control(float("nan")), "lock with NaN or inf; expected finite numbers"),
        (lambda o: 0.5, r"returned float; expected a Control\(.*\), e.g. Control\(lock=0.5\)\."),
        (lambda o: kv.Control("high", 1.0), "lock of type str"),
    ],
)
def test_the_error_of_a_broken_policy_names_the_fix(setup, answer, message):
    with pytest.raises(PolicyError, match=message):
        setup.lock(policy=kv.stateless(answer)).sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)


def test_a_lock_per_token(setup):
    grid = torch.linspace(0, 1, 48).view(1, 48)
    lock = setup.lock(policy=kv.stateless(lambda o: kv.Control(grid), uses_risk=False))
    lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    assert lock.trace.rows()[-1]["lock"] == pytest.approx(0.5)


def test_a_transition_band_takes_a_fraction_of_the_lock(setup):
    mask = torch.zeros(1, 1, 3, 8, 8)
    mask[..., 0:2, 0:2] = 1  # the first token of every frame
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        original = attention.FusionContext.process
        patch.setattr(attention.FusionContext, "process", lambda s, *a: (seen.append(s.ratio), original(s, *a))[1])
        lock = kv.KVLock(setup.model, source=setup.source, mask=mask, policy=kv.Constant(0.8), transition=(1, 0.5))
        with lock:
            lock(setup.x, setup.sigmas[:1], **setup.cfg)
    frame = seen[0].view(3, 4, 4)[0]
    torch.testing.assert_close(frame[0], torch.tensor([0.0, 0.4, 0.8, 0.8]))
    torch.testing.assert_close(frame[:, 0], torch.tensor([0.0, 0.4, 0.8, 0.8]))
    for bad in ((0, 0.5), (1, 1.5)):
        with pytest.raises(MaskError, match="transition="), setup.lock(policy=kv.Constant(1.0), transition=bad) as lock:
            lock(setup.x, setup.sigmas[:1], **setup.cfg)


def test_steps_are_counted_where_the_schedule_is_known(setup):
    policy = kv.Windowed(kv.Constant(lock=1.0), last=2)
    counted = setup.lock(policy=policy)
    counted.sample("heun", setup.x, setup.sigmas, extra_args=setup.cfg)
    locked = [s.sigma for s in counted.trace if float(s.next_lock) == 1.0]
    assert max(locked) == pytest.approx(float(setup.sigmas[-3]))
    raw = setup.lock(policy=policy)
    with raw, pytest.raises(PolicyError, match="sigmas="):
        raw(setup.x, setup.sigmas[:1], **setup.cfg)
    told = setup.lock(policy=policy, sigmas=setup.sigmas)
    with told:
        told(setup.x, setup.sigmas[:1], **setup.cfg)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", range(3, 16))
def test_a_schedule_rounded_by_half_precision_is_the_schedule(setup, dtype, steps):
    seen = []

    @kv.stateless(uses_risk=False)
    def watching(obs):
        seen.append((obs.sigma, obs.steps_left))
        return kv.Control(lock=0.5)

    sigmas = torch.linspace(9.7, 0.13, steps).square()
    lock = kv.KVLock(setup.model, source=setup.source.to(dtype), mask=setup.mask, policy=watching)
    lock.sample("euler", (setup.x * 9).to(dtype), torch.cat([sigmas, torch.zeros(1)]), extra_args=setup.cfg)
    assert seen[1:] == list(zip(sigmas.tolist(), range(steps, 0, -1), strict=True))


def test_half_precision_keeps_its_dtype(setup):
    model = setup.model.to(torch.bfloat16)
    x, cond = setup.x.to(torch.bfloat16), setup.cond.to(torch.bfloat16)
    lock = kv.KVLock(model, source=setup.source, mask=setup.mask, policy=kv.Linear())
    cfg = {"cond": cond, "uncond": torch.zeros_like(cond), "cond_scale": 3.0}
    out = lock.sample("euler", x, setup.sigmas.to(torch.bfloat16), extra_args=cfg)
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()


class OwnScale(ScriptCFG):
    """A guided denoiser whose scale has a default that callers rely on."""

    def forward(self, x, sigma, cond, uncond, cond_scale=7.5):
        return super().forward(x, sigma, uncond, cond, cond_scale)


def test_a_models_own_default_scale_is_respected(setup):
    extra = {k: setup.cfg[k] for k in ("cond", "uncond")}
    bare = samplers.run("euler", OwnScale(setup.model), setup.x, setup.sigmas, extra_args=extra)
    lock = kv.KVLock(OwnScale(setup.model), source=setup.source, mask=setup.mask, policy="off")
    assert torch.equal(lock.sample("euler", setup.x, setup.sigmas, extra_args=extra), bare)
    assert {float(s.cfg_scale) for s in lock.trace} == {7.5}


def test_runs_in_one_block_do_not_share_noise(setup):
    other = torch.randn_like(setup.x) * setup.sigmas[0]
    lock = setup.lock(policy=kv.Constant(1.0))
    with lock:
        for x in (setup.x, other):
            last = samplers.euler(lock, x, setup.sigmas, extra_args=setup.cfg, disable=True)
    alone = setup.lock(policy=kv.Constant(1.0)).sample("euler", other, setup.sigmas, extra_args=setup.cfg)
    assert torch.equal(last, alone)


def test_methods_that_return_the_model_return_the_lock(setup):
    lock = setup.lock()
    assert lock.eval().to("cpu").requires_grad_(False) is lock
    with pytest.raises(RunError, match="outside its `with` block"):
        lock.forward(setup.x, setup.sigmas[:1], **setup.cfg)


def test_a_scale_without_uncond_is_refused(setup):
    with setup.lock() as lock, pytest.raises(RunError, match="without uncond"):
        lock(setup.x, setup.sigmas[:1], cond=setup.cond, cond_scale=7.5)
    with setup.lock(policy=kv.Constant(1.0, cfg_scale=4.0)) as lock:
        lock(setup.x, setup.sigmas[:1], cond=setup.cond)
        assert float(lock.trace.steps[0].cfg_scale) == 1.0


@pytest.mark.parametrize("policy", ["default", "pid", "full", "off", "paper"])
def test_sigma_zero_is_evaluated_and_decides_nothing(setup, policy):
    with setup.lock(policy=policy, sigmas=setup.sigmas) as lock:
        for sigma in (3.0, 1.0, 0.0):
            out = lock(setup.x / 100, torch.tensor([sigma]), **setup.cfg)
        assert torch.isfinite(out).all()
        assert len(lock.trace) == 2
    with setup.lock(policy=policy, sigmas=setup.sigmas) as lock:
        assert torch.isfinite(lock(setup.source, torch.zeros(1), **setup.cfg)).all()


@pytest.mark.parametrize("sigma", [-1.0, float("nan"), float("inf")])
def test_an_impossible_sigma_is_refused(setup, sigma):
    with setup.lock() as lock, pytest.raises(RunError, match="expected a noise level >= 0"):
        lock(setup.x, torch.tensor([sigma]), **setup.cfg)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "3", None, torch.tensor([float("nan")])])
def test_an_impossible_guidance_is_refused(setup, scale):
    if isinstance(scale, torch.Tensor):
        policy = kv.stateless(lambda o: kv.Control(0.5, scale), uses_risk=False)
        with setup.lock(policy=policy) as lock, pytest.raises(PolicyError, match="cfg_scale with NaN or inf"):
            lock(setup.x, setup.sigmas[:1], **setup.cfg)
        return
    with setup.lock() as lock, pytest.raises(RunError, match="cond_scale="):
        lock(setup.x, setup.sigmas[:1], **{**setup.cfg, "cond_scale": scale})


def test_more_options_that_cannot_be_used(setup, tmp_path):
    with pytest.raises(SourceError, match=r"torch.uint8; expected .* floating"):
        kv.KVLock(setup.model, source=setup.source.byte(), mask=setup.mask)
    with pytest.raises(SourceError, match="noise has shape"):
        setup.lock(noise=torch.zeros(1, 4, 2, 8, 8))
    for bad in (0, -1.0, float("nan"), "high", True):
        with pytest.raises(kv.KVLockError, match="threshold="):
            setup.lock(threshold=bad)
    path = tmp_path / "mine.toml"
    path.write_text(kv.to_toml(kv.Constant(0.3)))
    assert setup.lock(policy=path).settings.policy == kv.Constant(0.3)
    source = setup.source.clone().requires_grad_()
    with kv.KVLock(setup.model, source=source, mask=setup.mask, policy="full") as lock:
        assert not lock(setup.x, setup.sigmas[:1], **setup.cfg).requires_grad
    assert not kv.KVLock(setup.model).settings.policy.may_lock  # no source, no policy named: guidance alone
    told = setup.lock(policy=kv.Windowed(kv.Constant(1.0), last=2), sigmas=setup.sigmas.tolist())
    with told:
        told(setup.x, float(setup.sigmas[0]), **setup.cfg)


def test_going_far_back_up_keeps_the_runs_noise(setup):
    lock = setup.lock(policy=kv.Constant(1.0))
    with lock:
        lock(setup.x, setup.sigmas[:1], **setup.cfg)
        first = lock._run().noise
        for sigma in torch.logspace(2, -1, 20):  # deeper than the timeline remembers
            lock(setup.x / 100, sigma.view(1), **setup.cfg)
        lock(setup.x / 10, torch.tensor([200.0]), **setup.cfg)
        assert lock._run().noise is first
        lock(setup.x * 2, setup.sigmas[:1], **setup.cfg)  # from the top again: another run
        assert not torch.equal(lock._run().noise, first)


def test_the_schedule_is_on_the_clock_of_the_policies(setup):
    """A model that keeps flow time t is told a schedule of t; policies count the steps in sigma."""

    class FlowForm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner_model = setup.model

        def to_ve(self, t):
            return t / (1 - t)

        def add_noise(self, x0, noise, t):
            return (1 - t) * x0 + t * noise

        def forward(self, z, t, **extra_args):
            return setup.model(z / (1 - t), t / (1 - t), **extra_args)

    seen = []

    @kv.stateless
    def watching(obs):
        seen.append((obs.sigma, obs.steps_left))
        return kv.Control(lock=0.0)

    times = torch.tensor([0.9, 0.7, 0.5, 0.2, 0.0])
    lock = kv.KVLock(FlowForm(), policy=watching)
    with lock:
        lock.on_schedule(times)
        for t in times[:-1]:
            lock(setup.x * 0.1, t, cond=setup.cond)
    assert [left for _, left in seen] == [3, 2, 1]  # a policy is asked from the second evaluation on
    assert seen[0][0] == pytest.approx(0.7 / 0.3)


def test_a_policy_that_locks_although_it_never_does_raises(setup):
    class Liar(kv.Policy):
        may_lock = False

        def step(self, state, obs):
            return state, kv.Control(lock=1.0)

    lock = setup.lock(policy=Liar())
    with pytest.raises(PolicyError, match=r"returned lock 1, but its may_lock is False; let it be True"):
        lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)


def test_the_sources_noise_leads_to_the_runs_first_x_also_where_locking_begins_later(setup, monkeypatch):
    seen, at = [], Source.at

    def noting(self, x, sigma, noise):
        seen.append(noise)
        return at(self, x, sigma, noise)

    monkeypatch.setattr(Source, "at", noting)
    late = setup.lock(policy=kv.Windowed(kv.Constant(1.0), last=2))
    late.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    assert [float(step.lock) for step in late.trace][:2] == [0.0, 0.0]
    assert seen
    for noise in seen:
        torch.testing.assert_close(noise, (setup.x - setup.source) / setup.sigmas[0])


@kv.stateless
def fading(obs):
    return kv.Control(lock=obs.risk.clamp(0, 1))


def test_policies_under_the_decorator_are_pickled_by_name():
    assert pickle.loads(pickle.dumps(fading)) is fading
    plain = kv.stateless(tracked, uses_risk=False)
    assert pickle.loads(pickle.dumps(plain)) == plain


def tracked(obs):
    return kv.Control(lock=0.5)


def test_a_lock_that_ran_in_inference_mode_gives_gradients(setup):
    def gradient(lock):
        x = setup.x.clone().requires_grad_(True)
        with lock:
            lock(x, setup.sigmas[:1], **setup.cfg).sum().backward()
        return x.grad

    used, fresh = (setup.lock(policy="full", transition=(1, 0.5)) for _ in range(2))
    with torch.inference_mode():
        used.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    assert torch.equal(gradient(used), gradient(fresh))


def test_off_is_off_within_any_reach(setup):
    wanted = kv.samplers.euler(kv.CFGDenoiser(setup.model), setup.x, setup.sigmas, extra_args=setup.cfg)
    lock = setup.lock(policy="off", reach=0.5)
    assert torch.equal(lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg), wanted)
    with pytest.warns(UserWarning, match="erase= without effect"):
        setup.lock(policy="off", erase=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("policy", ["off", "half", "full"])
def test_an_x_that_is_not_finite_is_named(setup: Setup, policy: str, bad: float) -> None:
    x = setup.x.clone()
    x[0, 0, 0, 0, 0] = bad  # in the background, which full lock replaces
    with (
        torch.no_grad(),
        setup.lock(policy=policy, noise="fixed") as lock,
        pytest.raises(RunError, match="x holds NaN"),
    ):
        lock(x, setup.sigmas[:1], **setup.cfg)


def test_a_prediction_at_no_noise_that_is_not_finite_is_named(setup: Setup) -> None:
    def model(x, sigma, cond):
        return x * (float("nan") if float(sigma.max()) == 0 else 0.5)

    lock = kv.KVLock(model, source=setup.source, mask=setup.mask, policy="off")
    with lock, pytest.raises(RunError, match="sigma=0 holds NaN"):
        lock(setup.x, torch.zeros(1), **setup.cfg)


@pytest.mark.parametrize("policy", ["default", "sigmoid"])
def test_clips_of_a_run_that_are_called_apart_are_named(pair: Setup, policy: str) -> None:
    one = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in pair.cfg.items()}
    given = {"source": pair.source[:1], "mask": pair.mask[:1], "policy": policy, "noise": "fixed"}
    with torch.no_grad(), kv.KVLock(pair.model, **given) as lock:
        for sigma in pair.sigmas[:2]:
            lock(pair.x, sigma.expand(2), **pair.cfg)
        with pytest.raises(RunError, match=r"(?s)x has shape \(1, .* the run began with \(2, .*on_schedule"):
            lock(pair.x[:1], pair.sigmas[2:3], **one)
    larger = torch.cat([pair.x, pair.x], -1)
    with torch.no_grad(), kv.KVLock(pair.model, policy="default") as lock:
        for sigma in pair.sigmas[:2]:
            lock(pair.x, sigma.expand(2), **pair.cfg)
        with pytest.raises(RunError, match="the run began with"):
            lock(larger, pair.sigmas[2].expand(2), **pair.cfg)
        lock.on_schedule(pair.sigmas[2:])
        assert lock(larger, pair.sigmas[2].expand(2), **pair.cfg).shape == larger.shape


def test_tiles_of_several_sizes_may_share_a_run_that_knows_nothing_of_them(setup: Setup) -> None:
    with torch.no_grad(), kv.KVLock(setup.model, policy=kv.Constant(cfg_scale=2.0)) as lock:
        for sigma in setup.sigmas[:2]:
            for tile in (setup.x, setup.x[..., :4]):
                assert lock(tile, sigma.expand(1), **setup.cfg).shape == tile.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_a_noise_level_in_pythons_numbers_is_that_of_a_tensor(dtype: torch.dtype, default: torch.dtype) -> None:
    seen: list[float] = []

    def model(x, sigma, cond):
        seen.append(float(sigma.flatten()[0].double()))
        return 0.5 * x

    x, before = torch.randn(1, 4, 2, 4, 4, dtype=dtype), torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        with kv.KVLock(model, policy="off") as lock:
            for model_of in (lock, kv.CFGDenoiser(model)):
                model_of(x, 999.1, cond=x, uncond=x, cond_scale=2.0)
    finally:
        torch.set_default_dtype(before)
    wide = torch.promote_types(dtype, torch.float32)
    assert set(seen) == {float(torch.tensor(999.1, dtype=wide).double())}


@pytest.mark.parametrize("policy", [kv.Sigmoid(), kv.Constant(lock=1.0)])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_run_of_checkpoints_around_the_lock_is_the_run_itself(setup, policy, reentrant):
    """Gradients at every step, as guidance by a loss takes them. torch ends the second evaluation by an exception."""
    runs = []
    for checkpointed in (False, True):
        x, found = setup.x, []
        with setup.lock(policy=policy) as lock:
            for sigma, below in itertools.pairwise(setup.sigmas):
                x = x.detach().requires_grad_()

                def call(x, sigma=sigma, lock=lock):
                    return lock(x, sigma[None], **setup.cfg)

                kept = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=reentrant) if checkpointed else call(x)
                kept.square().sum().backward()
                found += [kept.detach(), x.grad]
                x = kept + (x - kept) * below / sigma
        runs.append(torch.stack(found))
    torch.testing.assert_close(*runs)
    assert float(lock.trace.steps[-1].lock.max()) > 0


def test_a_call_that_fails_leaves_the_run_as_it_was(setup):
    """Also the noise of the run, which the first x leads to."""

    def run(slip):
        lock = setup.lock(policy="half")
        with lock:
            if slip == "first":
                with pytest.raises(RuntimeError):
                    lock(2 * setup.x, setup.sigmas[0], **{**setup.cfg, "cond": torch.zeros(1, 3, 5)})
            lock(setup.x, setup.sigmas[0], **setup.cfg)
            if slip == "later":
                with pytest.raises(RuntimeError):
                    lock(setup.x, setup.sigmas[0] * 1.2, **{**setup.cfg, "cond": torch.zeros(1, 3, 5)})
            return lock(setup.x / 100, setup.sigmas[2], **setup.cfg)

    wanted = run(None)
    assert torch.equal(run("first"), wanted)
    assert torch.equal(run("later"), wanted)


def test_a_model_that_wants_the_schedule_is_told_it_under_a_lock_too(setup):
    class Model:
        def __init__(self):
            self.told = []

        def __call__(self, x, sigma, **given):
            return setup.model(x, sigma, **given)

        def on_schedule(self, sigmas):
            self.told.append(sigmas)

    lock = kv.KVLock(model := Model(), policy="off")
    lock.sample("euler", setup.x, setup.sigmas, extra_args={"cond": setup.cond})
    (told,) = model.told
    assert torch.equal(told, setup.sigmas)


def test_a_model_that_guides_under_another_name_is_told_to_name_it(setup):
    def guided(x, sigma, cond, uncond=None, guidance=1.0):
        return kv.CFGDenoiser(setup.model)(x, sigma, uncond, cond, guidance)

    with pytest.raises(RunError, match=r"function takes uncond, so it guides by itself.* scale_arg='guidance'"):
        kv.KVLock(guided, policy="off")
    lock = kv.KVLock(guided, policy="off", scale_arg="guidance")
    args = {"cond": setup.cond, "uncond": setup.uncond, "guidance": 3.0}
    wanted = kv.samplers.euler(guided, setup.x, setup.sigmas, extra_args=args)
    assert torch.equal(lock.sample("euler", setup.x, setup.sigmas, extra_args=args), wanted)


@pytest.mark.parametrize("index", [[0, 2], torch.tensor([0, 2]), torch.tensor([True, False, True])])
def test_clips_are_chosen_by_numbers_or_by_a_mask_of_clips(index):
    given = {"cond": ["a", "b", "c"], "text": torch.arange(3)}
    assert take(given, index, 3)["cond"] == ["a", "c"]
    assert take(given, index, 3)["text"].tolist() == [0, 2]


@pytest.mark.parametrize("policy", ["default", "release", "sigmoid", "paper", "full"])
@pytest.mark.parametrize("split", [2, 4])
@pytest.mark.parametrize(("sampler", "churn"), [("euler", 0.0), ("heun", 0.0), ("heun", 100.0)])
def test_a_run_may_be_several_calls_of_samplers(
    pair: Setup, policy: str, split: int, sampler: str, churn: float
) -> None:
    """Measurements, noise and steps left go on; with all that heun knows, since a call begins where it ended."""
    run, steps = partial(kv.samplers.get(sampler), s_churn=churn), []
    lock = pair.lock(policy=policy)
    torch.manual_seed(1)
    with lock:
        whole = run(lock, pair.x, pair.sigmas, extra_args=pair.cfg, disable=True)
    steps.append([step.sigma for step in lock.trace])
    torch.manual_seed(1)
    with lock:
        half = run(lock, pair.x, pair.sigmas[: split + 1], extra_args=pair.cfg, disable=True)
        again = run(lock, half, pair.sigmas[split:], extra_args=pair.cfg, disable=True)
    assert torch.equal(again, whole)
    assert [step.sigma for step in lock.trace] == steps[0]


def test_a_run_that_goes_on_knows_the_steps_that_are_left(pair: Setup) -> None:
    left = []

    @kv.stateless
    def watching(obs):
        left.append(obs.steps_left)
        return kv.Control(lock=0.5)

    with pair.lock(policy=watching) as lock:
        half = kv.samplers.euler(lock, pair.x, pair.sigmas[:3], extra_args=pair.cfg)
        kv.samplers.euler(lock, half, pair.sigmas[2:], extra_args=pair.cfg)
    count = len(pair.sigmas) - 1
    assert left[1:] == list(range(count - 2, 0, -1))


@pytest.mark.parametrize("given", [False, True])
def test_a_sampler_that_is_called_step_by_step_keeps_the_known_schedule(pair: Setup, given: bool) -> None:
    left, count = [], len(pair.sigmas) - 1

    @kv.stateless
    def watching(obs):
        left.append(obs.steps_left)
        return kv.Control(lock=0.5)

    def by_steps(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(count):
            x = kv.samplers.euler(model, x, sigmas[i : i + 2], extra_args=extra_args, disable=True)
        return x

    if given:
        with pair.lock(policy=watching, sigmas=pair.sigmas) as lock:
            x0 = by_steps(lock, pair.x, pair.sigmas, extra_args=pair.cfg)
    else:
        x0 = pair.lock(policy=watching).sample(by_steps, pair.x, pair.sigmas, extra_args=pair.cfg)
    assert left == list(range(count - 1, 0, -1))  # nothing is measured at the first
    assert torch.equal(pair.lock(policy=watching).sample("euler", pair.x, pair.sigmas, extra_args=pair.cfg), x0)


def test_rescaled_guidance_is_that_of_the_model_in_any_form() -> None:
    class Exploding(torch.nn.Module):  # x = x0 + sigma noise
        def forward(self, x, sigma, cond):
            return GaussianDenoiser(mean=cond, std=1.0)(x, sigma)

    class Flow(Exploding):  # the same model in flow time, x = (1 - t) x0 + t noise
        def add_noise(self, x0, noise, t):
            return (1 - t) * x0 + t * noise

        def to_ve(self, t):
            return t / (1 - t)

        def forward(self, x, t, cond):
            t = t.view(-1, 1, 1)
            return super().forward(x / (1 - t), (t / (1 - t)).flatten(), cond)

    noise = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0)).double()
    times = torch.tensor([0.9, 0.7, 0.4, 0.1, 0.0]).double()
    plain = torch.linspace(-1, 1, 4).double().expand(1, 8, 4)
    args = {"cond": torch.ones(1, 8, 4).double(), "uncond": plain, "cond_scale": 3.0}
    runs = []
    for model, levels in ((Exploding(), times / (1 - times)), (Flow(), times)):
        lock = kv.KVLock(model, policy="off", rescale=True)
        runs.append(lock.sample("euler", noise * levels[0], levels, extra_args=args))
    torch.testing.assert_close(*runs, rtol=0, atol=1e-12)


def test_scales_per_clip_of_a_model_that_guides_itself_have_its_dtype(pair):
    def guided(x, sigma, cond, uncond, cond_scale=1.0):
        c, u = (pair.model(x, sigma, cond=text) for text in (cond, uncond))
        return u + (c - u) * cond_scale

    scales = torch.tensor([2.0, 3.0], dtype=torch.float64)
    policy = kv.stateless(lambda obs: kv.Control(cfg_scale=scales), uses_risk=False)
    with kv.KVLock(guided, policy=policy) as lock:
        out = lock(pair.x, pair.sigmas[:1], **pair.cfg)
    wanted = guided(pair.x, pair.sigmas[:1], pair.cond, pair.uncond, scales.float().view(2, 1, 1, 1, 1))
    assert torch.equal(out, wanted)
    assert out.dtype == pair.x.dtype


def test_a_scale_that_a_callback_changes_in_place_is_traced_as_it_acted(pair: Setup) -> None:
    scale, seen = torch.full((len(pair.x),), 3.0), []

    @partial(kv.stateless, uses_risk=False)
    def watching(obs):
        seen.append(obs.requested_cfg_scale)
        return kv.Control()

    lock = kv.KVLock(pair.model, policy=watching)
    change = lambda info: scale.mul_(0.5)  # noqa: E731
    lock.sample("euler", pair.x, pair.sigmas, extra_args=pair.cfg | {"cond_scale": scale}, callback=change)
    expected = [3.0 * 0.5**i for i in range(len(pair.sigmas) - 1)]
    assert [float(step.cfg_scale[0]) for step in lock.trace] == expected
    assert [float(given[0]) for given in seen[1:]] == expected  # before its first step it is asked for its start


@pytest.mark.parametrize("sampler", ["dpm_2_ancestral", "dpmpp_2s_ancestral"])
def test_an_eta_above_1_may_lead_below_the_last_level(pair: Setup, sampler: str) -> None:
    lock, sigmas = pair.lock(policy="half"), samplers.flow_sigmas(8)[:5]
    with lock:
        x0 = kv.samplers.get(sampler)(lock, pair.x, sigmas, extra_args=pair.cfg, eta=1.2, disable=True)
    assert x0.isfinite().all()
    assert min(step.sigma for step in lock.trace) < float(sigmas[-1]) / 1.5
