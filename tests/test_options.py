"""Options at the door of a lock: what cannot be meant is refused, what would do nothing is told, nothing goes stale."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass

import pytest
import torch

import kvlock_sampling as kv
from kvlock_sampling import settings as options
from kvlock_sampling.types import EstimatorError, MaskError, PolicyError, RunError, SourceError

OFF, HALF = kv.Constant(0.0), kv.Constant(0.5)


@dataclass(frozen=True)
class Silent(kv.variance.Estimator):
    """Reports where there is an unconditional prediction only."""

    def step(self, state, evaluation):
        return state, None if evaluation.uncond is None else torch.ones(len(evaluation.x))


def euler(lock, setup, **changes):
    return lock.sample("euler", setup.x, setup.sigmas, extra_args={**setup.cfg, **changes})


def warned(recwarn) -> list[str]:
    """What this library has said since the last look, nobody else's warnings."""
    texts = [str(w.message) for w in recwarn.list if "without effect" in str(w.message) or "uncond" in str(w.message)]
    recwarn.clear()
    return texts


# a lock around a lock


def test_a_lock_around_a_lock_is_refused_however_it_is_wrapped(setup):
    inner = setup.lock(policy=HALF)
    with pytest.raises(RunError, match=r"^model is a KVLock; expected the denoiser itself.*\n.*KVLock\(lock.model"):
        kv.KVLock(inner, source=setup.source, mask=setup.mask)
    with pytest.raises(RunError, match=r"^model is a FlowDenoiser around a KVLock"):
        kv.KVLock(kv.FlowDenoiser(inner))
    with pytest.raises(RunError, match="is a KVLock"):
        kv.KVLock(kv.CFGDenoiser(setup.model), source=setup.source, mask=setup.mask, branch=inner)
    again = kv.KVLock(inner.model, source=setup.source, mask=setup.mask, policy=HALF)  # what the message says works
    torch.testing.assert_close(euler(again, setup), euler(inner, setup), rtol=0, atol=0)


# a source and a mask that are changed afterwards


@pytest.mark.parametrize("policy", [HALF, kv.Constant(1.0)])
def test_source_mask_and_noise_are_copied(setup, policy):
    noise = torch.randn_like(setup.source)
    expected = euler(setup.lock(policy=policy, noise=noise.clone()), setup)
    source, mask = setup.source.clone(), setup.mask.clone()
    lock = kv.KVLock(setup.model, source=source, mask=mask, noise=noise, policy=policy)
    source.zero_(), noise.zero_(), mask.zero_()
    assert torch.equal(euler(lock, setup), expected)
    array = setup.mask.numpy().copy()
    lock = kv.KVLock(setup.model, source=setup.source, mask=array, policy=policy)
    array[:] = 1
    assert torch.equal(lock.settings.mask.latent(setup.source), setup.mask)
    assert torch.equal(lock.settings.mask.latent(torch.zeros(2, *setup.source.shape[1:]))[:1], setup.mask)


def test_a_source_made_in_inference_mode_is_an_ordinary_tensor_in_the_lock(setup):
    with torch.inference_mode():
        lock = kv.KVLock(setup.model, source=setup.source * 1, mask=setup.mask * 1, noise=torch.randn_like(setup.x) * 1)
    assert not any(
        t.is_inference() for t in (lock.settings.source.latents, lock.settings.source.noise, lock.settings.mask.given)
    )


def test_prompts_are_read_at_every_evaluation(setup):
    cond = setup.cond + 1
    lock = setup.lock(policy=kv.Constant(1.0), source_args={"cond": cond})
    before = euler(lock, setup)
    cond.copy_(setup.cond)
    assert torch.equal(euler(lock, setup), euler(setup.lock(policy=kv.Constant(1.0)), setup))
    assert not torch.equal(euler(lock, setup), before)


# without a source


ABOUT_A_SOURCE = ["source_args", "noise", "reach", "layers", "transition", "branch", "foreground", "kv_cache"]


@pytest.mark.parametrize("name", ABOUT_A_SOURCE)
def test_what_is_about_a_source_needs_one(setup, name):
    value = {
        "source_args": {"cond": setup.cond},
        "noise": "fixed",
        "reach": 0.5,
        "layers": [0],
        "transition": (1, 0.5),
        "branch": setup.model,
        "foreground": True,
        "kv_cache": kv.KVCache(),
    }[name]
    with pytest.raises(SourceError, match=f"^{name}= without source=.*\n.*source=latents and mask=mask"):
        kv.KVLock(setup.model, policy=OFF, **{name: value})


def test_what_says_nothing_needs_no_source(setup, recwarn):
    kv.KVLock(setup.model, policy=OFF, source_args={}, foreground=False, batched=False)
    assert warned(recwarn) == []


