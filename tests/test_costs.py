"""`kvlock plan`: passes are exact, because they are counted; time is measured, and not tested."""

from __future__ import annotations

import pytest
import torch
from toy_pipelines import tiny_pipeline
from typer.testing import CliRunner

import kvlock_sampling as kv
from kvlock_sampling import tiny
from kvlock_sampling.app.cli import app
from kvlock_sampling.app.costs import WAYS, costs
from kvlock_sampling.video import write_clip

STEPS = 6


@pytest.fixture(scope="module")
def pair():
    before, after = tiny.sample_edit(6, "reshape")
    return tiny.render([before]), tiny.edit_mask([before], [after])


def test_passes_of_every_way(pair):
    clip, mask = pair
    found = {cost.way: cost for cost in costs(tiny.load(), clip, mask, steps=STEPS, sampler="euler")}
    assert list(found) == [*WAYS, "fast, filled"]
    passes = {way: cost.passes / STEPS for way, cost in found.items()}
    assert passes["off"] == passes["fast, filled"] == 2
    assert passes["full"] == passes["half"] == 3
    assert passes["release"] == 4
    assert 2 < passes["fast"] <= 3
    assert all(cost.seconds > 0 and cost.peak is None for cost in found.values())
    assert found["off"].computed == 1
    assert found["full"].computed == found["fast"].computed < 0.5
    assert found["fast"].stored > 0
    assert found["full"].stored == 0


def test_a_second_order_sampler_takes_twice_as_many(pair):
    one, two = (next(costs(tiny.load(), *pair, steps=STEPS, sampler=s, ways=["off"])) for s in ("euler", "heun"))
    assert two.passes == 2 * one.passes - 2  # the last step is of first order


def test_the_command(pair, tmp_path):
    clip, mask = pair
    write_clip(tmp_path / "clip.gif", clip[0])
    write_clip(tmp_path / "mask.png", mask[0, :, :1].expand(3, -1, -1, -1) * 2 - 1)
    arguments = ["plan", str(tmp_path / "clip.gif"), "--mask", str(tmp_path / "mask.png"), "--steps", "2"]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    assert all(way.split(",")[0] in ended.output for way in WAYS)
    assert CliRunner().invoke(app, [*arguments, "--sampler", "nosuch"]).exit_code == 2
    ended = CliRunner().invoke(app, [*arguments, "--sampler", "dpm_adaptive"])
    assert (ended.exit_code, "expected a sampler whose cost can be told" in ended.output) == (2, True)


@pytest.mark.parametrize("family", ["wan", "wan-image", "wan-image-ti2v", "wan-vace", "ltx", "mochi"])
def test_a_pipeline_that_reads_the_clip_or_keeps_no_cache(family):
    video = kv.from_pipeline(tiny_pipeline(family))
    frames, height, width = video.fit(9, 64, 64)
    clip, mask = torch.zeros(1, 3, frames, height, width), torch.zeros(1, 1, 1, height, width)
    mask[..., : height // 2, : width // 2] = 1
    found = {
        cost.way for cost in costs(video, clip, mask.expand(-1, -1, frames, -1, -1), steps=2, ways=["off", "fast"])
    }
    assert found == {"off", "fast"} | {"fast, filled"} - {"fast, filled" if family == "mochi" else ""}


def test_nothing_is_left_in_the_models_state(pair):
    video = tiny.load()
    before = {name: value.clone() for name, value in video.network.state_dict().items()}
    list(costs(video, *pair, steps=2, ways=["fast"]))
    assert all(torch.equal(value, before[name]) for name, value in video.network.state_dict().items())
