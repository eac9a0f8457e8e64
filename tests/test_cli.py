"""`kvlock` as people call it: files in, files out; and for bad input exit code 2, a message, and no file."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from kvlock_sampling import samplers
from kvlock_sampling.app.cli import app
from kvlock_sampling.presets import preset_names
from kvlock_sampling.video import read_clip

PROMPT = "a red ball moving left"
Kvlock = Callable[..., Result]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip as mp4 and gif, 64 x 48, 20 frames, made by imageio, and a mask."""
    made = tmp_path_factory.mktemp("files")
    y, x = np.mgrid[:48, :64]
    frames = np.stack([np.stack([x * 3, y * 4, (x + 5 * t) % 64 * 3], axis=-1).astype(np.uint8) for t in range(20)])
    iio.imwrite(made / "clip.mp4", frames, fps=15, plugin="pyav", codec="libx264")
    iio.imwrite(made / "clip.gif", frames, duration=100, loop=0)
    mask = np.zeros((48, 64), np.uint8)
    mask[14:34, 22:42] = 255
    iio.imwrite(made / "mask.png", mask)
    return made


@pytest.fixture
def folder(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `files`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def kvlock(folder: Path) -> Kvlock:
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def edit_words(output: str = "out.mp4", **change: object) -> list[object]:
    """The words of a good, quick edit; keywords change options ("clip" is the argument)."""
    options: dict[str, object] = {"mask": "mask.png", "prompt": PROMPT, "output": output, "steps": 3, **change}
    words: list[object] = ["edit", options.pop("clip", "clip.mp4")]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", value]
    return words


def plain(text: str) -> str:
    """Without line breaks, which depend on the terminal's width."""
    return " ".join(text.split())


def test_an_mp4_of_another_tool_is_edited(kvlock: Kvlock) -> None:
    result = kvlock(*edit_words("out.mp4", policy="half", trace="run.png"))
    assert result.exit_code == 0, result.output
    assert "out.mp4: 9 model passes" in plain(result.output)
    film = iio.imread("out.mp4", plugin="pyav")
    assert film.shape == (8, 256, 256, 3)
    assert Image.open("run.png").size[0] > 500


def test_it_says_what_was_taken_and_what_was_left(kvlock: Kvlock) -> None:
    said = plain(kvlock(*edit_words("out.gif", policy="half")).output)
    cut = "20 frames of 48 x 64 read, cut to the middle 48 x 48; 8 edited, picked evenly; 12 left out."
    assert f"{cut} Edited at 64 x 64, 5.526 fps" in said


def test_a_region_that_is_cut_away_is_named(kvlock: Kvlock) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, :6] = 255
    Image.fromarray(mask).save("left.png")
    result = kvlock(*edit_words("out.gif", mask="left.png"))
    assert result.exit_code == 2
    said = plain(result.output)
    assert "'left.png' is white only beside the middle, to which it is cut: nothing to edit" in said


def test_an_empty_name_is_no_folder(kvlock: Kvlock) -> None:
    for change in ({"clip": ""}, {"mask": ""}):
        result = kvlock(*edit_words("out.gif", **change))
        assert (result.exit_code, "no such file or folder: '(no name)'" in result.output) == (2, True)


def test_a_gif_is_edited_into_a_gif(kvlock: Kvlock) -> None:
    result = kvlock(*edit_words("new/out.gif", clip="clip.gif", scale=2, sampler="heun", strength=0.7))
    assert result.exit_code == 0, result.output
    with Image.open("new/out.gif") as film:
        assert (film.size, film.n_frames) == ((128, 128), 8)


def test_outside_the_mask_the_written_clip_is_the_source(kvlock: Kvlock) -> None:
    from kvlock_sampling.video import read_clip, read_mask

    assert kvlock(*edit_words("out.gif", clip="clip.gif", scale=1, policy="half")).exit_code == 0
    size, frames = (64, 64), 8
    source, edited = (read_clip(name, frames=frames, size=size).pixels for name in ("clip.gif", "out.gif"))
    from kvlock_sampling.masks import feather

    outside = (feather(read_mask("mask.png", frames=frames, size=size), 2.0) == 0)[0].expand_as(source)
    difference = (source - edited)[outside].abs()
    assert outside.float().mean() > 0.5
    assert float(difference.mean()) < 0.1  # 256 colours of a gif


