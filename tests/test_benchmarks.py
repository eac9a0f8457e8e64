"""What the benchmarks compute, against answers that are known: the grid, its samplers, its scores and their reports."""

import json
from hashlib import sha256

import numpy as np
import pytest
import tables
import torch
from grid import SHARP, STEPS, EpsNet, Grid, GridDenoiser, label
from grid_control import moved, skew, spread
from grid_paper import KEPT, ddpm
from grid_runs import detection
from report_grid import holds
from seeds import against, pooled, scores, watchers
from torch import nn
from transfer import Meter, alarms, row

from kvlock_sampling.testing import MixtureDenoiser
from kvlock_sampling.tiny.model import WEIGHTS


class ExactEps(nn.Module):
    """The noise that the exact denoiser of the grid finds."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.exact, self.bars = MixtureDenoiser(grid.modes, std=grid.mode_std), grid.alpha_bars()

    def forward(self, z, step):
        bar = float(self.bars[int(step[0])])
        sigma = ((1 - bar) / bar) ** 0.5 if bar > 0 else float("inf")
        if sigma > 1e3:  # no signal left: all of z is noise
            return z
        x = z / bar**0.5
        return (x - self.exact(x, sigma)) / sigma


@pytest.mark.parametrize("grid", [Grid(), SHARP])
def test_the_exact_score_makes_no_hallucinations_under_the_papers_sampler(grid):
    samples, predictions = ddpm(ExactEps(grid), grid, 600, seed=0)
    assert predictions.shape == (KEPT, 600, 2)
    assert float(label(grid, samples).distance.max()) < 6  # added variance beta_t widens the sharp modes a little
    assert float(label(grid, samples).hallucinated.float().mean()) < 0.005
    assert skew(grid, samples)[1] > 1e-3
    # The last prediction is the sample: nothing is added after it.
    torch.testing.assert_close(predictions[-1], samples, atol=0.05 * grid.mode_std, rtol=0)


def test_the_noise_levels_that_the_paper_reads():
    sigmas = ((1 - Grid().alpha_bars()) / Grid().alpha_bars()).sqrt()
    assert len(sigmas) == STEPS
    assert float(sigmas[0]) == pytest.approx(0.0316, rel=1e-2)
    assert float(sigmas[9]) == pytest.approx(0.138, rel=1e-2)


def test_the_denoiser_reads_its_own_training_levels():
    model = GridDenoiser(EpsNet(), Grid())
    steps = model.step_of(model.log_sigmas.exp())
    torch.testing.assert_close(steps, torch.arange(len(steps)).float(), atol=2e-2, rtol=0)


def at_modes(grid, counts):
    """Samples in the middle of the modes, so many in each."""
    return grid.modes.repeat_interleave(torch.tensor(counts), 0)


def test_counts_that_did_not_change_are_no_shift_and_one_sided_moves_are():
    grid = Grid()
    before = at_modes(grid, [40] * 25)
    assert skew(grid, before) == pytest.approx((0.0, 1.0))
    assert moved(grid, before, before) == 1.0
    away = before.clone()
    away[:30] = grid.modes[1]
    assert moved(grid, before, away) < 1e-5
    assert skew(grid, away)[1] < 0.01
    swapped = before.clone()
    swapped[:30], swapped[40:70] = grid.modes[1], grid.modes[0]  # as many one way as the other
    assert moved(grid, before, swapped) == pytest.approx(1.0)


def test_the_spread_is_that_of_the_samples_near_a_mode():
    grid = Grid()
    samples = grid.draw(20_000, torch.Generator().manual_seed(0))
    assert spread(grid, samples) == pytest.approx(1.0, abs=0.02)
    shrunk = grid.modes[label(grid, samples).mode]
    shrunk = torch.lerp(shrunk, samples, 0.5)
    shrunk[:50] += 0.3  # between the modes: left out
    assert spread(grid, shrunk) == pytest.approx(0.5, abs=0.02)


def test_detection_of_a_perfect_and_of_a_useless_score():
    bad = torch.arange(1000) < 100
    perfect = detection(bad.float() + torch.linspace(0.1, 0.2, 1000), bad)
    assert perfect["auroc"] == perfect["recall_at_96_retention"] == perfect["specificity_at_95_recall"] == 1.0
    useless = detection(torch.rand(1000, generator=torch.Generator().manual_seed(0)), bad)
    assert abs(useless["auroc"] - 0.5) < 0.1
    assert useless["recall_at_96_retention"] < 0.15


def test_control_holds_only_if_every_condition_does():
    base = {"rate": 0.04, "spread": 1.0, "chi2_ratio": 2.0, "extra": 0.0}
    good = {"rate": 0.01, "spread": 0.97, "chi2_ratio": 2.1, "extra": 0.04}
    assert holds(good, base)
    for broken in ({"rate": 0.021}, {"spread": 0.94}, {"spread": 1.06}, {"chi2_ratio": 2.4}, {"extra": 0.06}):
        assert not holds(good | broken, base)


def test_alarms_are_counted_by_clip_and_ratios_are_paired():
    run = [(2.0, {"e": torch.tensor([1.0, 3.0])}), (1.0, {"e": torch.tensor([3.0, 5.0])})]
    share = alarms(Meter("e", lambda sigma: 4.0 / sigma), run)  # thresholds 2 and 4
    assert share.tolist() == [0.0, 1.0]
    rates = torch.linspace(0, 0.2, 40).double().numpy()
    same, twice = row(rates, rates), row(2 * rates, rates)
    assert same["ratio"] == 1.0
    assert same["ratio interval"] == pytest.approx([1.0, 1.0])
    assert twice["ratio interval"] == pytest.approx([2.0, 2.0])  # the clips are the same: no spread
    low, high = twice["rate interval"]
    assert twice["rate"] == pytest.approx(0.2)
    assert low < 0.2 < high


def test_runs_over_parts_of_the_scenes_pool_to_the_run_over_all():
    draw = np.random.default_rng(0)
    ours, base = draw.normal(0.3, size=90), draw.normal(size=90)

    def record(first, count):
        part = slice(first, first + count)
        row = {"score": "border", "cost": 2.5, "psnr": float(ours[part].mean()), "gap": against(ours[part], base[part])}
        return {"edits": count, "first_scene": first, "policy": "release", "guidance": 3.0, "rows": [row]}

    whole = record(0, 90)
    parts = pooled([record(30, 60), record(0, 30)])
    assert {**parts, "rows": None} == {**whole, "rows": None}
    assert parts["rows"][0]["gap"] == pytest.approx(whole["rows"][0]["gap"], abs=2e-4)
    assert parts["rows"][0]["psnr"] == pytest.approx(whole["rows"][0]["psnr"], abs=1e-4)
    with pytest.raises(SystemExit, match="differ in 'policy'"):
        pooled([record(0, 60), {**record(60, 30), "policy": "full"}])
    with pytest.raises(SystemExit, match="follow one another"):
        pooled([record(0, 30), record(40, 30)])


def test_border_and_judge_together_choose_the_seamless_one_of_those_the_judge_believes():
    readings = {name: np.ones((2, 4, 1)) for name in watchers()}
    readings["border"][:, :, 0] = [[0.5, 0.9, 0.7, 0.8], [0.5, 0.9, 0.7, 0.8]]
    readings["judge"][:, :, 0] = [[3.0, 0.01, 0.02, 2.0], [1e-6, 3e-6, 2e-6, 4e-6]]
    found = scores(readings)
    assert found["border and judge"][..., 0].argmin(1).tolist() == [2, 0]
    assert found["judge"][..., 0].argmin(1).tolist() == [1, 0]
    assert found["ranks of both"][..., 0].argsort(1).tolist() == [[2, 0, 1, 3], [0, 2, 3, 1]]  # equal sums: the border
    readings["border"][...] = np.nan  # where nothing was read, nothing is chosen
    assert np.isnan(scores(readings)["ranks of both"]).all()


def test_every_table_of_the_stage_was_measured_on_the_weights_of_the_package():
    record = json.loads((tables.RESULTS / "tables.json").read_text())
    assert record["weights"] == sha256(WEIGHTS.read_bytes()).hexdigest()
    assert sorted(record["done"]) == sorted(tables.JOBS)
    for name in ("release", "release_dpmpp", "release_search"):
        rows = json.loads((tables.RESULTS / f"{name}.json").read_text())["rows"]
        assert set(rows) == {job.partition(": ")[2] for job in tables.JOBS if job.startswith(f"{name}: ")}
