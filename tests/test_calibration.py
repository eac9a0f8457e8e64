"""Thresholds from measurement: curves, and quantiles with intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import kvlock_sampling as kv
from kvlock_sampling.app.calibration import Example, calibrate, folder, scenes
from kvlock_sampling.app.cli import app
from kvlock_sampling.presets import Preset, load_preset
from kvlock_sampling.tiny import load
from kvlock_sampling.types import EstimatorError, PolicyError
from kvlock_sampling.variance import RenoiseVariance, Sparse, TrajectoryVariance
from kvlock_sampling.variance.thresholds import (
    ThresholdCurve,
    alarm_range,
    clips_needed,
    reference_bands,
)
from kvlock_sampling.video import write_clip


def test_a_curve_is_a_power_law_between_its_points_and_flat_beyond():
    curve = ThresholdCurve((10.0, 1.0, 0.1), (1.0, 0.1, 0.4))
    for sigma, value in ((10.0, 1.0), (1.0, 0.1), (0.1, 0.4), (100.0, 1.0), (0.001, 0.4)):
        assert curve(sigma) == pytest.approx(value)
    assert curve(math.sqrt(10.0)) == pytest.approx(math.sqrt(0.1))
    for bad in (((1.0, 2.0), (1.0, 1.0)), ((1.0,), (1.0, 2.0)), ((), ())):
        with pytest.raises(EstimatorError, match="sigmas falling"):
            ThresholdCurve(*bad)


def test_bands_recover_a_known_quantile_within_their_interval():
    """Log-normal variance proportional to sigma: the true quantile of every band is known."""
    rng = np.random.default_rng(0)
    sigma = np.exp(rng.uniform(math.log(0.05), math.log(20), 40_000))
    variance = 0.01 * sigma * np.exp(rng.normal(0, 0.5, len(sigma)))
    bands = reference_bands(zip(range(len(sigma)), sigma, variance, strict=True), quantile=0.9, bands=40)
    assert len(bands) == 40
    assert [b.sigma for b in bands] == sorted((b.sigma for b in bands), reverse=True)
    covered = 0
    for band in bands:
        true = 0.01 * band.sigma * math.exp(0.5 * 1.2816)
        covered += band.low <= true <= band.high
        assert band.low <= band.quantile <= band.high
        assert band.quantile == pytest.approx(true, rel=0.12)
    assert covered >= 33  # 95% intervals, 40 bands; the bands' own width costs a little
    curve = ThresholdCurve(tuple(b.sigma for b in bands), tuple(b.quantile for b in bands))
    assert curve(1.0) == pytest.approx(0.01 * math.exp(0.5 * 1.2816), rel=0.1)


def test_too_few_measurements_are_refused():
    with pytest.raises(EstimatorError, match="0 usable measurements"):
        reference_bands([(0, 1.0, float("nan"))] * 30)


def test_a_threshold_keeps_its_promise_for_other_clips_and_its_interval_covers():
    """Measurements of a clip hang together: what counts is the number of clips. The truth is known here."""
    rng, quantile, clips, each = np.random.default_rng(0), 0.95, 32, 6
    true = math.exp(1.6449 * math.hypot(0.5, 0.1))
    alarms, naive, covered = [], [], 0
    for _ in range(400):
        values = np.exp(rng.normal(0, 0.5, (clips, 1)) + rng.normal(0, 0.1, (clips, each)))
        points = [(clip, 1.0, float(v)) for clip, row in enumerate(values) for v in row]
        (band,) = reference_bands(points, quantile=quantile, bands=1)
        covered += band.low <= true <= band.high
        for level, found in ((band.quantile, alarms), (np.quantile(values, quantile), naive)):
            found.append(0.5 * math.erfc(math.log(level) / math.hypot(0.5, 0.1) / math.sqrt(2)))
    assert 0.025 < np.mean(alarms) <= 1 - quantile
    assert np.mean(naive) > 0.058  # the plain quantile of all measurements breaks the promise
    assert covered >= 0.95 * 400
    assert band.high == math.inf  # no 32 clips can bound a quantile of 0.95 from above
    low, high = alarm_range(clips, quantile)
    assert np.mean([low <= share <= high for share in alarms]) == pytest.approx(0.95, abs=0.03)


def test_few_clips_cannot_promise():
    assert [clips_needed(q) for q in (0.5, 0.9, 0.95, 0.99)] == [1, 9, 19, 99]
    with pytest.warns(UserWarning, match="2 clips cannot promise that 95% .* it takes 19"):
        calibrate(load(), scenes(2), steps=12, bands=2)


class AnySize:
    """A model of any length and size, without attention."""

    frames, size, cfg_scale = None, None, 1.0

    @staticmethod
    def denoiser(x, sigma, cond=None):
        return x / (1 + sigma.view(-1, 1, 1, 1, 1) ** 2)

    fit = staticmethod(lambda *sides: sides)
    encode = decode = staticmethod(torch.clone)
    prompt = staticmethod(lambda texts: torch.zeros(len(texts), 1))
    sigmas = staticmethod(lambda steps, strength=1.0: kv.samplers.flow_sigmas(steps))


def test_clips_of_unlike_length_calibrate_a_model_without_attention():
    mask = torch.zeros(1, 4, 16, 16)
    mask[..., 4:8, 4:8] = 1
    generator = torch.Generator().manual_seed(0)
    clips = [torch.rand(3, frames, 16, 16, generator=generator) * 2 - 1 for frames in (4, 3, 4)]
    examples = [Example(clip, mask[:, : clip.shape[1]], "x") for clip in clips]
    found = calibrate(AnySize(), examples, steps=12, bands=2, quantile=0.6)
    assert [band.clips for band in found.bands] == [3, 3]
    with pytest.raises(EstimatorError, match="bands=0"):
        calibrate(AnySize(), [example._replace(prompt=None) for example in examples], bands=0)


@pytest.mark.parametrize("form", ["still", "film", "array"])
def test_examples_take_the_masks_that_an_edit_takes(form):
    examples = scenes(2)
    whole = [each.mask.amax(1, keepdim=True).expand(1, 8, 64, 64) for each in examples]
    forms = {"still": lambda m: m[0, 0], "film": lambda m: m[0], "array": lambda m: m.numpy()}
    given = [Example(e.clip.numpy(), forms[form](m), e.prompt) for e, m in zip(examples, whole, strict=True)]
    wanted = [Example(e.clip, m, e.prompt) for e, m in zip(examples, whole, strict=True)]
    options = {"steps": 12, "bands": 2, "quantile": 0.5}
    found, same = (calibrate(load(), each, **options) for each in (given, wanted))
    assert found.bands == same.bands


@pytest.mark.parametrize(
    "estimator",
    [
        TrajectoryVariance(window=None, span=8.0, normalise=True, integral=True),
        RenoiseVariance(passes=1, seed=2),
        Sparse(RenoiseVariance(passes=1), sigmas=(1.0, 0.3), hold=True),
        Sparse(TrajectoryVariance(), every=2, hold=True),
    ],
    ids=lambda e: type(e).__name__,
)
def test_estimators_survive_a_preset(estimator, tmp_path):
    preset = Preset(kv.Linear(), threshold=ThresholdCurve((10.0, 0.1), (0.001, 0.02)), estimator=estimator)
    assert load_preset(kv.to_toml(preset)) == preset
    lock = kv.KVLock(lambda x, sigma: x, policy=preset)
    assert lock.settings.estimator == estimator
    assert lock.settings.threshold(1.0) == pytest.approx(math.sqrt(0.001 * 0.02))


def test_a_bad_curve_in_a_preset_is_explained():
    with pytest.raises(PolicyError, match="Known: sigmas, values"):
        load_preset("[threshold]\nsigma = [1.0]\n[policy]\ntype = 'Linear'\n")
    with pytest.raises(PolicyError, match="sigmas falling"):
        load_preset("[threshold]\nsigmas = [1.0, 2.0]\nvalues = [1.0, 2.0]\n[policy]\ntype = 'Linear'\n")


def test_calibrating_the_embedded_model_writes_a_working_preset(tmp_path):
    target = tmp_path / "mine.toml"
    runner = CliRunner()
    arguments = ["calibrate", "-o", str(target), "--clips", "4", "--steps", "6", "--policy", "threshold"]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    preset = load_preset(target)
    assert isinstance(preset.policy, kv.policy.Threshold)
    assert isinstance(preset.threshold, ThresholdCurve)
    again = runner.invoke(app, [*arguments[:-1], "nosuch"])
    assert again.exit_code == 2
    empty = runner.invoke(app, ["calibrate", "-o", str(tmp_path / "b.toml"), "--clips", str(tmp_path)])
    assert empty.exit_code == 2
    assert "no clips" in empty.output
    assert not (tmp_path / "b.toml").exists()


def test_a_policy_that_reads_no_risk_has_no_threshold_to_calibrate(tmp_path):
    ended = CliRunner().invoke(app, ["calibrate", "-o", str(tmp_path / "mine.toml"), "--policy", "half"])
    assert ended.exit_code == 2
    assert "policy='half' reads no risk" in " ".join(ended.output.split())
    assert not (tmp_path / "mine.toml").exists()


def test_a_kv_cache_survives_calibration(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('[kv_cache]\nevery = 2\n[policy]\ntype = "Sigmoid"\n')
    found = calibrate(load(), scenes(4), policy=str(path), steps=8, bands=3)
    assert found.preset.kv_cache == {"every": 2}


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("a.toml", ["--clips", "0"], "no clips to calibrate on"),
        (".", [], "ends in .toml"),
        ("dir.toml", [], "cannot be written: it is a folder"),
        ("file/a.toml", [], "cannot be written"),
        ("mine.toml", ["--policy", "mine.toml"], "is an input"),
        ("mine.toml", ["--policy", "mine"], "is an input"),
        ("mine.toml", ["--policy=~/mine.toml"], "is an input"),
    ],
)
def test_calibrating_is_refused_before_measuring(tmp_path, monkeypatch, output, options, message):
    (tmp_path / "file").touch()
    (tmp_path / "dir.toml").mkdir()
    (tmp_path / "mine.toml").write_text('policy = {type = "PID"}')
    monkeypatch.setattr("kvlock_sampling.app.cli.measure", lambda *_, **__: pytest.fail("it measured"))
    monkeypatch.chdir(tmp_path)
    for name in ("KVLOCK_POLICIES", "HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    ended = CliRunner().invoke(app, ["calibrate", "-o", output, *options])
    assert ended.exit_code == 2, ended.output
    assert message in " ".join(ended.output.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir.toml", "file", "mine.toml"]


def test_what_was_measured_is_shown_before_it_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "mine.toml")

    monkeypatch.setattr("kvlock_sampling.app.cli.write_atomically", full)
    ended = CliRunner().invoke(app, ["calibrate", "-o", str(tmp_path / "mine.toml"), "--clips", "4", "--steps", "6"])
    assert ended.exit_code == 2
    assert "quantile" in ended.output
    assert "No space left on device: 'mine.toml'" in " ".join(ended.output.split())


def test_a_preset_is_calibrated_with_the_estimator_it_names(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(
        '[policy]\ntype = "Threshold"\n\n[estimator]\ntype = "Sparse"\nevery = 1\n\n'
        '[estimator.estimator]\ntype = "TrajectoryVariance"\nspan = 4.0\nwindow = "none"\nnormalise = true\n'
    )
    found = calibrate(load(), scenes(2), policy=str(path), steps=12, bands=2)
    sparse = Sparse(TrajectoryVariance(window=None, span=4.0, normalise=True), every=1)
    assert found.preset.estimator == sparse
    path.write_text(kv.to_toml(found.preset))
    lock = kv.KVLock(load().denoiser, policy=load_preset(path))
    assert lock.settings.estimator == sparse
    assert lock.settings.threshold(found.bands[0].sigma) == pytest.approx(found.bands[0].quantile, rel=1e-3)


def test_calibrating_on_a_folder(tmp_path):
    video, example = load(), scenes(1)[0]
    write_clip(tmp_path / "a[1].mp4", example.clip, scale=4)
    write_clip(tmp_path / "a[1].mask.mp4", (example.mask * 2 - 1).expand(3, -1, -1, -1), scale=4)
    with pytest.raises(kv.KVLockError, match=r"a\[1\].mp4 needs a\[1\].mask.png .* and a\[1\].txt"):
        folder(tmp_path, video)
    (tmp_path / "a[1].txt").write_text(example.prompt)
    found = folder(tmp_path, video)
    assert len(found) == 1
    assert found[0].prompt == example.prompt
    (tmp_path / "a[1].mp4").rename(tmp_path / "a[1].MKV")  # still a film, whatever its name promises
    assert [e.prompt for e in folder(tmp_path, video)] == [example.prompt]
    (tmp_path / "a[1].txt").write_bytes(b"a caf\xe9 in Latin-1")
    with pytest.raises(kv.KVLockError, match=r"cannot read .*a.*txt. as text: UnicodeDecodeError"):
        folder(tmp_path, video)
    assert (found[0].mask - example.mask).abs().mean() < 0.02
    assert (found[0].clip - example.clip).abs().mean() < 0.05


FOLDERS = {
    "two masks": (
        {"a.mask.old.png": b"x"},
        r"a.mp4 needs a.mask.png .*; found 2 masks \['a.mask.mp4', 'a.mask.old.png'\]",
    ),
    "no prompt": ({"a.txt": b"\n"}, r"a.mp4 needs .*; found 1 masks .* and the prompt ''"),
    "a file of macOS": ({"._a.mp4": b"x", "._a.mask.png": b"x"}, None),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_clear_about_every_clip(tmp_path, name):
    example = scenes(1)[0]
    write_clip(tmp_path / "a.mp4", example.clip)
    write_clip(tmp_path / "a.mask.mp4", (example.mask * 2 - 1).expand(3, -1, -1, -1))
    (tmp_path / "a.txt").write_text(example.prompt)
    files, words = FOLDERS[name]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    if words is None:
        assert [e.prompt for e in folder(tmp_path, load())] == [example.prompt]
    else:
        with pytest.raises(kv.KVLockError, match=words):
            folder(tmp_path, load())


def test_a_folder_whose_name_is_a_number_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "3").mkdir()
    ended = CliRunner().invoke(app, ["calibrate", "-o", "a.toml", "--clips", "3"])
    assert ended.exit_code == 2
    assert "no clips in the folder '3'; expected NAME with one of .gif, .mp4" in " ".join(ended.output.split())