def test_a_warning_is_words_without_code(kvlock: Kvlock) -> None:
    result = kvlock(*edit_words("out.gif", policy="off", kv_cache="kept"))
    assert result.exit_code == 0, result.output
    said = plain(result.output)
    assert "warning: kv_cache= without effect: the policy Constant(lock=0.0" in said
    assert ".py" not in said
    assert "UserWarning" not in said


def test_an_exact_background_is_called_so(kvlock: Kvlock) -> None:
    said = plain(kvlock(*edit_words("out.gif", policy="half")).output)
    assert "background PSNR: exact (ceiling of the codec: exact)" in said
    assert "PSNR: exact" not in plain(kvlock(*edit_words("out.gif", policy="off")).output)


def test_the_same_command_writes_the_same_file(kvlock: Kvlock) -> None:
    for name in ("a.gif", "b.gif"):
        assert kvlock(*edit_words(name, seed=3)).exit_code == 0
    assert Path("a.gif").read_bytes() == Path("b.gif").read_bytes()


def test_a_policy_file_and_a_folder_of_frames(kvlock: Kvlock, folder: Path) -> None:
    Path("mine.toml").write_text('[policy]\ntype = "Constant"\nlock = 0.25\n')
    Path("frames").mkdir()
    for i in range(12):
        Image.new("RGB", (50, 40), (20 * i, 90, 90)).save(f"frames/frame{i}.png")
    result = kvlock(*edit_words("out.png", clip="frames", policy="mine.toml", source_prompt="an empty stage"))
    assert result.exit_code == 0, result.output
    assert Path("out.png").stat().st_size > 0


def unreadable(folder: Path) -> None:
    (folder / "bad.mp4").write_bytes(b"this is not a film" * 50)
    (folder / "bad.png").write_bytes(b"nor is this an image")
    Image.new("L", (64, 48), 0).save(folder / "black.png")
    Image.new("L", (64, 48), 255).save(folder / "white.png")
    shades = [np.full((48, 64, 3), 80 * i, np.uint8) for i in range(3)]
    iio.imwrite(folder / "short.gif", np.stack(shades), duration=100)
    (folder / "typo.toml").write_text('[policy]\ntype = "Sigmoid"\ncenter = 1.0\n')
    (folder / "broken.toml").write_text("[policy\n")
    (folder / "empty").mkdir()
    (folder / "other").mkdir()
    (folder / "other" / "weights.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")


BAD = {
    "missing clip": ({"clip": "nowhere.mp4"}, "no such file or folder: 'nowhere.mp4'"),
    "unreadable clip": ({"clip": "bad.mp4"}, "cannot read 'bad.mp4' as a film"),
    "clip of an unknown kind": ({"clip": "typo.toml"}, "unknown suffix '.toml'"),
    "a folder without images": ({"clip": "empty"}, "holds no images"),
    "missing mask": ({"mask": "nowhere.png"}, "no such file or folder"),
    "unreadable mask": ({"mask": "bad.png"}, "cannot read 'bad.png' as an image"),
    "moving mask of other frames": ({"mask": "short.gif"}, "3 frames"),
    "nothing to edit": ({"mask": "black.png"}, "nothing to edit"),
    "nothing to keep": ({"mask": "white.png"}, "polarity"),
    "unknown word": ({"prompt": "a red ball movin left"}, "cannot read 'movin'"),
    "no colour in the source prompt": ({"source_prompt": "a dog"}, "names none of red, green"),
    "missing sampler": ({"sampler": "dpmpp_2n"}, "did you mean 'dpmpp_2m'"),
    "unknown policy": ({"policy": "stedy"}, "steady"),
    "missing policy file": ({"policy": "nowhere.toml"}, "cannot read the policy file"),
    "unknown key": ({"policy": "typo.toml"}, "center"),
    "not TOML": ({"policy": "broken.toml"}, "not valid TOML"),
    "folder without weights": ({"model": "empty"}, "expected 'tiny'"),
    "other weights": (
        {"model": "other"},
        "embedded architecture: Error(s) in loading state_dict for TinyWan: Missing key",
    ),
    "output of an unknown kind": ({"output": "out.xyz"}, "expected one of .mp4"),
    "figure of an unknown kind": ({"trace": "run.xyz"}, "expected .png, .svg or .pdf"),
    "guidance that is no number": ({"cfg_scale": "nan", "policy": "off"}, "expected a finite number"),
    "output in a file": ({"output": "mask.png/out.gif"}, "mask.png"),
    "a KV cache in no folder": ({"kv_cache": ""}, "directory='' names no folder"),
    "no steps": ({"steps": 0}, "Invalid value for '--steps'"),
    "strength out of range": ({"strength": 1.5}, "Invalid value for '--strength'"),
}