def test_an_estimator_that_measures_no_effect_under_a_policy_that_reads_it(setup):
    lock = setup.lock(policy="default", estimator=kv.variance.RenoiseVariance())
    with pytest.raises(PolicyError, match=r"(?s)Release\.step.*estimator=kv\.variance\.Divergence.*policy='sigmoid'"):
        euler(lock, setup)


def test_a_policy_that_reads_effects_is_told_where_none_are_measured(setup, recwarn):
    def mine(obs):
        return kv.Control(lock=1.0, composite=(obs.effect < 1).float())

    default = kv.load_policy("default")
    for policy in (default, mine, kv.Smoothed(default, half_life=0.3), kv.Windowed(kv.stateless(mine), below=3.0)):
        with pytest.warns(UserWarning, match="effect") as seen:
            setup.lock(policy=policy)
        told = str(seen[0].message)
        assert "reads obs.effect, which TrajectoryVariance(" in told
        setup.lock(policy=policy, estimator=eval(told.rpartition("estimator=")[2].rstrip("."), {"kv": kv}))
        setup.lock(policy=policy, estimator=kv.variance.Sparse(kv.variance.Divergence(), every=2))
    setup.lock(policy="sigmoid"), setup.lock(policy="default"), setup.lock(policy=lambda obs: kv.Control(lock=1.0))
    assert not recwarn.list


def test_several_slips_are_named_together(setup):
    with pytest.raises(SourceError, match=r"^layers=, transition= without source="):
        kv.KVLock(setup.model, layers=[0], transition=(1, 0.5))


def test_a_mask_without_a_source_says_where_to_measure(setup, recwarn):
    everywhere = kv.KVLock(setup.model, policy=kv.policy.Clamped(kv.Sigmoid(), lock=(0.0, 0.0)))
    inside = kv.KVLock(setup.model, mask=setup.mask, policy=everywhere.settings.policy)
    euler(everywhere, setup), euler(inside, setup)
    assert warned(recwarn) == []
    assert not torch.equal(everywhere.trace.steps[-1].variance, inside.trace.steps[-1].variance)
    kv.KVLock(setup.model, mask=setup.mask, policy=OFF)
    for policy in ("default", "sigmoid", "paper", "release", kv.Linear(), kv.PID(target=1.0)):
        with pytest.raises(SourceError, match=r"mask= without source=.*\n.*source=latents") as raised:
            kv.KVLock(setup.model, mask=setup.mask, policy=policy)
        made = policy if isinstance(policy, kv.policy.Policy) else kv.load_policy(policy)
        said = eval(str(raised.value).rpartition("policy=")[2].rstrip("."), {"kv": kv, "policy": made})
        if policy != "release":  # it compares with a source
            euler(kv.KVLock(setup.model, mask=setup.mask, policy=said), setup)
    assert warned(recwarn)[0].startswith("mask= without effect: the policy Constant(lock=0.0")


@pytest.mark.parametrize("policy", [HALF, "half", "full", "fast"])
def test_a_constant_lock_without_a_source_is_refused_before_the_run(setup, policy):
    with pytest.raises(SourceError, match=r"asks for lock (1|0\.5), but there is nothing to lock to.*\n.*") as error:
        kv.KVLock(setup.model, mask=setup.mask, policy=policy)
    policy = kv.load_policy(policy) if isinstance(policy, str) else policy
    written = re.search(r"Clamped\(.*\)\)", str(error.value))
    forbidden = eval(written[0], {"Clamped": kv.policy.Clamped, "policy": policy})  # what the message says works
    lock = kv.KVLock(setup.model, policy=forbidden)
    assert torch.equal(euler(lock, setup), euler(kv.KVLock(setup.model, policy=OFF), setup))


@pytest.mark.parametrize("policy", ["paper", "static", kv.Windowed(HALF, last=2)])
def test_a_lock_that_only_the_run_can_show_raises_there(setup, policy):
    lock = kv.KVLock(setup.model, policy=policy)
    with pytest.raises(SourceError, match="but there is nothing to lock to"):
        euler(lock, setup)


# under a policy that never locks, or never looks


def test_off_ignores_what_describes_and_warns_of_what_was_asked_for(setup, recwarn):
    described = {"source_args": {"cond": setup.cond}, "noise": "fixed", "layers": kv.find_layers(setup.model)}
    off = setup.lock(policy="off", **described)
    assert warned(recwarn) == []
    plain = kv.samplers.euler(kv.CFGDenoiser(setup.model), setup.x, setup.sigmas, extra_args=setup.cfg)
    assert torch.equal(euler(off, setup), plain)
    off = setup.lock(policy="off", kv_cache=kv.KVCache(), layers=[0], transition=(1, 0.5), foreground=True)
    assert [t.split(":")[0] for t in warned(recwarn)] == ["layers=, transition=, foreground=, kv_cache= without effect"]
    assert off.settings.kv_cache is None


