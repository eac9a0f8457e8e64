"""The shelf: every preset loads by name, says what it is, survives a round trip, and reaches people who use pip."""

import contextlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvlock_sampling as kv
from kvlock_sampling import presets
from kvlock_sampling.policy import (
    PID,
    Clamped,
    Constant,
    Linear,
    Sigmoid,
    Smoothed,
    Threshold,
    Windowed,
    stateless,
)
from kvlock_sampling.presets import Preset, describe, load_policy, load_preset, preset_names, to_toml
from kvlock_sampling.testing import check_policy
from kvlock_sampling.types import Control, EstimatorError, PolicyError
from kvlock_sampling.utils.tables import from_table, read_toml, to_table, write_toml
from kvlock_sampling.variance import RenoiseVariance, Sparse, TrajectoryVariance
from kvlock_sampling.variance.thresholds import ThresholdCurve

ROOT = Path(__file__).parent.parent
SHELF = sorted((ROOT / "policies").glob("*.toml"))

BUILT_IN = [
    Constant(),
    Constant(lock=0.3, cfg_scale=4.0),
    Linear(gain=0.5, cfg_max=None),
    Threshold(on=1.5, cfg_alarm=0.5),
    Sigmoid(width=1e-5, cfg_range=(1.5, 0.5)),
    PID(slew=0.5, kd=1 / 3),
    Windowed(Linear(), last=20, below=3.3),
    Smoothed(PID(), half_life=0.3),
    Smoothed(Windowed(Sigmoid(), above=8.0), half_life=0.2),
    Clamped(Smoothed(Windowed(Threshold(), above=1.0), half_life=1.0), cfg=(1.0, 8.0)),
]

MOVES = TrajectoryVariance(window=None, span=8.0, normalise=True, patch=(1, 2, 2))

DEEP = "policy = " + "{ type = 'Smoothed', half_life = 1, policy = " * 20 + "3" + " }" * 20 + "\n"

