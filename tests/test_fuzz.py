"""Presets, cache folders and command lines as strangers and accidents make them: an error of this library, or right."""

from __future__ import annotations

import os
import random
import shutil
import signal
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
from kv_entries import entry, equal, source_pass
from kv_entries import run as fill
from typer.testing import CliRunner

import kvlock_sampling as kv
from kvlock_sampling.app.cli import app
from kvlock_sampling.kv_cache import KVCache, KVCacheWarning
from kvlock_sampling.presets import Preset, load_preset
from kvlock_sampling.types import KVLockError, PolicyError

TEXTS = [path.read_text() for path in sorted((Path(__file__).parents[1] / "policies").rglob("*.toml"))]
SIGMAS = [8.0, 6.5, 4.0, 2.0, 1.0, 0.3]


@contextmanager
def no_longer_than(seconds: int):
    """Whatever waits for ever ends here, with an error that no test expects."""

    def late(*_):
        raise RuntimeError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# -- presets ----------------------------------------------------------------------------------------------------------

VALUES = (
    *("nan", "-inf", "-1", "0", "1e999", "9" * 5000, "0x7fffffffffffffffffff", '""', '"none"', "[]", "[[[]]]", "{}"),
    *("true", '"os"', '"load"', "1979-05-27", '"\\u0000"', "[0.2, 0.1]", "[1, 2, 3]", '{ type = "PID" }', "[" * 3000),
    *('{ type = "Sparse" }', '{ type = "Sparse", every = 2, estimator = { type = "PID" } }', "'''", "é", "\x00"),
)
KEYS = ("type", "policy", "lock", "__class__", "threshold", "kv_cache", "directory", "estimator", "seed", "a.b.c", "é")


def mutated(text: str, rng: random.Random) -> str:
    """A preset with one accident or, in one of three, with two."""
    for _ in range(rng.choice((1, 1, 2))):
        lines = text.splitlines() or [""]
        at = rng.randrange(len(lines))
        key, equals, value = lines[at].partition("=")
        kind = rng.randrange(10)
        if kind > 7:
            digits = [i for i, letter in enumerate(text) if letter.isdigit()]
            at = rng.choice(digits or [0])
            lines = [text[:at] + rng.choice("0123456789.-e") + text[at + 1 :]]
        elif kind == 0 and equals:
            lines[at] = f"{key}= {rng.choice(VALUES)}"
        elif kind == 1 and equals:
            lines[at] = f"{rng.choice(KEYS)} ={value}"
        elif kind == 2:
            lines.insert(at, f"{rng.choice(KEYS)} = {rng.choice(VALUES)}")
        elif kind == 3:
            del lines[at]
        elif kind == 4:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif kind == 5:
            lines[at] = "".join(rng.sample(lines[at], len(lines[at])))
        elif kind == 6 and text:
            cut = rng.randrange(len(text))
            lines = [text[:cut] + chr(rng.randrange(1, 0x2FF)) + text[cut + rng.randint(0, 3) :]]
        else:
            lines.insert(at, f"[{'policy.' * rng.choice((1, 20, 2000))}policy]")
        text = "\n".join(lines)
    return text + "\n"


def test_two_thousand_mutated_presets():
    rng, right = random.Random(0), 0
    with no_longer_than(120):
        for i in range(2000):
            text = mutated(TEXTS[i % len(TEXTS)], rng)
            try:
                preset = load_preset(text)
            except PolicyError:
                continue
            right += 1
            assert isinstance(preset, Preset)
            assert load_preset(kv.to_toml(preset)) == preset, text
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                try:
                    kv.KVLock(lambda x, sigma: x, policy=preset)
                except KVLockError:
                    continue
    assert 400 < right < 1600  # else the mutations are too coarse, or too fine


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nowhere", "link to itself", "bytes", "empty"])
def test_a_preset_that_is_no_text_file_is_refused(tmp_path, kind):
    path = tmp_path / "mine.toml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind.startswith("link"):
        path.symlink_to(tmp_path / "none" if kind == "link to nowhere" else path)
    else:
        path.write_bytes(b"\xff\xfe\x00" if kind == "bytes" else b"")
    with no_longer_than(10), pytest.raises(PolicyError, match=r"mine\.toml"):
        load_preset(path)