EARLY = {
    "policy": ({"policy": "stedy"}, "did you mean 'steady'"),
    "seed": ({"seed": -1}, "seed=-1; expected a whole number in [0, 2**64)"),
    "guidance": ({"cfg_scale": "nan"}, "cfg_scale=nan; expected a finite number"),
    "prompt": ({"prompt": " "}, "--prompt is empty; expected what the masked region should show"),
    "steps": ({"steps": 10**8}, "Invalid value for '--steps'"),
}


@pytest.mark.parametrize("name", EARLY)
def test_what_needs_no_model_is_refused_before_one_is_opened(kvlock: Kvlock, monkeypatch, name: str) -> None:
    monkeypatch.setattr("kvlock_sampling.app.cli.open_model", lambda *_, **__: pytest.fail("it opened the model"))
    change, message = EARLY[name]
    result = kvlock(*edit_words(**change))
    assert result.exit_code == 2
    assert message in plain(result.output)


def test_a_transition_is_refused_before_a_model_is_opened(kvlock: Kvlock, monkeypatch) -> None:
    monkeypatch.setattr("kvlock_sampling.app.cli.open_model", lambda *_, **__: pytest.fail("it opened the model"))
    result = kvlock(*edit_words(), "--transition", "1", "nan")
    assert result.exit_code == 2
    assert "transition=(1.0, nan); expected (width in tokens > 0" in plain(result.output)


@pytest.mark.parametrize("which", ["clip", "mask", "image"])
def test_a_file_that_is_not_there_is_named_before_a_model_is_opened(kvlock: Kvlock, monkeypatch, which: str) -> None:
    monkeypatch.setattr("kvlock_sampling.app.cli.open_model", lambda *_, **__: pytest.fail("it opened the model"))
    words = edit_words(**({which: "nosuch.png"} if which != "image" else {}))
    result = kvlock(*words, *(["--image", "nosuch.png"] if which == "image" else []))
    assert result.exit_code == 2
    assert "no such file or folder: 'nosuch.png'" in plain(result.output)


def test_names_of_files_are_no_markup(kvlock: Kvlock) -> None:
    result = kvlock(*edit_words("[red]a[/] :smile:.png", policy="off", steps=1, seeds=2))
    assert result.exit_code == 0, result.output
    assert "[red]a[/] :smile:.png: " in result.output
    assert "[red]a[/] :smile:-candidates.png: " in result.output