@pytest.mark.parametrize("policy", [HALF, "off", "fast"])
def test_measuring_for_a_policy_that_never_looks_warns(setup, policy, recwarn):
    lock = setup.lock(policy=policy, estimator=kv.variance.RenoiseVariance(passes=1), threshold=0.5)
    assert [t.split(":")[0] for t in warned(recwarn)] == ["estimator=, threshold= without effect"]
    euler(lock, setup)
    assert all(torch.isnan(step.risk).all() for step in lock.trace)  # indeed


def test_the_measuring_constant_of_the_message_measures_and_holds(setup, recwarn):
    lock = setup.lock(policy=kv.PID(kp=0.0, ki=0.0, bias=0.5), estimator=kv.variance.RenoiseVariance(passes=1))
    euler(lock, setup)
    assert warned(recwarn) == []
    assert all(torch.isfinite(step.risk).all() and float(step.lock) == 0.5 for step in lock.trace)


def test_a_run_in_which_nothing_could_be_measured_warns(setup):
    gap = setup.lock(policy="sigmoid", estimator=Silent())
    with pytest.warns(UserWarning, match=r"nothing was measured in a run of 6 evaluations, so Sigmoid.*Silent"):
        gap.sample("euler", setup.x, setup.sigmas, extra_args={"cond": setup.cond})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        euler(gap, setup)
        with gap:  # one evaluation is no run
            gap(setup.x, setup.sigmas[:1], cond=setup.cond)


def runs(lock, setup, *lengths, told_schedule):
    """Several runs in one block, each over the first noise levels; the sampler tells its schedule or does not."""
    model = lock if told_schedule else lambda x, sigma, **args: lock(x, sigma, **args)
    with lock:
        for steps in lengths:
            kv.samplers.euler(model, setup.x, setup.sigmas[: steps + 1], extra_args={"cond": setup.cond})


@pytest.mark.parametrize("told_schedule", [True, False])
def test_runs_of_one_block_are_looked_at_one_by_one(setup, told_schedule):
    lock = setup.lock(policy="sigmoid")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs(lock, setup, 6, 1, told_schedule=told_schedule)  # the second is too short to measure in, the first is not
        assert any(torch.isfinite(step.variance).all() for step in lock.trace)
        runs(lock, setup, 1, 1, 1, told_schedule=told_schedule)
        assert len(lock.trace) == 3
    gap = setup.lock(policy="sigmoid", estimator=Silent())
    with pytest.warns(UserWarning, match="nothing was measured in a run of 5 evaluations"):
        runs(gap, setup, 3, 5, 1, told_schedule=told_schedule)


# beside a model that does its own guidance


def test_options_of_branches_warn_where_the_model_has_its_own(setup, recwarn):
    arguments = {"source": setup.source, "mask": setup.mask, "policy": HALF}
    guided = kv.CFGDenoiser(setup.model)
    kv.KVLock(guided, **arguments, branch=setup.model)
    assert warned(recwarn) == []
    kv.KVLock(guided, **arguments, rescale=True, batched=False)
    assert warned(recwarn)[0].startswith("rescaled guidance, batched=False without effect: this model takes cond_scale")
    kv.KVLock(guided, **{**arguments, "policy": "paper"})
    assert "rescaled guidance without effect" in warned(recwarn)[0]


def test_a_branch_of_a_model_without_guidance_is_refused(setup):
    with pytest.raises(SourceError, match=r"branch was given.*takes no cond_scale"):
        setup.lock(policy=HALF, branch=setup.model)


def test_a_scale_that_the_model_does_not_take_is_refused(setup):
    def script(x, sigma, cond, guidance=3.0):
        return setup.model(x, sigma, cond=cond)

    assert kv.KVLock(script, scale_arg="guidance").settings.scale_arg == "guidance"
    with pytest.raises(RunError, match="scale_arg='scale' is no argument of function, which takes x, sigma, cond, gui"):
        kv.KVLock(script, scale_arg="scale")


def test_the_source_is_not_guided(setup):
    with pytest.raises(SourceError, match="source_args holds uncond and cond_scale"):
        setup.lock(policy=HALF, source_args=setup.cfg)


def test_an_unconditional_prompt_without_a_scale_warns_once(setup, recwarn):
    prompts = {"cond": setup.cond, "uncond": setup.uncond}
    lock = setup.lock(policy=HALF)
    lock.sample("euler", setup.x, setup.sigmas, extra_args=prompts)
    assert [t[:33] for t in warned(recwarn)] == ["uncond was given without cond_sca"]
    assert lock.trace.nfe == 2 * 6  # indeed: cond and source
    setup.lock(policy=kv.Constant(0.5, cfg_scale=3.0)).sample("euler", setup.x, setup.sigmas, extra_args=prompts)
    euler(lock, setup, cond_scale=1.0)
    assert warned(recwarn) == []