def test_a_shelf_with_a_pipe_on_it_does_not_wait(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.toml")
    monkeypatch.setenv("KVLOCK_POLICIES", str(tmp_path))
    with no_longer_than(20):
        assert load_preset("paper").threshold == 0.01
        ended = CliRunner().invoke(app, ["policies"])
    assert ended.exit_code == 2
    assert "pipe.toml" in ended.output


# -- cache folders ----------------------------------------------------------------------------------------------------


def damage(folder: Path, rng: random.Random) -> None:
    """One accident to one file of a filled cache, or to its folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    if not files:
        return
    path, other = rng.choice(files), rng.choice(files)
    data = bytearray(path.read_bytes())
    kind = rng.randrange(10)
    if kind == 0:
        at = rng.randrange(max(1, len(data)))
        data[at : at + rng.randint(1, 8)] = rng.randbytes(rng.randint(0, 8))
        path.write_bytes(data)
    elif kind == 1:
        path.write_bytes(data[: rng.randrange(len(data) + 1)])
    elif kind == 2:
        path.write_bytes(other.read_bytes())
    elif kind == 3:
        path.write_bytes(data.replace(b"float32", rng.choice((b"float16", b"int8   ", b"load   ", b"os     "))))
    elif kind == 4:
        path.write_bytes(rng.randbytes(8) + data[8:])
    elif kind == 5:
        path.write_bytes(bytes(rng.sample(list(data), len(data))))
    else:
        path.unlink()
        if kind == 6:
            path.mkdir()
        elif kind == 7:
            os.mkfifo(path)
        elif kind == 8:
            path.symlink_to(rng.choice(("/dev/zero", "none", path.name, "..", other.name)))
        else:
            path.with_suffix(".tmp").write_bytes(data)


def test_two_hundred_mutated_cache_folders(tmp_path):
    """Whatever lies in the folder, every noise level serves what it would without one: K/V are stored as they come."""
    settings = {"format": None, "ratio": 1.01, "every": 1}
    fill(entry(KVCache(tmp_path / "whole", **settings)), SIGMAS)
    warned = 0
    with no_longer_than(120):
        for i in range(200):
            rng, copy = random.Random(i), tmp_path / str(i)
            shutil.copytree(tmp_path / "whole", copy)
            for _ in range(rng.randint(1, 3)):
                damage(next(copy.iterdir()), rng)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                one = entry(KVCache(copy, budget=0, **settings))
                for sigma in SIGMAS:
                    found = one.lookup(sigma)
                    if found is None:
                        found = one.put(sigma, source_pass(sigma))
                    assert equal(found, source_pass(sigma)), (i, sigma)
            assert all(issubclass(w.category, KVCacheWarning) for w in told)
            warned += bool(told)
            shutil.rmtree(copy)
    assert warned > 100


# -- command lines ----------------------------------------------------------------------------------------------------

WORDS = (
    *("edit", "demo", "calibrate", "policies", "samplers", "clip.mp4", "mask.png", "folder", "no/such/file.mp4", "-"),
    *("--mask", "--prompt", "--policy", "--steps", "--seed", "--scale", "--size", "--frames", "--fps", "--model", "-o"),
    *("--cfg-scale", "--strength", "--sampler", "--clips", "--quantile", "--out", "--help", "--version", "--wat"),
    *("out.mp4", "x.toml", "folder/", "0", "-1", "nan", "inf", "1e400", "64x64", "x", "", "é", "a red ball", "tiny"),
    *("half", "default", "paper", "nosuch", "euler", "mask.txt", "\x00", "$(rm)", "--", "9" * 400),
)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with a few files, in which nothing that a line starts takes long."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "clip.mp4").write_bytes(b"no film")
    (tmp_path / "mask.png").write_bytes(b"\x89PNG no picture")
    (tmp_path / "mask.txt").write_text("text")
    for name in ("run_demo", "measure"):
        monkeypatch.setattr(f"kvlock_sampling.app.cli.{name}", _stop)
    return tmp_path


def _stop(*_, **__):
    raise KVLockError("it would run")


def test_two_hundred_command_lines(desk):
    """Each ends with status 0 or 2 and a message, never with a traceback, and leaves nothing behind."""
    rng, before, codes = random.Random(0), sorted(desk.rglob("*")), []
    with no_longer_than(300):
        for _ in range(200):
            line = [rng.choice(WORDS[:5]), *rng.choices(WORDS, k=rng.randint(0, 7))]
            if rng.random() < 0.5:
                line = ["edit", "clip.mp4", "--mask", "mask.png", "--prompt", "x", "-o", "out.mp4", *line[1:]]
            ended = CliRunner().invoke(app, line)
            assert ended.exception is None or isinstance(ended.exception, SystemExit), (line, ended.exception)
            assert ended.exit_code in (0, 2), (line, ended.output)
            assert ended.output.strip()
            codes.append(ended.exit_code)
            left = [path for path in sorted(desk.rglob("*")) if path not in before and not path.is_dir()]
            assert not left, (line, left)
    assert {0, 2} <= set(codes)
