"""The shelf: every preset loads by name, says what it is, survives a round trip, and reaches people who use pip."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvlock_sampling import presets
from kvlock_sampling.policy import (
    PID,
    Clamped,
    Constant,
    Linear,
    LockAbove,
    Sigmoid,
    Smoothed,
    Threshold,
    Windowed,
    stateless,
)
from kvlock_sampling.presets import Preset, describe, load_policy, load_policy_text, preset_names, save_policy, to_toml
from kvlock_sampling.testing import check_policy
from kvlock_sampling.types import Control, KVLockError, Observation, PolicyError
from kvlock_sampling.utils import files

ROOT = Path(__file__).parent.parent
SHELF = sorted((ROOT / "policies").glob("*.toml"))

BUILT_IN = [
    Constant(),
    Constant(lock=0.3, cfg_scale=4.0),
    Linear(gain=0.5, schedule_cfg=False),
    Threshold(on=1.5, cfg_alarm=0.5),
    Sigmoid(width=1e-5, cfg_range=(1.5, 0.5)),
    PID(slew=0.5, kd=1 / 3),
    Windowed(Linear(), last=20, below=3.3, outside=Control(0.5, 1.25)),
    Smoothed(PID(), half_life=0.3),
    LockAbove(Smoothed(Sigmoid(), half_life=0.2), above=8.0, lock=0.75),
    Clamped(Smoothed(Windowed(Threshold(), above=1.0), half_life=1.0), cfg=(1.0, 8.0)),
    Preset(PID(), threshold=0.02),
    Preset(Constant(lock=1.0), kv_cache={"every": 2, "ratio": 1.25, "format": "bf16", "budget": "1GB"}),
    Preset(Smoothed(PID(), half_life=1.0), cfg_floor=0.0, rescale=False),
    Preset(Linear(), estimator={"type": "X", "k": 3, "s": 'a "b"\\\n', "at": [0.1, 0.2], "in": {"type": "Y", "n": 1}}),
]


@pytest.fixture(autouse=True)
def _no_folders_of_the_user(monkeypatch):
    monkeypatch.delenv("KVLOCK_POLICIES", raising=False)


# -- the shelf --------------------------------------------------------------------------------------------------------


def test_there_is_a_preset_for_every_policy():
    assert preset_names() == sorted(p.stem for p in SHELF)
    assert {"paper", "off", "full", "half", "threshold", "sigmoid", "pid", "steady", "default"} <= set(preset_names())


@pytest.mark.parametrize("path", SHELF, ids=lambda p: p.stem)
def test_presets_load_keep_the_contract_and_survive_a_round_trip(path):
    policy = load_policy(path.stem)
    assert policy == load_policy(path) == load_policy(str(path)) == load_policy_text(path.read_text())
    assert load_policy(to_toml(policy)) == policy
    check_policy(policy, tokens=3)


@pytest.mark.parametrize("path", SHELF, ids=lambda p: p.stem)
def test_every_line_of_a_preset_is_commented(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    assert lines[0].startswith("# ")
    assert all("# " in line for line in lines)


def test_the_paper_is_the_paper():
    paper = load_policy("paper")
    assert paper == Preset(
        policy=Windowed(Linear(gain=1.0, cfg_max=2.0), last=20, below=3.3),
        threshold=0.01,
        cfg_floor=0.0,
        rescale=True,
        estimator=(("type", "TrajectoryVariance"), ("window", 10)),
    )
    t = 5 * 0.4 / (1 + 4 * 0.4)  # the flow time at which the last 20 of 50 steps begin, shift 5
    assert t / (1 - t) == pytest.approx(paper.policy.below, abs=0.05)


def test_only_the_paper_sets_a_threshold():
    assert [n for n in preset_names() if getattr(load_policy(n), "threshold", None) not in (None, 1.0)] == ["paper"]


def test_describe_has_a_row_for_each():
    rows = {name: (classes, words) for name, classes, words in describe()}
    assert sorted(rows) == preset_names()
    assert rows["paper"][0] == "Windowed(Linear)"
    assert rows["off"][1].startswith("Never locks")


def test_the_readme_lists_every_file_and_links_to_what_exists():
    text = (ROOT / "policies" / "README.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\(([^)]+)\)", text))
    assert {p.name for p in SHELF} <= links
    assert {f"recipes/{p.name}" for p in (ROOT / "policies" / "recipes").glob("*.py")} <= links
    assert all((ROOT / "policies" / link).exists() for link in links)


# -- Preset -----------------------------------------------------------------------------------------------------------


def test_a_preset_is_its_policy():
    inner = PID(bias=0.25)
    preset = Preset(inner, threshold=0.5)
    risk = torch.tensor([0.5, 2.0])
    obs = Observation(1.0, risk, risk, risk, torch.tensor([5.0, 5.0]))
    assert preset.init() == inner.init()
    assert preset.start(obs) == inner.start(obs)
    state, control = preset.step(preset.init(), obs)
    assert torch.equal(control.lock, inner.step(inner.init(), obs)[1].lock)
    assert type(state) is type(inner.step(inner.init(), obs)[0])
    assert (preset.never_locks, preset.uses_risk) == (False, True)
    assert (Preset(Constant()).never_locks, Preset(Constant()).uses_risk) == (True, False)
    hash(load_policy("paper"))


def test_advice_is_never_lost_inside_a_combinator():
    paper = load_policy("paper")
    with pytest.raises(PolicyError, match=r"replace\(preset, policy=Smoothed\(preset\.policy"):
        Smoothed(paper, half_life=0.3)
    smooth = replace(paper, policy=Smoothed(paper.policy, half_life=0.3))
    assert (smooth.threshold, smooth.policy.policy) == (0.01, paper.policy)


def test_estimator_advice_is_a_table():
    preset = Preset(PID(), estimator={"type": "RenoiseVariance", "draws": 2})
    assert dict(preset.estimator) == {"type": "RenoiseVariance", "draws": 2}
    with pytest.raises(PolicyError, match="names its class"):
        Preset(PID(), estimator={"window": 10})
    with pytest.raises(PolicyError, match="directory is not a setting that a preset may give"):
        Preset(Constant(lock=1.0), kv_cache={"directory": "x"})
    with pytest.raises(KVLockError, match="every=0"):
        Preset(Constant(lock=1.0), kv_cache={"every": 0})


def test_advice_on_what_a_policy_never_does_is_refused():
    for advice in ({"threshold": 0.1}, {"estimator": {"type": "RenoiseVariance"}}):
        with pytest.raises(PolicyError, match=rf"{next(iter(advice))}: Constant\(lock=1.0.*reads no risk"):
            Preset(Constant(lock=1.0), **advice)
        assert Preset(PID(), **advice).uses_risk
    with pytest.raises(PolicyError, match="never locks, so nothing would be kept"):
        Preset(Constant(lock=0.0), kv_cache={"every": 3})
    with pytest.raises(PolicyError, match="text: threshold: "):
        load_policy('threshold = 0.1\n[policy]\ntype = "Constant"\nlock = 1.0\n')


@pytest.mark.parametrize(
    ("kv_cache", "message"),
    [
        ("true", r"kv_cache=True; expected a table"),
        ("{ every = 0 }", "kv_cache: every=0"),
        ('{ every = "a" }', "every='a'"),
    ],
)
def test_a_bank_that_cannot_be_meant_is_told_with_its_file(tmp_path, kv_cache, message):
    path = tmp_path / "mine.toml"
    path.write_text(f'kv_cache = {kv_cache}\n[policy]\ntype = "Constant"\nlock = 1.0\n')
    with pytest.raises(PolicyError, match=f"mine.toml: .*{message}"):
        load_policy(path)


# -- reading and writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", BUILT_IN, ids=repr)
def test_round_trip(policy):
    assert load_policy(to_toml(policy)) == policy


def test_code_cannot_be_written():
    with pytest.raises(PolicyError, match="cannot be written as a file"):
        to_toml(Smoothed(stateless(lambda obs: Control(0.0)), half_life=1.0))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("papper", ["no policy 'papper'", "did you mean 'paper'?", "threshold"]),
        ("nowhere.toml", ["cannot read", "'nowhere.toml'"]),
        ("[policy\n", ["not valid TOML", "line 1"]),
        ("threshold = 1\n", ["no [policy] table", 'type = "Linear"']),
        ("treshold = 1\n[policy]\ntype = 'PID'", ["treshold", "did you mean 'threshold'?", "cfg_floor"]),
        ("threshold = -1\n[policy]\ntype = 'PID'", ["threshold=-1", "> 0"]),
        ("rescale = 1\n[policy]\ntype = 'PID'", ["rescale=1", "True or False"]),
        ("policy = 3\n", ["policy = 3", "expected a table"]),
        ("[policy]\ntype = 'Linaer'", ["policy.type = 'Linaer'", "did you mean 'Linear'?", "Smoothed"]),
        ("[policy]\nkp = 1", ["policy.type = None", "Known: Constant"]),
        ("[policy]\ntype = 'PID'\ntraget = 1", ["policy.traget", "did you mean 'target'?", "filter_width"]),
        (
            "[policy]\ntype = 'Windowed'\nlast = 9\n[policy.policy]\ntype = 'Linear'\ngian = 2",
            ["policy.policy.gian is not a setting of Linear", "did you mean 'gain'?"],
        ),
        ("[policy]\ntype = 'Smoothed'\nhalf_life = 1", ["Smoothed needs policy", "half_life"]),
        ("[policy]\ntype = 'PID'\ntarget = 0", ["policy: PID(target=0)", "> 0"]),
    ],
)
def test_errors_name_the_place_and_the_nearest_word(text, words):
    with pytest.raises(PolicyError) as info:
        load_policy(text)
    for word in words:
        assert word in str(info.value)


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[policy]\ntype = 'PID'\nkq = 1\n")
    with pytest.raises(PolicyError, match=r"mine\.toml: policy\.kq"):
        load_policy(path)


def test_folders_of_the_user_come_first(tmp_path, monkeypatch):
    for folder, lock in (("a", 0.1), ("b", 0.2)):
        (tmp_path / folder).mkdir()
        save_policy(Constant(lock=lock), tmp_path / folder / "mine.toml")
    save_policy(Constant(lock=0.9), tmp_path / "b" / "half.toml")
    monkeypatch.setenv(
        "KVLOCK_POLICIES", os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "no")])
    )
    assert load_policy("mine") == Constant(lock=0.1)
    assert load_policy("half") == Constant(lock=0.9)
    assert load_policy("full") == Constant(lock=1.0)
    assert "mine" in preset_names()


def test_a_broken_file_is_named_with_its_folder(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.toml").write_text("[policy]\ntype = 'Constant'\nlok = 1\n")
    (tmp_path / "b" / "other.toml").write_text("[policy\n")
    monkeypatch.setenv("KVLOCK_POLICIES", os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")]))
    for name, folder, problem in (("mine", "a", "policy.lok"), ("other", "b", "not valid TOML")):
        with pytest.raises(PolicyError) as caught:
            load_policy(name)
        assert str(tmp_path / folder / f"{name}.toml") in str(caught.value)
        assert problem in str(caught.value)


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "mine.toml"
    save_policy(PID(), path)
    assert load_policy(path) == PID()
    with pytest.raises(PolicyError):
        save_policy(stateless(lambda obs: Control(0.0)), path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_policy(Linear(), path)
    assert load_policy(path) == PID()
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


@pytest.mark.slow
def test_presets_reach_people_who_use_pip(tmp_path):
    python, target = sys.executable, tmp_path / "layer"
    run = {"check": True, "cwd": tmp_path, "capture_output": True, "text": True}
    subprocess.run([python, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], **run)
    wheel = next(tmp_path.glob("*.whl"))
    subprocess.run([python, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)], **run)
    script = (
        "from kvlock_sampling import presets; print(presets.__file__); print(*presets.preset_names());"
        "print(presets.load_policy('paper').policy)"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    where, names, paper = subprocess.run([python, "-c", script], env=environment, **run).stdout.splitlines()
    assert Path(where).is_relative_to(target)
    assert names.split() == preset_names()
    assert paper == repr(load_policy("paper").policy)
    assert presets.__file__ != where