# values


@pytest.mark.parametrize("name", ["rescale", "batched", "foreground"])
def test_switches_are_true_or_false(setup, name):
    with pytest.raises(kv.KVLockError, match=f"{name}='no'; expected True or False"):
        setup.lock(**{name: "no"})


@pytest.mark.parametrize("floor", ["x", float("nan"), -1, True])
def test_a_floor_is_a_guidance_scale(setup, floor):
    with pytest.raises(PolicyError, match=r"cfg_floor=.*finite number >= 0"):
        setup.lock(cfg_floor=floor)


@pytest.mark.parametrize("policy", [HALF, OFF])
def test_a_transition_band_is_checked_when_the_lock_is_made(setup, policy):
    with pytest.raises(MaskError, match=r"transition=\(-1, 0.5\); expected"):
        setup.lock(policy=policy, transition=(-1, 0.5))


@pytest.mark.parametrize("reach", [0, -1, float("nan"), "near", True, torch.tensor([0.5, 1.0])])
def test_reach_is_a_number_above_0(setup, reach):
    with pytest.raises(MaskError, match=r"reach=.*number > 0.*widths of the mask"):
        setup.lock(reach=reach)


def test_reach_comes_from_the_preset_unless_it_is_given(setup, recwarn):
    text = 'reach = 0.5\n[policy]\ntype = "ReleaseBelow"\n'
    assert setup.lock(policy=text).settings.mask.reach == kv.presets.load_preset(text).reach == 0.5
    assert setup.lock(policy=text, reach=2).settings.mask.reach == 2
    assert (
        setup.lock(policy="full").settings.mask.reach
        == setup.lock(policy=text, reach=math.inf).settings.mask.reach
        == math.inf
    )
    with pytest.raises(PolicyError, match="reach"):
        kv.presets.load_preset(text.replace("0.5", "-1"))
    assert warned(recwarn) == []


@pytest.mark.parametrize(
    ("given", "works"), [(kv.variance.RenoiseVariance, r"RenoiseVariance\(\)"), ("renoise", r"kv\.variance\.Reno")]
)
def test_an_estimator_is_an_object(setup, given, works):
    with pytest.raises(EstimatorError, match=rf"expected an Estimator, e\.g\. estimator={works}"):
        setup.lock(estimator=given)


def test_names_of_what_was_given():
    assert options._named({"a": None, "b": False, "c": {}, "d": 0.0, "e": "x"}) == "d=, e="
    assert options._named({}) == ""


@pytest.mark.parametrize("weight", ["no", -0.1, 1.1, float("nan")])
def test_composite_is_a_weight(setup, weight):
    with pytest.raises(kv.KVLockError, match=r"composite=.*>= 0 and <= 1.*True or False"):
        setup.lock(composite=weight)


# arguments of the wrong kind


@pytest.mark.parametrize("given", [torch.ones(2, 3), "a red ball"])
def test_source_args_are_a_dict(setup, given):
    with pytest.raises(SourceError, match="expected a dict"):
        setup.lock(source_args=given)


def test_conditions_of_another_batch_are_refused(setup):
    """Also by a model that would cut them to size without a word, and in the source's own arguments."""
    two, label = setup.cond.repeat(2, 1, 1), torch.tensor([1, 2])
    for model in (setup.model, lambda x, sigma, cond: x * 0.5, lambda x, sigma, cond: torch.cat([x, x])):
        for cond in (two, label, ["a ball", "a cube"]):
            lock = kv.KVLock(model, policy="off")
            with pytest.raises(RunError, match=r"cond in extra_args has 2 rows for 1 clip\(s\)") as raised:
                lock.sample("euler", setup.x, setup.sigmas, extra_args={"cond": cond})
            assert ("cond[None]" in str(raised.value)) == isinstance(cond, torch.Tensor)
            assert "cond=cond[:1], or as many rows of x" in str(raised.value)
    three = torch.cat([setup.x] * 3)
    with pytest.raises(RunError, match=r"2 rows for 3 clip.*: repeat what clips share"):
        lock.sample("euler", three, setup.sigmas, extra_args={"cond": two})
    with pytest.raises(RunError, match="cond in source_args has 2 rows"):
        euler(setup.lock(policy=HALF, source_args={"cond": two}), setup)
    lock = kv.KVLock(lambda x, sigma, cond: torch.cat([x, x]), policy="off")
    with pytest.raises(RunError, match=r"the model returned 2 rows of .*; expected 1"):
        lock.sample("euler", setup.x, setup.sigmas, extra_args={"cond": setup.cond})


def test_a_bare_denoiser_is_no_model_of_videos(setup):
    with pytest.raises(kv.KVLockError, match=r"lacks .*\n.*KVLock"):
        kv.edit_video(setup.source, setup.mask, "a red ball", model=setup.model)
