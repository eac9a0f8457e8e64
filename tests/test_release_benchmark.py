"""The evidence of release: its scores on known results, its controls, and one small run of its rows."""

import json

import pytest
import release
import torch

from kvlock_sampling.policy import Release
from kvlock_sampling.tiny import load
from kvlock_sampling.tiny.world import EDITS
from kvlock_sampling.types import Observation


@pytest.fixture(scope="module")
def batch() -> release.Batch:
    return next(release.batches(release.FIRST_SCENE, 5))


def test_kinds_take_turns_and_scenes_repeat(batch: release.Batch) -> None:
    assert batch.kinds == list(EDITS)
    again = next(release.batches(release.FIRST_SCENE, 5))
    assert torch.equal(batch.source, again.source)
    assert torch.equal(batch.noise, again.noise)
    torch.testing.assert_close(batch.mask + batch.effect + batch.rest, torch.ones_like(batch.mask))


def test_what_is_unseen_has_no_influence_on_the_rest(batch: release.Batch) -> None:
    network = release.Unseen(load().network)
    hidden = release.tokens(batch.mask)
    cover = hidden.view(5, 1, 4, 8, 8).repeat_interleave(2, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    other = batch.source + cover * batch.noise
    given = torch.full((5,), 0.7), release.tokenize([scene.prompt for scene in batch.sources])
    with torch.no_grad():
        (a, b), (c, d) = ([network(z, *given, **kw) for z in (batch.source, other)] for kw in ({"unseen": hidden}, {}))
    assert torch.equal(a * (1 - cover), b * (1 - cover))
    assert not torch.allclose(c * (1 - cover), d * (1 - cover), atol=0.01)


def test_the_true_result_is_right_and_a_pasted_one_leaves_its_effect(batch: release.Batch) -> None:
    for row in release.scored(batch, batch.target):
        assert row["all"] == row["mask"] == row["rest"] == 100
        assert row["leftover"] == pytest.approx(0, abs=1e-3)
        assert row["intruder"] == 0
    pasted = torch.where(batch.mask > 0, batch.target, batch.source)
    with_effect = batch.effect.flatten(1).any(1).tolist()
    assert any(with_effect)
    for row, effect in zip(release.scored(batch, pasted), with_effect, strict=True):
        assert row["leftover"] == pytest.approx(float(effect), abs=1e-3)
        assert row["mask"] == 100
    half = (batch.source + batch.target) / 2
    expected = -10 * torch.log10(((batch.source - batch.target) / 4).square().mean((1, 2, 3, 4)))
    assert [row["all"] for row in release.scored(batch, half)] == pytest.approx(expected.tolist(), abs=2e-3)


def test_a_random_gate_releases_as_much_of_the_background(batch: release.Batch) -> None:
    background = release.tokens(batch.mask) == 0
    effect = torch.rand(background.shape, generator=torch.Generator().manual_seed(0)) * 2
    risk = torch.zeros_like(effect)
    obs = Observation(1.0, risk, risk, risk, torch.ones(5), None, effect)
    (_, wanted), (_, found) = (
        Release(firm=1.0).step(None, obs),
        release.Shuffled(Release(firm=1.0), background).step(None, obs),
    )
    assert torch.equal(found.composite[~background], wanted.composite[~background])
    for clip, tokens in enumerate(background):
        pairs = [torch.stack([c.lock[clip, tokens], c.composite[clip, tokens]]) for c in (wanted, found)]
        assert not torch.equal(*pairs)
        assert sorted(pairs[0].T.tolist()) == sorted(pairs[1].T.tolist())


def test_differences_are_paired() -> None:
    assert release.difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == "+2.00 ± 0.58"
    scores = {name: [1.0, 2.0] for name in release.SCORES}
    better = {**scores, "all": [3.0, 2.0]}
    about = {"first_scene": 0, "edits": 2, "sampler": "euler", "steps": 16, "bfloat16": False, "seed": 0}
    rows = {name: {"passes": 32, "seconds": 1.0, **scores} for name in ("composited", "static")}
    rows["static, anywhere, lock 0.75"] = {"passes": 48, "seconds": 1.0, **scores, "all": [5.0, 2.0]}
    rows["release"] = {"passes": 64, "seconds": 1.0, **better}
    text = release.report({"about": about, "rows": rows})
    assert "| release | 2.50 | +1.00 ± 1.00 |" in text
    assert "goes 50% of the way from `static` to it" in text
    assert "nan" not in text.replace("nan |", "")


@pytest.mark.parametrize(
    ("row", "passes"), [("composited", 2), ("static", 3), ("release", 4), ("release at random", 4)]
)
def test_a_row_runs(batch: release.Batch, row: str, passes: int) -> None:
    small = release.Batch(*(part[3:4] for part in batch))
    options = release.ROWS[row]
    options = {**(options(small) if callable(options) else options), "steps": 2}
    clips, trace = release.edit(load().network, small, options, "euler")
    assert clips.shape == small.source.shape
    assert trace.nfe == 2 * passes
    json.dumps(release.scored(small, clips))
