"""`kvlock web` without a browser: masks over time, files that are read back bit for bit, uploads, sessions."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from typer.testing import CliRunner
from web import Tab, film, free_port, hostile

import kvlock_sampling as kv
from kvlock_sampling import tiny
from kvlock_sampling.app.cli import app
from kvlock_sampling.app.web import served
from kvlock_sampling.app.web._commands import command_line, python_lines
from kvlock_sampling.app.web._keyframes import over_time
from kvlock_sampling.app.web._run import CancelledError, Settings, run
from kvlock_sampling.app.web._session import EXAMPLES, Session, Sessions
from kvlock_sampling.app.web._uploads import write_lossless
from kvlock_sampling.app.web._views import frame_view, numbers_view, tokens_view
from kvlock_sampling.presets import load_preset, to_toml
from kvlock_sampling.testing.pipelines import tiny_pipeline
from kvlock_sampling.types import KVLockError, MaskError, SourceError
from kvlock_sampling.video import read_clip

BALL = "a cyan ball becomes a blue flower"
PROMPT = "a blue flower with four petals moving right"


@pytest.fixture(scope="module")
def video() -> tiny.TinyVideo:
    return tiny.load()


@pytest.fixture
def session(tmp_path: Path, video: tiny.TinyVideo) -> Session:
    found = Session(tmp_path)
    found.load_example(BALL, video)
    return found


def disc(x: float, y: float, radius: float, size: int = 32) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return np.hypot(rows - y, columns - x) <= radius


regions = arrays.arrays(bool, (12, 16)).filter(lambda region: bool(region.any()))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(0, 6), regions, min_size=1, max_size=4))
def test_drawings_are_kept_and_every_frame_has_a_mask(drawn: dict[int, np.ndarray]) -> None:
    mask = over_time(drawn, 7)
    assert mask.shape == (7, 12, 16)
    for frame, region in drawn.items():
        assert (mask[frame] == region).all()
    assert mask.any(axis=(1, 2)).all()
    first, last = min(drawn), max(drawn)
    assert (mask[:first] == drawn[first]).all()
    assert (mask[last:] == drawn[last]).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 14), st.integers(8, 22), st.integers(0, 12), st.floats(3, 6))
def test_a_shape_that_moves_is_moved_between_its_drawings(x: int, y: int, way: int, radius: float) -> None:
    mask = over_time({0: disc(x, y, radius), 4: disc(x + way, y, radius)}, 5)
    for frame in range(5):
        wanted = disc(x + way * frame / 4, y, radius)
        assert (mask[frame] != wanted).sum() <= 0.3 * wanted.sum() + 2
    assert (over_time({0: mask[0], 4: mask[0]}, 5) == mask[0]).all()


@settings(max_examples=20, deadline=None)
@given(
    arrays.arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(4, 9), st.integers(4, 9), st.just(3))),
    st.sampled_from([1.0, 8.0, 24000 / 1001, 25.0, 60.0]),
)
def test_lossless_films_are_read_back_bit_for_bit(tmp_path_factory: Any, frames: np.ndarray, fps: float) -> None:
    path = tmp_path_factory.mktemp("films") / "clip.mkv"
    write_lossless(path, frames, fps)
    clip = read_clip(path)
    assert torch.equal(clip.pixels, torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1)
    assert len(frames) == 1 or clip.fps == pytest.approx(fps, rel=1e-3)


def test_examples_are_read_as_their_files_are(session: Session, video: tiny.TinyVideo) -> None:
    for name in EXAMPLES:
        prompts = session.load_example(name, video)
        video.prompt(list(prompts))
        assert session.frames.shape == (8, 64, 64, 3)
        assert session.mask().any(axis=(1, 2)).all()
    assert "8 edited" in session.note


SETTINGS = Settings(PROMPT, "a cyan ball moving right", steps=2, sampler="euler")


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        (SETTINGS, "default"),
        (Settings(PROMPT, steps=2, seed=3, candidates=2, transition=(1.0, 0.5), cfg_scale=2.0), "half"),
    ],
)
def test_the_command_line_and_the_program_make_the_same_bits(
    session: Session,
    video: tiny.TinyVideo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: Settings,
    policy: str,
) -> None:
    if policy == "half":
        session.draw(2, [layer(disc(30, 30, 9, 64))])  # a mask that holds still: an image
    run(session, video, options, {policy: to_toml(load_preset(policy))}, lambda *_: None, Event())
    assert session.results is not None
    name, folder = session.results.mask.name, session.results.folder
    assert name == ("mask.mkv" if policy == "default" else "mask.png")
    wanted = (folder / f"{policy}.mp4").read_bytes()
    (tmp_path / "there").mkdir()
    for file in (session.clip_file(), folder / name, folder / f"{policy}.toml"):
        (tmp_path / "there" / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path / "there")
    if policy == "half":
        ended = CliRunner().invoke(app, shlex.split(command_line(options, policy, name, {}))[1:])
        assert ended.exit_code == 0, ended.output
    else:
        exec(compile(python_lines(options, policy, name, {}, 4), "program.py", "exec"), {})
    assert (tmp_path / "there" / f"{policy}.mp4").read_bytes() == wanted


def test_command_lines_quote_what_a_shell_would_read() -> None:
    hostile = Settings("--help '; rm -rf $HOME `x`", source_prompt='"\n')
    words = shlex.split(command_line(hostile, "default", "mask.png", {"model": "my models/wan", "offload": "model"}))
    assert f"--prompt={hostile.prompt}" in words
    assert words[words.index("--source-prompt") + 1] == '"\n'
    assert words[words.index("--model") + 1] == "my models/wan"
    compile(
        python_lines(hostile, "default", "mask.png", {"model": "my models/wan", "offload": "model"}, 1), "p", "exec"
    )


def layer(region: np.ndarray) -> np.ndarray:
    return region[..., None].repeat(4, -1).astype(np.uint8) * 160


def test_drawings_become_a_mask(session: Session, video: tiny.TinyVideo) -> None:
    given_mask = session.mask()
    session.draw(1, [layer(disc(100, 100, 40, 512))])  # of the enlarged frame
    assert sorted(session.drawn) == [1]
    assert (session.mask() == session.mask()[0]).all()
    touched = disc(100, 100, 40, 512).reshape(64, 8, 64, 8).any(axis=(1, 3))
    assert (session.mask()[0] == touched).all()
    session.draw(5, [layer(disc(20, 20, 5, 64)), layer(disc(30, 20, 5, 64))])
    assert not (session.mask()[1] == session.mask()[5]).all()
    view = tokens_view(session, video, 3, (1.0, 0.5))
    assert "drawn on frame 1, 5" in view
    assert ">0 in the transition band" not in view
    session.draw(5, [])
    session.draw(1, [np.zeros((64, 64, 4), np.uint8)])
    assert (session.mask() == given_mask).all()


def test_a_run_shows_what_it_measured_and_a_cancelled_one_changes_nothing(
    session: Session, video: tiny.TinyVideo
) -> None:
    shown = Settings(PROMPT, steps=2, transition=(1.0, 0.5))
    run(session, video, shown, {"static": to_toml(load_preset("static"))}, lambda *_: None, Event())
    table = numbers_view(session, video)
    for text in ("static", "in the transition band", "true result", "model passes"):
        assert text in table
    assert 'aria-label="Wipe of frame 2' in frame_view(session, video, "static", 2)

    def worn() -> list[type]:  # A hooked module has a subclass of its class.
        return [type(module) for module in video.network.modules()]

    during, cancel = list[int](), Event()

    def step(name: str, index: int) -> None:
        during.append(index)
        if index == 1:
            cancel.set()

    before, results, files = worn(), session.results, sorted(session.folder.rglob("*"))
    with pytest.raises(CancelledError):
        run(session, video, Settings(PROMPT, steps=20), {"full": to_toml(load_preset("full"))}, step, cancel)
    assert during == [-1, 0, 1]
    assert worn() == before
    assert not any(m._forward_hooks or "forward" in vars(m) for m in video.network.modules())
    assert session.results is results
    assert sorted(session.folder.rglob("*")) == files
    session.load_example(next(iter(EXAMPLES)), video)
    assert not results.folder.exists()  # it goes with the clip


@pytest.mark.parametrize(
    ("white", "message"),
    [(0, "the mask is 0 everywhere: nothing to edit"), (255, "the mask is 1 everywhere"), (60, "nothing is white")],
)
def test_a_wrong_mask_gets_the_message_of_the_library(
    session: Session, video: tiny.TinyVideo, tmp_path: Path, white: int, message: str
) -> None:
    path = tmp_path / "painted.png"
    Image.new("L", (64, 64), white).save(path)
    clip, given_mask = session.clip_file(), session.mask()
    with pytest.raises(KVLockError, match=message) as told:  # noqa: PT012 - either call may refuse it
        session.load_mask(path, video)
        run(session, video, SETTINGS, {"off": to_toml(load_preset("off"))}, lambda *_: None, Event())
    assert isinstance(told.value, MaskError) or white == 60
    assert session.clip_file() == clip
    assert (session.mask() == (given_mask if white == 60 else white == 255)).all()


def test_an_uploaded_clip_and_mask_are_read_as_the_command_reads_them(
    session: Session, video: tiny.TinyVideo, tmp_path: Path
) -> None:
    from kvlock_sampling.app import read_pair

    page = np.zeros((80, 100), np.uint8)
    page[30:50, 40:70] = 255
    Image.fromarray(page).save(tmp_path / "m.png")
    (tmp_path / "c.mp4").write_bytes(film(frames=12, size=100))
    Image.fromarray(np.stack([page] * 3, -1)[:, :, ::-1]).save(tmp_path / "c.png")
    for name in ("c.mp4", "c.png"):
        (tmp_path / "upload").mkdir(exist_ok=True)
        for file in (name, "m.png"):
            (tmp_path / "upload" / file).write_bytes((tmp_path / file).read_bytes())
        clip, mask = read_pair(video, tmp_path / name, tmp_path / "m.png")
        session.load_clip(tmp_path / "upload" / name, video)
        session.load_mask(tmp_path / "upload" / "m.png", video)
        again, region = read_pair(video, session.clip_file(), session.write_mask(tmp_path))
        assert torch.equal(again.pixels, clip.pixels)
        assert torch.equal(region, mask)
        assert again.fps == pytest.approx(clip.fps, rel=1e-3)
        assert len(list((tmp_path / "upload").iterdir())) == 2  # copied: another tab may have been given the same files
        for file in (name, "m.png"):
            (tmp_path / "upload" / file).unlink()


@pytest.mark.parametrize("name", ["white.png", "clip.mkv", "mask.png"])
def test_the_name_of_an_upload_does_not_matter(
    session: Session, video: tiny.TinyVideo, tmp_path: Path, name: str
) -> None:
    page = np.zeros((80, 160, 3), np.uint8)
    page[30:50, 40:70] = 200
    if name.endswith("png"):
        Image.fromarray(page).save(tmp_path / name)
    else:
        write_lossless(tmp_path / name, page[None].repeat(8, 0), 8.0)
    session.load_clip(tmp_path / name, video)
    session.load_mask(tmp_path / name, video)
    assert session.frames.mean() < 100
    assert session.mask().any()
    assert session.original is not None
    assert session.original.read_bytes() == (tmp_path / name).read_bytes()


def test_a_pipeline_edits_an_upload(tmp_path: Path) -> None:
    model = kv.from_pipeline(tiny_pipeline())
    page = np.zeros((96, 96), np.uint8)
    page[20:60, 20:60] = 255
    for folder in ("session", "upload"):
        (tmp_path / folder).mkdir()
    Image.fromarray(page).save(tmp_path / "upload" / "m.png")
    (tmp_path / "upload" / "c.webm").write_bytes(film("webm", "libvpx-vp9", frames=9, size=96))
    session = Session(tmp_path / "session")
    session.load_clip(tmp_path / "upload" / "c.webm", model)
    session.load_mask(tmp_path / "upload" / "m.png", model)
    assert "locked of the clip's 108 tokens" in tokens_view(session, model, 8, None)
    run(
        session,
        model,
        Settings("a dog", steps=1, sampler="euler"),
        {"half": to_toml(load_preset("half"))},
        lambda *_: None,
        Event(),
    )
    assert "half" in numbers_view(session, model)
    assert "let go" in frame_view(session, model, "half", 8)


def test_sessions_are_apart_and_leave_nothing(tmp_path: Path, video: tiny.TinyVideo) -> None:
    sessions = Sessions(tmp_path)
    one, other = sessions.of("a"), sessions.of("b")
    assert sessions.of("a") is one
    one.load_example(BALL, video)
    with pytest.raises(SourceError, match="there is no clip yet"):
        other.clip_file()
    with other.running():
        for key in range(40):
            sessions.of(str(key))
    assert len(list(tmp_path.iterdir())) == 33  # the least used made way, but for the one that runs
    assert sessions.of("b") is other
    sessions.close_all()
    assert list(tmp_path.iterdir()) == []
    assert one.cancel.is_set()


@pytest.fixture(scope="module")
def address(video: tiny.TinyVideo) -> Iterator[str]:
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'kvlock-sampling[web]'")
    with served(lambda: video, free_port(), {}) as (found, _):
        folder = Path(os.environ["GRADIO_TEMP_DIR"]).parent
        yield found
    assert not folder.exists()


@pytest.fixture(scope="module")
def tab(address: str) -> Tab:
    return Tab(address, "first")


@pytest.mark.parametrize("what", hostile(Path("/nowhere")))
def test_an_upload_that_is_no_clip_is_one_message_and_the_server_lives_on(tab: Tab, what: str, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (9, 200, 9)).save(tmp_path / "secret.png")
    name, content, wanted = hostile(tmp_path)[what]
    with pytest.raises(RuntimeError) as told:
        tab.call("upload", tab.upload(name, content), 0)
    text = str(told.value).replace("&#x27;", "'")
    assert wanted in text
    assert "kvlock-web-" not in text  # no folder of the server
    assert "<img" not in text
    with contextlib.suppress(StopIteration):
        assert not next(Path(os.environ["GRADIO_TEMP_DIR"]).parent.parent.glob("etc/passwd*"))


def test_the_server_reads_uploads_alone(tab: Tab) -> None:
    for path in ("/etc/passwd", str(Path(__file__)), "../../etc/passwd", f"{os.environ['GRADIO_TEMP_DIR']}/../.."):
        assert tab.http.get(f"/gradio_api/file={path}").status_code in (403, 404)
        data = {"path": path, "meta": {"_type": "gradio.FileData"}}
        with pytest.raises((RuntimeError, AssertionError)):
            tab.call("upload", data, 0)
    assert tab.http.get("/").status_code == 200
    assert tab.http.get("/config", headers={"host": "evil.example"}).status_code == 400  # a name of another site


def test_a_canvas_without_its_frame_gets_it_back(tab: Tab) -> None:
    tab.call("pick", next(iter(EXAMPLES)), 0)
    picture = io.BytesIO()
    Image.new("RGBA", (64, 64), (9, 99, 9, 255)).save(picture, format="png")
    for background in (None, tab.upload("b.png", picture.getvalue())):
        grid, editor = tab.call("draw", {"background": background, "layers": [], "composite": None}, 0, 0)
        assert "tokens" in grid
        assert (background is None) == bool(editor.get("background"))


def test_a_port_in_use_is_told_before_the_model_loads() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        result = CliRunner().invoke(app, ["web", "--model", "no such folder", "--port", str(port)])
    assert result.exit_code == 2
    assert f"kvlock web --port {port + 1}" in " ".join(result.output.split())


def test_a_page_edits_over_http_and_tabs_do_not_mix(tab: Tab, address: str) -> None:
    first, second = tab, Tab(address, "second")
    notes = [each.call("pick", name, 0) for each, name in zip((first, second), list(EXAMPLES)[2:4], strict=True)]
    assert [note[-2] for note in notes] == ["a blue ball moving right, glowing", "an empty stage with a post"]
    toml = to_toml(load_preset("half"))
    canvas = {"background": None, "layers": [], "composite": None}
    rest = ["half", toml, [], notes[0][-2], notes[0][-1], "euler", 2, 3.0, 1.0, 0, 1]
    done = first.call("edit", canvas, 0, 0, *rest)
    assert "Done in" in done[0]
    shutil.rmtree(os.environ["GRADIO_TEMP_DIR"])  # gradio deletes what lies there, an hour after it was made
    assert "Done in" in first.call("edit", canvas, 0, 0, *rest)[0]
    assert "half" in first.call("look", "half", 3)[0]
    with pytest.raises(RuntimeError, match="there is no clip yet"):
        Tab(address, "third").call("move", 3, None, 0, 0)
    with pytest.raises(RuntimeError, match="unknown suffix"):
        first.call("upload", first.upload("clips.zip", b"PK"), 0)
    assert "half" in first.call("look", "half", 5)[0]  # the clip and its results stay
    with pytest.raises(RuntimeError, match="not in the list of choices"):
        second.call("look", "half", 3)
    with pytest.raises(RuntimeError, match=r"policy\.lok is not a setting of Constant; did you mean"):
        first.call("edit", canvas, 0, 0, "half", toml.replace("lock", "lok"), *rest[2:])
    assert "policy.lok is not a setting" in first.call("failed")[0]
    assert "&amp;" not in first.call("failed")[0]
    assert "policy.lok" not in first.call("begin")[0] + first.call("failed")[0]
    with pytest.raises(RuntimeError, match=r"default\.toml|not valid TOML"):
        first.call("edit", canvas, 0, 0, "half", "/etc/passwd.toml", *rest[2:])  # text, and no path
    with pytest.raises(RuntimeError, match=r"cannot read .*kite"):
        first.call("edit", canvas, 0, 0, "half", toml, [], "a red ball, a kite", *rest[4:])