def test_sigterm_leaves_no_half_written_file(folder: Path) -> None:
    """A run that is ended within a write, after its imports and its handler."""
    code = (
        "import os, signal\n"
        "from kvlock_sampling.app import __main__, cli\n"
        "from kvlock_sampling.utils.files import atomic\n"
        "def write():\n"
        "    with atomic('a.png') as path:\n"
        "        path.touch(); os.kill(os.getpid(), signal.SIGTERM); signal.pause()\n"
        "cli.app = write\n"
        "__main__.main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=folder, timeout=120, check=False)
    assert ended.returncode == 128 + signal.SIGTERM
    assert not [path.name for path in folder.iterdir() if "a" in path.stem.split(".") or ".tmp" in path.name]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_a_message_and_no_file(kvlock: Kvlock, folder: Path, name: str) -> None:
    unreadable(folder)
    before = sorted(folder.rglob("*"))
    change, message = BAD[name]
    result = kvlock(*edit_words(**change))
    assert result.exit_code == 2, result.output
    assert message in plain(result.output), result.output
    assert "Traceback" not in result.output
    assert sorted(folder.rglob("*")) == before


def test_an_edit_that_cannot_begin_leaves_no_folder(kvlock: Kvlock) -> None:
    assert kvlock(*edit_words("new/out.mp4", mask="nowhere.png")).exit_code == 2
    assert not Path("new").exists()


def test_a_good_file_survives_a_bad_run(kvlock: Kvlock, folder: Path) -> None:
    Path("out.mp4").write_bytes(b"kept")
    assert kvlock(*edit_words(mask="nowhere.png")).exit_code == 2
    assert Path("out.mp4").read_bytes() == b"kept"


def test_the_shelf_is_listed(kvlock: Kvlock) -> None:
    result = kvlock("policies")
    assert result.exit_code == 0
    assert all(name in result.output for name in preset_names())


def test_the_samplers_are_listed(kvlock: Kvlock) -> None:
    result = kvlock("samplers")
    assert result.exit_code == 0
    assert tuple(result.output.split()) == samplers.names()


def test_the_demo_writes_all_its_files(kvlock: Kvlock) -> None:
    result = kvlock("demo", "--out", "shown", "--steps", 2, "--seed", 1)
    assert result.exit_code == 0, result.output
    files = {path.name for path in Path("shown").iterdir()}
    assert files == {"edits.png", "edits.mp4", "edits.gif", "trace.png", "trace.csv", "metrics.json"}
    assert all(name in result.output for name in files)
    film = iio.imread("shown/edits.mp4", plugin="pyav")
    with Image.open("shown/edits.gif") as gif:
        assert gif.n_frames == len(film) == 8
        assert gif.size == (film.shape[2], film.shape[1]) == Image.open("shown/edits.png").size
    assert Image.open("shown/trace.png").size[0] > 500
    metrics = json.loads(Path("shown/metrics.json").read_text())
    assert (metrics["seed"], metrics["steps"], metrics["sampler"]) == (1, 2, "dpmpp_2m")
    assert list(metrics["variants"]) == ["composited", "let go", "release"]
    assert len(metrics["edits"]) == 5
    with open("shown/trace.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 5  # evaluations times clips


@pytest.mark.parametrize("words", [["--sampler", "nope"], ["--steps", "0"], ["--seed", "x"], ["--seed", "-1"]])
def test_a_bad_demo_leaves_no_folder(kvlock: Kvlock, folder: Path, words: list[str]) -> None:
    result = kvlock("demo", "--out", "shown", *words)
    assert result.exit_code == 2
    assert not Path("shown").exists()
    assert kvlock("demo", "--out", "mask.png", "--steps", "1").exit_code == 2  # a file is in the way


def test_help_names_every_command(kvlock: Kvlock) -> None:
    text = kvlock("--help").output
    assert all(name in text for name in ("demo", "edit", "policies", "samplers"))


def test_a_short_clip_holds_its_last_frame(kvlock: Kvlock, folder: Path) -> None:
    pictures = (np.random.default_rng(0).random((3, 40, 40, 3)) * 255).astype(np.uint8)
    iio.imwrite(folder / "three.gif", pictures, duration=100, loop=0)
    result = kvlock(*edit_words(output="short.mp4", clip="three.gif"))
    assert result.exit_code == 0, result.output
    assert read_clip(folder / "short.mp4").pixels.shape[1] == 8


@pytest.mark.parametrize("where", [{}, {"kv_cache": "kept"}])
def test_a_cheap_next_edit_is_promised_where_it_is_one(kvlock: Kvlock, where: dict[str, object]) -> None:
    words = edit_words(policy="fast", steps=4, **where)
    first, second = plain(kvlock(*words).output), plain(kvlock(*words).output)
    assert "Everything fits in memory" in first
    promised = "kept on disk for the next edit of this clip" in first
    passes = [int(re.findall(r"(\d+) model passes", said)[0]) for said in (first, second)]
    assert promised == (passes[1] < passes[0]) == bool(where)
    assert ("--kv-cache DIR" in first) == (not where)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output": "clip.mp4"}, "clip.mp4 is an input or would be written twice"),
        ({"output": "link.mp4"}, "link.mp4 is an input or would be written twice"),
        ({"output": "mask.png"}, "mask.png is an input or would be written twice"),
        ({"trace": "mask.png"}, "mask.png is an input or would be written twice"),
        ({"output": "first.png", "image": "first.png"}, "first.png is an input or would be written twice"),
        ({"output": "o.png", "trace": "./o.png"}, "o.png is an input or would be written twice"),
        (
            {"output": "o.mp4", "trace": "o-candidates.png", "seeds": 2},
            "o-candidates.png is an input or would be written twice",
        ),
        (
            {"output": "mask-o.mp4", "mask": "mask-o-candidates.png", "seeds": 2},
            "is an input or would be written twice",
        ),
        ({"clip": "frames", "output": "frames/o.png"}, "would become one of the images in frames, which is read"),
    ],
)
def test_an_edit_never_replaces_what_it_reads_or_writes(
    kvlock: Kvlock, folder: Path, change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvlock_sampling.app.cli.edit_video", lambda *_, **__: pytest.fail("it sampled"))
    (folder / "link.mp4").symlink_to(folder / "clip.mp4")
    (folder / "frames").mkdir()
    for name in ("first.png", "mask-o-candidates.png", "frames/1.png"):
        shutil.copy(folder / "mask.png", folder / name)
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    result = kvlock(*edit_words(**change))
    assert result.exit_code == 2
    assert words in plain(result.output)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_a_film_may_be_written_beside_the_images_that_are_read(kvlock: Kvlock, folder: Path) -> None:
    (folder / "frames").mkdir()
    for i in range(8):
        shutil.copy(folder / "mask.png", folder / "frames" / f"{i}.png")
    assert kvlock(*edit_words(clip="frames", output="frames/o.mp4")).exit_code == 0


def test_version_and_short_help():
    runner = CliRunner()
    assert re.fullmatch(r"kvlock \d+\.\d+\.\d+\S*\n", runner.invoke(app, ["--version"]).output)
    for line in (["-h"], ["edit", "-h"], ["calibrate", "-h"]):
        ended = runner.invoke(app, line)
        assert (ended.exit_code, "Usage" in ended.output) == (0, True)


@pytest.mark.parametrize(
    ("line", "words"), [(["-o", "x.json"], "ends in .toml"), (["--clips", "no"], "no folder 'no'")]
)
def test_calibrating_names_what_is_missing_before_it_measures(tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvlock_sampling.app.cli.measure", lambda *_, **__: pytest.fail("it measured"))
    ended = CliRunner().invoke(app, ["calibrate", "-o", "x.toml", *line])
    assert ended.exit_code == 2
    assert words in " ".join(ended.output.split())
    assert not list(tmp_path.iterdir())


def test_an_output_that_no_encoder_takes_is_refused_before_sampling(files, tmp_path, monkeypatch):
    monkeypatch.setattr("kvlock_sampling.app.cli.edit_video", lambda *_, **__: pytest.fail("it sampled"))
    given = [files / "clip.mp4", "--mask", files / "mask.png", "--prompt", PROMPT, "-o", tmp_path / "a.mp4"]
    ended = CliRunner().invoke(app, ["edit", *map(str, given), "--scale", "1000"])
    assert ended.exit_code == 2
    assert "64000 pixels a side; expected at most 16384" in " ".join(ended.output.split())


def test_several_seeds_write_a_sheet_of_candidates(kvlock: Kvlock) -> None:
    result = kvlock(*edit_words("out.mp4", steps=4, seed=7, seeds=2, policy="release"))
    assert result.exit_code == 0, result.output
    assert "of 7 to 8 was finished" in plain(result.output)
    assert Image.open("out-candidates.png").size[0] > 2 * 256
    result = kvlock(*edit_words("still.png", steps=4, seeds=2, policy="release"))
    assert result.exit_code == 0, result.output
    assert Image.open("still-candidates.png").size == Image.open("out-candidates.png").size
    assert Image.open("still.png").size != Image.open("still-candidates.png").size
