"""The judge of the stage reads renders right, and finds every fault that an edit can have."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from world.compare import compare, make_task, score
from world.judge import INTRUDER, WEIGHTS, Verdict, intruder, judge, judge_edits, leftover, rates

from kvlock_sampling.tiny import edit_mask, load, render, sample_edit, sample_scene
from kvlock_sampling.tiny.world import COLOURS, EDITS, FLOWERS, coverage, regions

SCENES = [sample_scene(seed) for seed in range(1000, 1200)]


def noise(clips):
    return 0.1 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))


def blurred(clips):
    return F.avg_pool3d(clips, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)


def edits(kind, count=16, **change):
    """Sources and targets of one kind; keywords change both scenes."""
    pairs = [sample_edit(seed, kind) for seed in range(2000, 2000 + count)]
    return [replace(s, **change) for s, _ in pairs], [replace(t, **change) for _, t in pairs]


def pasted(sources, targets):
    """What compositing alone makes of an edit: the target in the mask, the source outside."""
    return render(sources).lerp(render(targets), edit_mask(sources, targets))


@pytest.mark.parametrize("spoil", [lambda c: c, lambda c: c + noise(c), blurred], ids=["clean", "noise", "blur"])
def test_renders_are_read_right(spoil):
    found = rates(judge(spoil(render(SCENES))), SCENES)
    assert found["colour"] >= 0.99
    assert found["shape"] >= 0.97
    assert found["glowing"] >= 0.97
    assert found["post"] >= 0.95
    assert found["motion"] >= 0.93  # a still camera and a still object cannot be told from both panning on plain walls


@pytest.mark.parametrize("kind", EDITS)
def test_true_edits_are_right(kind):
    sources, targets = edits(kind, 32)
    verdicts = judge_edits(render(targets) + noise(render(targets)), sources, targets)
    assert all(v.inside < 0.05 and v.effect < 0.05 and v.intruder < INTRUDER for v in verdicts)
    assert sum(v.right for v in verdicts) >= 27


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_that_did_nothing_is_wrong(kind):
    sources, targets = edits(kind)
    for verdict in judge_edits(render(sources), sources, targets):
        assert verdict.inside == pytest.approx(1, abs=1e-4)
        assert not verdict.right


@pytest.mark.parametrize("glowing", [False, True], ids=["shadow", "glow"])
@pytest.mark.parametrize("kind", ["remove", "insert"])
def test_pasting_leaves_a_dead_shadow_or_glow_and_adds_none(kind, glowing):
    sources, targets = edits(kind, glowing=glowing)
    for verdict in judge_edits(pasted(sources, targets), sources, targets):
        assert verdict.effect == pytest.approx(1, abs=1e-4)
        assert verdict.inside == pytest.approx(0, abs=1e-4)
        assert verdict.intruder == 0
        assert not verdict.right


def test_half_of_the_old_object_is_found():
    sources, targets = edits("remove")
    alpha, x = coverage(sources), torch.arange(64.0)
    centre = (alpha * x).sum((-2, -1), keepdim=True) / alpha.sum((-2, -1), keepdim=True)
    left = ((alpha > 0) & (x < centre)).float()
    for verdict in judge_edits(render(targets).lerp(render(sources), left), sources, targets):
        assert 0.3 < verdict.inside < 0.7
        assert not verdict.right


def test_a_second_object_is_an_intruder():
    sources, targets = edits("recolour", x=20.0, motion="standing still", pan=0.0, radius=8.5)
    second = [replace(target, x=48.0) for target in targets]
    both = render(targets).lerp(render(second), coverage(second))
    assert all(v.intruder >= 100 and not v.right for v in judge_edits(both, sources, targets))


def test_an_object_that_drifts_out_of_its_mask_is_an_intruder():
    sources, targets = edits("reshape", motion="standing still", pan=0.0)
    drifted = [replace(target, x=target.x + 14) for target in targets]
    assert all(v.intruder >= INTRUDER and not v.right for v in judge_edits(render(drifted), sources, targets))


@pytest.mark.parametrize("appears", [False, True])
def test_a_post_that_vanishes_or_appears_is_an_intruder(appears):
    post = {"post_x": 8.0, "post_foot": 50.0, "post_width": 3.0, "post_height": 20.0, "post_grey": 0.8}
    sources, targets = edits("recolour", x=38.0, motion="standing still", pan=0.0, post=not appears, **post)
    clips = render([replace(target, post=appears) for target in targets])
    verdicts = judge_edits(clips, sources, targets)
    assert all(v.intruder >= INTRUDER and not v.right for v in verdicts)
    assert sum("post" in v.wrong for v in verdicts) >= 15


def test_a_wrong_colour_and_a_wrong_number_of_petals_are_found():
    flowers, colours = list(FLOWERS), list(COLOURS)
    sources, targets = edits("reshape")
    targets = [replace(target, shape=flowers[i % 3]) for i, target in enumerate(targets)]
    petals = [replace(target, shape=flowers[(i + 1) % 3]) for i, target in enumerate(targets)]
    assert sum("shape" in v.wrong for v in judge_edits(render(petals), sources, targets)) >= 15
    paints = [replace(target, colour=colours[(colours.index(target.colour) + 1) % 6]) for target in targets]
    assert sum("colour" in v.wrong for v in judge_edits(render(paints), sources, targets)) == 16


def test_leftover_is_a_projection():
    source, target = torch.zeros(1, 3, 1, 4, 4), torch.ones(1, 3, 1, 4, 4)
    region = torch.zeros(1, 1, 1, 4, 4)
    assert leftover(source, source, target, region) == 0, "nothing to leave"
    region[..., :2] = 1
    for share in (0.0, 0.25, 1.0):
        clip = (1 - share) * target
        clip[..., 2:] = 9.0  # outside the region
        assert leftover(clip, source, target, region).item() == pytest.approx(share)


def test_what_lies_between_source_and_target_is_no_intruder():
    sources, targets = edits("remove", 4)
    before, after, (mask, *_) = render(sources), render(targets), regions(sources, targets)
    half = (before + after) / 2
    assert intruder(half, before, after, mask).tolist() == [0] * 4
    half[:, :, 3, :5, :6] = 1.0  # 30 pixels of one frame
    assert all(20 <= area <= 42 for area in intruder(half, before, after, mask).tolist())


def test_rates_count_what_a_scene_has():
    empty, ball = replace(SCENES[0], shape=None, post=False), replace(SCENES[0], shape="ball", post=False)
    nothing = Verdict(None, None, None, None, False)
    found = rates([nothing, nothing], [empty, ball])
    assert found == {"colour": 0, "shape": 0.5, "motion": 0, "glowing": 0, "post": 1, "all": 0.5}


def test_the_weights_are_small():
    assert WEIGHTS.stat().st_size < 500_000


def test_comparisons_score_against_the_true_edit():
    task = make_task([sample_edit(2, "recolour"), sample_edit(3, "remove")])
    edit, scored = compare(task, load(), {"full": {"policy": "full"}}, steps=2)["full"]
    assert scored.background_psnr.tolist() == [100, 100]
    assert (scored.inside_psnr < 40).all()
    perfect = score(task, replace(edit, pixels=task.truth))
    assert perfect.inside_psnr.tolist() == [100, 100]
    assert perfect.colour.tolist() == perfect.shape.tolist() == [1, 1]