PRESETS = [
    Preset(PID(), threshold=0.02),
    Preset(PID(), threshold=ThresholdCurve((10.0, 0.1), (0.001, 0.02))),
    Preset(Constant(lock=1.0), kv_cache={"every": 2, "ratio": 1.25, "format": "int8", "budget": "1GB"}),
    Preset(Constant(lock=1.0), kv_cache={"every": None, "format": None, "budget": None}),
    Preset(Constant(lock=1.0), reach=math.inf),
    Preset(Smoothed(PID(), half_life=1.0), cfg_floor=0.0, rescale=False),
    Preset(Linear(), estimator=MOVES),
    Preset(Linear(), estimator=Sparse(RenoiseVariance(passes=1), sigmas=(1.0, 0.3), hold=True), rescale=True),
    Preset(Linear(), estimator=Sparse(Sparse(MOVES, every=2, hold=True), every=1)),
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
    preset = load_preset(path.stem)
    assert preset == load_preset(path) == load_preset(str(path)) == load_preset(path.read_text())
    assert load_preset(to_toml(preset)) == preset
    assert load_policy(path.stem) == preset.policy
    check_policy(preset.policy, tokens=3)


@pytest.mark.parametrize("path", SHELF, ids=lambda p: p.stem)
def test_every_line_of_a_preset_is_commented(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    assert lines[0].startswith("# ")
    assert all("# " in line for line in lines)


def test_the_paper_is_the_paper():
    paper = load_preset("paper")
    assert paper == Preset(
        policy=Windowed(Linear(gain=1.0, cfg_max=2.0), last=20, below=3.3),
        threshold=0.01,
        cfg_floor=0.0,
        rescale=True,
        estimator=TrajectoryVariance(window=10),
    )
    t = 5 * 0.4 / (1 + 4 * 0.4)  # the flow time at which the last 20 of 50 steps begin, shift 5
    assert t / (1 - t) == pytest.approx(paper.policy.below, abs=0.05)


def test_only_presets_for_one_scale_of_latents_set_a_threshold():
    assert [n for n in preset_names() if load_preset(n).threshold is not None] == ["paper"]


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


def test_a_preset_is_no_policy():
    with pytest.raises(PolicyError, match=r"of type Preset; expected a Policy(.|\n)*preset\.policy"):
        Smoothed(load_preset("paper"), half_life=0.3)
    assert Smoothed(load_preset("paper").policy, half_life=0.3).policy == load_policy("paper")
    assert load_preset("fast").kv_cache == {"every": 3, "ratio": 1.5, "format": "int8"}


def test_settings_for_what_a_policy_never_does_are_refused():
    for given in ({"threshold": 0.1}, {"estimator": RenoiseVariance()}):
        with pytest.raises(PolicyError, match=rf"{next(iter(given))}: Constant\(lock=1.0.*reads no risk"):
            Preset(Constant(lock=1.0), **given)
        assert Preset(PID(), **given).policy == PID()
    with pytest.raises(PolicyError, match="never locks, so nothing would be kept"):
        Preset(Constant(lock=0.0), kv_cache={"every": 3})
    with pytest.raises(PolicyError, match="text: threshold: "):
        load_preset('threshold = 0.1\n[policy]\ntype = "Constant"\nlock = 1.0\n')


def test_a_kv_cache_is_a_table(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('kv_cache = true\n[policy]\ntype = "Constant"\nlock = 1.0\n')
    with pytest.raises(PolicyError, match=r"mine.toml: .*kv_cache=True; expected a table"):
        load_preset(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("evry = 3", "evry is not a setting that a preset may give; did you mean 'every'?"),
        ("directory = 'cache'", "directory is not a setting that a preset may give"),
        ("every = 0", "every=0"),
        ("every = 'a'", "every='a'"),
    ],
)
def test_a_preset_makes_no_kv_cache_of_wrong_settings(setup, tmp_path, line, words):
    path = tmp_path / "mine.toml"
    path.write_text(f"[policy]\ntype = 'Constant'\nlock = 1.0\n[kv_cache]\n{line}\n")
    with pytest.raises(PolicyError, match="kv_cache: ") as info:
        setup.lock(policy=path)
    assert words in str(info.value)


def test_a_preset_makes_a_kv_cache(setup, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[policy]\ntype = 'Constant'\nlock = 1.0\n[kv_cache]\nevery = 2\nratio = 1.25\n")
    refresh = setup.lock(policy=path).settings.kv_cache.refresh
    assert (refresh.every, refresh.ratio) == (2, 1.25)


# -- reading and writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", BUILT_IN, ids=repr)
def test_round_trip(policy):
    assert load_policy(to_toml(policy)) == policy


@pytest.mark.parametrize("preset", PRESETS, ids=repr)
def test_presets_survive_a_round_trip(preset):
    assert load_preset(to_toml(preset)) == preset


def test_any_text_and_number_survives():
    table = {"s": 'a "b"\\\n\u00e9', "k e y": [0.1, 2, True], "in": {"x": 1e-300, "deep": {"y": -3}}}
    assert read_toml(write_toml(table), "text") == table


def test_code_cannot_be_written():
    with pytest.raises(PolicyError, match="cannot be written as a file"):
        to_toml(Smoothed(stateless(lambda obs: Control(0.0)), half_life=1.0))


@pytest.mark.parametrize("kind", [*presets.POLICIES.values(), *presets.ESTIMATORS.values()], ids=lambda k: k.__name__)
def test_settings_of_any_wrong_type_are_an_error_and_not_a_crash(kind):
    registry = {**presets.POLICIES, **presets.ESTIMATORS}
    inner = {"policy": {"type": "PID"}, "estimator": {"type": "TrajectoryVariance", "patch": [1, 2, 2]}}
    inner["estimators"] = [inner["estimator"]]
    base = {"type": kind.__name__, "above": 1.0, "half_life": 1.0, "every": 2, **inner}
    base = {key: value for key, value in base.items() if key == "type" or key in kind.__dataclass_fields__}
    made = from_table(base, registry, "x")
    assert from_table(to_table(made, registry), registry, "x") == made
    for name in kind.__dataclass_fields__:
        for wrong in ("text", 10**400, [[1]], {"a": 1}, float("nan"), -1, True):
            with contextlib.suppress(PolicyError):  # no other kind of error
                from_table({**base, name: wrong}, registry, "x")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("papper", ["no policy 'papper'", "did you mean 'paper'?", "threshold"]),
        (Constant(lock=0.5), ["no policy 'Constant(lock=0.5", "known: default", "A file ends in .toml"]),
        (3, ["no policy '3'", "known: default"]),
        ("nowhere.toml", ["cannot read", "'nowhere.toml'"]),
        ("[policy\n", ["not valid TOML", "line 1"]),
        ("threshold = 1\n", ["no [policy] table", 'type = "Linear"']),
        ("treshold = 1\n[policy]\ntype = 'PID'", ["treshold", "did you mean 'threshold'?", "cfg_floor"]),
        ("threshold = -1\n[policy]\ntype = 'PID'", ["threshold=-1", "> 0"]),
        ("rescale = 1\n[policy]\ntype = 'PID'", ["rescale=1", "True or False"]),
        ("policy = 3\n", ["policy = 3", "expected a table"]),
        ("[policy]\ntype = 'Smoothed'\nhalf_life = 1\npolicy = 'PID'", ["policy.policy = 'PID'", "expected a table"]),
        (DEEP, ["16 tables inside"]),
        ("policy = " + "[" * 5000 + "\n", ["not valid TOML"]),
        ("[policy]\ntype = 'PID'\ntarget = " + "1" * 5000, ["not valid TOML", "digits"]),
        ("[policy]\ntype = 'PID'\ntarget = " + "1" * 400, ["policy: PID(target=111", "> 0"]),
        ("threshold = " + "1" * 400 + "\n[policy]\ntype = 'PID'", ["threshold=111", "> 0"]),
        ("[estimator]\ntype = 'Renoise'\n[policy]\ntype = 'PID'", ["estimator.type", "'RenoiseVariance'?"]),
        (
            "[estimator]\ntype = 'Sparse'\nevery = 2\nestimator = { type = 'RenoiseVariance', pases = 2 }\n"
            "[policy]\ntype = 'PID'",
            ["estimator.estimator.pases is not a setting of RenoiseVariance", "did you mean 'passes'?"],
        ),
        ("[policy]\ntype = 'Linaer'", ["policy.type = 'Linaer'", "did you mean 'Linear'?", "Smoothed"]),
        ("[policy]\nkp = 1", ["policy.type = None", "nown: PID, Clamped, Constant"]),
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
        (tmp_path / folder / "mine.toml").write_text(to_toml(Constant(lock=lock)))
    (tmp_path / "b" / "half.toml").write_text(to_toml(Constant(lock=0.9)))
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


def test_a_broken_file_hides_no_other_in_the_list(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text("[policy\n")
    monkeypatch.setenv("KVLOCK_POLICIES", str(tmp_path))
    rows = {name: (classes, about) for name, classes, about in presets.describe()}
    assert rows["mine"][0] == "error"
    assert "mine.toml is not valid TOML" in rows["mine"][1]
    assert rows["half"][0] == "Constant"


def test_a_file_with_a_mark_of_its_byte_order_is_read(tmp_path):
    (tmp_path / "mine.toml").write_text(to_toml(Constant(lock=0.5)), encoding="utf-8-sig")
    assert load_policy(tmp_path / "mine.toml") == Constant(lock=0.5)


@pytest.mark.slow
def test_presets_reach_people_who_use_pip(tmp_path):
    python, target = sys.executable, tmp_path / "layer"
    run = {"check": True, "cwd": tmp_path, "capture_output": True, "text": True}
    subprocess.run([python, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], **run)
    wheel = next(tmp_path.glob("*.whl"))
    subprocess.run([python, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)], **run)
    script = (
        "from kvlock_sampling import presets; print(presets.__file__); print(*presets.preset_names());"
        "print(presets.load_policy('paper'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    where, names, paper = subprocess.run([python, "-c", script], env=environment, **run).stdout.splitlines()
    assert Path(where).is_relative_to(target)
    assert names.split() == preset_names()
    assert paper == repr(load_policy("paper"))
    assert presets.__file__ != where
    assert (target / "kvlock_sampling" / "py.typed").is_file()


def test_an_estimator_of_a_preset_that_is_none_is_told(setup):
    for wrong in (kv.TrajectoryVariance, "trajectory"):
        with pytest.raises(EstimatorError, match=r"estimator=.*; expected an Estimator, e.g. estimator="):
            setup.lock(policy=Preset(kv.Sigmoid(), estimator=wrong))
