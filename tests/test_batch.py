"""`kvlock batch`: every job once, whatever kills it; what one worker makes, others make bit for bit."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from kvlock_sampling.app import batch, jobs
from kvlock_sampling.app.cli import app
from kvlock_sampling.app.edit import edit_video
from kvlock_sampling.integrations.ray import _run
from kvlock_sampling.tiny.model import WEIGHTS
from kvlock_sampling.types import KVLockError

PROMPT = "a red ball moving left"
HEADER = (
    "clip",
    "mask",
    "prompt",
    "source_prompt",
    "policy",
    "seed",
    "sampler",
    "steps",
    "cfg_scale",
    "strength",
    "name",
)
Kvlock = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two clips and a mask in `data/`, where tables are written."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    y, x = np.mgrid[:48, :64]
    for index in range(2):
        frames = [np.stack([x * 3, y * 4, (x + 5 * t + 9 * index) % 64 * 3], -1).astype(np.uint8) for t in range(8)]
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(f"data/clip{index}.gif", save_all=True, append_images=images[1:], duration=100, loop=0)
    mask = np.zeros((48, 64), np.uint8)
    mask[14:34, 22:42] = 255
    Image.fromarray(mask).save("data/mask.png")
    Image.fromarray(mask[:, 12:52]).save("data/narrow.png")
    return tmp_path


@pytest.fixture
def kvlock(folder: Path) -> Kvlock:
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def edits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts of the edits that were made, in their order."""
    made: list[str] = []

    def counted(*args: Any, **options: Any) -> Any:
        result = edit_video(*args, **options)
        made.append(args[2])
        return result

    monkeypatch.setattr(batch, "edit_video", counted)
    return made


def row(**change: object) -> dict[str, object]:
    return {"clip": "clip0.gif", "mask": "mask.png", "prompt": PROMPT, "policy": "half"} | change


def write(rows: Sequence[dict[str, object]], path: str = "data/jobs.csv") -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, HEADER, restval="")
        table.writeheader()
        table.writerows(rows)
    return path


def words(table: object = "data/jobs.csv", *more: object) -> list[object]:
    """The words of a quick batch."""
    return ["batch", table, "--out", "out", "--steps", 1, "--scale", 1, *more]


def outputs(where: str = "out") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(where).iterdir() if path.suffix in (".mp4", ".gif", ".png")}


def results(where: str = "out") -> list[dict[str, str]]:
    with open(f"{where}/results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def plain(text: str) -> str:
    return " ".join(text.split())


def test_a_batch_makes_what_single_edits_make(kvlock: Kvlock) -> None:
    full = row(name="b.gif", seed=7, sampler="euler", steps=2, cfg_scale=2.5, source_prompt="a dog, a red ball"[7:])
    ended = kvlock(*words(write([row(), full])))
    assert ended.exit_code == 0, ended.output
    assert set(outputs()) == {"001-clip0.mp4", "b.gif"}
    common = ["edit", "data/clip0.gif", "--mask", "data/mask.png", "--policy", "half", "--scale", 1, "--prompt", PROMPT]
    assert kvlock(*common, "-o", "one/001-clip0.mp4", "--steps", 1).exit_code == 0
    more = ["--seed", 7, "--sampler", "euler", "--steps", 2, "--cfg-scale", 2.5, "--source-prompt", "a red ball"]
    assert kvlock(*common, "-o", "one/b.gif", *more).exit_code == 0
    assert outputs("one") == outputs()
    record = json.loads(Path("out/b.gif.json").read_text())
    assert (record["nfe"], record["options"]["seed"], record["background_psnr"]) == (6, 7, 100.0)


def test_what_is_done_is_kept_and_what_changed_is_done_again(kvlock: Kvlock, edits: list[str]) -> None:
    rows = [row(prompt=f"a {colour} ball") for colour in ("red", "green", "blue")]
    assert kvlock(*words(write(rows))).exit_code == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path("out").glob("*.mp4*")}
    edits.clear()
    ended = kvlock(*words())
    assert (ended.exit_code, edits) == (0, [])
    assert "0 done, 3 kept, 0 failed" in plain(ended.output)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before

    rows[1]["seed"] = 5  # a changed row
    Path("out/003-clip0.mp4").write_bytes(b"damaged")  # a changed output
    assert kvlock(*words(write(rows))).exit_code == 0
    assert edits == ["a green ball", "a blue ball"]
    Path("out/001-clip0.mp4.json").unlink()  # killed after the output, before the record
    assert kvlock(*words()).exit_code == 0
    assert edits[2:] == ["a red ball"]
    Image.new("RGB", (64, 48), (9, 9, 200)).save("data/clip0.gif")  # a changed file
    assert kvlock(*words()).exit_code == 0
    assert len(edits) == 6
    assert kvlock(*words("data/jobs.csv", "--cfg-scale", 2)).exit_code == 0  # a changed option
    assert len(edits) == 9


def test_names_that_people_give_their_files(kvlock: Kvlock, edits: list[str]) -> None:
    Path("data/frames").mkdir()
    for index in range(2):
        Image.new("RGB", (64, 48), (90, 9, 90 * index)).save(f"data/frames/{index}.png")
    for name in ("~clip.gif", "10.00\u202fAM.gif"):  # a name that no home has; that of a recording
        Path("data", name).write_bytes(Path("data/clip0.gif").read_bytes())
    table = write([row(clip="~clip.gif"), row(clip="10.00\u202fAM.gif", name=""), row(clip="frames")])
    assert kvlock(*words(table)).exit_code == 0
    assert [line["output"] for line in results()] == ["001-~clip.mp4", "002-10.00_AM.mp4", "003-frames.mp4"]
    Path("data/frames/.DS_Store").write_bytes(b"of a file manager")
    assert "3 kept" in plain(kvlock(*words(table)).output)
    assert len(edits) == 3
    ended = kvlock(*words(write([row(clip=f"{os.sep}a\0b"), row()])))
    assert "1 done, 0 kept, 1 failed" in plain(ended.output), ended.output


def test_bad_rows_are_reported_and_the_others_go_on(kvlock: Kvlock, edits: list[str]) -> None:
    bad = {
        "no such file or folder": row(clip="nowhere.gif"),
        "no policy 'stedy' on the shelf; did you mean 'steady'": row(policy="stedy"),
        "seed=-1; expected a whole number in [0, 2**64)": row(seed=-1),
        "seed='1.5'; expected a whole number, e.g. 1.": row(seed="1.5"),
        "cannot read 'kite'": row(prompt="a red ball, a kite"),
        "prompt is empty; expected clip, mask, prompt": row(prompt=" "),
        "did you mean 'dpmpp_2m'": row(sampler="dpmpp_2n"),
        "steps=0; expected a whole number >= 1": row(steps=0),
        "strength=0.01; expected a finite number >= 0.05": row(strength=0.01),
        "steps=100000; expected a whole number >= 1": row(steps=100_000),
        "name='../a.mp4'; expected the name of a file, without folders": row(name="../a.mp4"),
        "'a.xyz' has the suffix '.xyz'; expected one of .mp4": row(name="a.xyz"),
        "cannot read the policy file": row(policy="nowhere.toml"),
    }
    ended = kvlock(*words(write([row(), *bad.values(), row(clip="clip1.gif")])))
    assert ended.exit_code == 1, ended.output
    assert len(edits) == 2
    said, table, page = plain(ended.output), results(), plain(Path("out/report.html").read_text())
    assert [line["status"] for line in table] == ["done", *["failed"] * len(bad), "done"]
    for text, line in zip(bad, table[1:-1], strict=True):
        assert text in plain(line["message"])
        assert text in said
        assert text.replace("'", "&#x27;").replace(">", "&gt;") in page
    assert f"2 done, 0 kept, {len(bad)} failed" in said
    assert not list(Path().glob("**/a.*"))


def test_a_file_that_no_batch_made_is_kept(kvlock: Kvlock, edits: list[str]) -> None:
    Path("out").mkdir()
    Path("out/own.mp4").write_bytes(b"a film of the user's")
    table = write([row(name="own.mp4"), row(name="[red]b.gif")])
    for _ in range(2):  # the report of the first run names the file too, but as a failure
        ended = kvlock(*words(table))
        assert ended.exit_code == 1
        assert "own.mp4' exists, and no record says that a batch made it. Move it" in plain(ended.output)
        assert "[red]b.gif" in ended.output
    assert len(edits) == 1
    assert Path("out/own.mp4").read_bytes() == b"a film of the user's"


def test_an_output_is_its_batchs_before_its_record_is_written(kvlock: Kvlock, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any, **options: Any) -> Any:
        if Path("out/001-clip0.mp4").exists():
            raise KeyboardInterrupt
        return write_atomically(*args, **options)

    write_atomically = batch.write_atomically
    monkeypatch.setattr(batch, "write_atomically", killed)
    assert kvlock(*words(write([row()]))).exit_code == 130
    monkeypatch.setattr(batch, "write_atomically", write_atomically)
    with monkeypatch.context() as patch:  # the next run ends before it comes to the row
        patch.setattr(batch, "open_model", killed)
        assert kvlock(*words()).exit_code == 130
    ended = kvlock(*words())
    assert "1 done, 0 kept, 0 failed" in plain(ended.output)
    assert not list(Path("out").glob(".*"))


def test_warnings_stand_beside_their_row(kvlock: Kvlock) -> None:
    ended = kvlock(*words(write([row(), row(mask="narrow.png")])))
    assert ended.exit_code == 0, ended.output
    assert "stretched" not in results()[0]["message"]
    assert "cut to the middle" in results()[0]["message"]  # the clip is 64 x 48, and the model's 64 x 64
    assert "it is stretched" in results()[1]["message"]
    assert "row 2: the mask" in plain(ended.output)


def test_what_is_left_out_stands_beside_its_row(kvlock: Kvlock) -> None:
    frames = [Image.fromarray(np.full((48, 64), 20 * index, np.uint8)) for index in range(9)]
    frames[0].save("data/long.gif", save_all=True, append_images=frames[1:], duration=100)
    for _ in ("done", "kept"):
        ended = kvlock(*words(write([row(), row(clip="long.gif")])))
        assert ended.exit_code == 0, ended.output
        assert "; 0 left out" in results()[0]["message"]
        assert "; 8 edited, picked evenly; 1 left out" in results()[1]["message"]
        assert "1 left out" in plain(ended.output)


def test_a_table_that_cannot_be_read_is_told_with_one_that_can(kvlock: Kvlock, tmp_path: Path) -> None:
    for table, why in (("nowhere.csv", "No such file"), (tmp_path, "Is a directory")):
        ended = kvlock("batch", table, "--out", tmp_path / "out")
        assert ended.exit_code == 2
        assert f"cannot read the table {str(table)!r}: {why}" in plain(ended.output)
        assert "clip,mask,prompt" in ended.output
    (tmp_path / "taken").write_text("mine")
    ended = kvlock("batch", write([row()]), "--out", tmp_path / "taken")
    assert ended.exit_code == 2
    assert "cannot be written" in plain(ended.output)


def test_a_table_with_spaces_after_its_commas_is_read(kvlock: Kvlock) -> None:
    Path("data/jobs.csv").write_text(
        f'clip, mask, prompt, policy, source_prompt\nclip0.gif, mask.png, "{PROMPT}", "half", "a ball"\n'
    )
    assert kvlock(*words()).exit_code == 1  # the embedded model cannot read "a ball" without a colour
    assert (results()[0]["prompt"], results()[0]["source_prompt"]) == (PROMPT, "a ball")


@pytest.mark.parametrize("name", ["results.csv", "report.html"])
def test_a_file_of_the_user_is_no_report_to_replace(kvlock: Kvlock, name: str) -> None:
    Path("out").mkdir()
    Path("out", name).write_text("mine")
    ended = kvlock(*words(write([row()])))
    assert ended.exit_code == 2
    assert "is no report of a batch and would be replaced" in plain(ended.output)
    assert Path("out", name).read_text() == "mine"
    assert [path.name for path in Path("out").iterdir()] == [name]


def test_reports_that_a_spreadsheet_saved_are_reports(kvlock: Kvlock) -> None:
    table = words(write([row()]))
    assert kvlock(*table).exit_code == 0
    saved = Path("out/results.csv").read_text(encoding="utf-8")
    heads, rest = saved.split("\n", 1)
    for text in ("\ufeff" + saved, saved.replace(",", ";"), '"' + heads.replace(",", '","') + '"\n' + rest, ""):
        Path("out/results.csv").write_text(text, encoding="utf-8")
        assert kvlock(*table).exit_code == 0
        assert results()[0]["status"] == "kept"


def test_the_report_shows_text_as_text(kvlock: Kvlock) -> None:
    hostile = '<script>alert("x")</script>'
    assert kvlock(*words(write([row(), row(prompt=hostile, name="<b>.gif")]))).exit_code == 1
    page = Path("out/report.html").read_text()
    assert "<script" not in page
    assert "<b>.gif" not in page
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in page
    assert len(re.findall(r'src="data:image/png;base64,[\w+/=]+"', page)) == 1


TABLES = {
    "not utf-8": (b"clip,mask,prompt\nclip0.gif,mask.png,a r\xe9d ball\n", "is not UTF-8"),
    "no column": (b"clip,prompt\nclip0.gif,a red ball\n", "has no column 'mask'"),
    "unknown column": (b"clip,mask,promt\na,b,c\n", "has the column 'promt'; did you mean 'prompt'? Known: clip"),
    "tabs": (b"clip\tmask\tprompt\na\tb\tc\n", "Commas separate them"),
    "twice a column": (b"clip,mask,prompt,clip\na,b,c,d\n", "has two columns 'clip'"),
    "open quote": (b'clip,mask,prompt\nclip0.gif,mask.png,"a red ball\n', "is not CSV"),
    "no rows": (b"clip,mask,prompt\n,,\n\n", "has no rows"),
    "empty": (b"", "has no column 'clip'"),
    "one output": (b"clip,mask,prompt,name\nclip0.gif,mask.png,a,k\nclip0.gif,mask.png,b,K.mp4\n", "rows 1 and 2 both"),
    "an output joins a folder that is read": (
        b"clip,mask,prompt,name\nclip0.gif,mask.png,a,x.png\n../out,m,b,\n",
        "row 2 reads",
    ),
    "an output is read": (b"clip,mask,prompt,name\nclip0.gif,mask.png,a,\n../out/001-clip0.mp4,m,b,\n", "row 2 reads"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_wrong_table_ends_before_anything_runs(kvlock: Kvlock, edits: list[str], name: str) -> None:
    content, message = TABLES[name]
    Path("data/jobs.csv").write_bytes(content)
    ended = kvlock(*words())
    assert ended.exit_code == 2, ended.output
    assert message in plain(ended.output)
    assert not edits
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--policy", "stedy"], "steady"),
        (["--sampler", "nope"], "nope"),
        (["--seed", -1], "seed=-1"),
        (["--model", "nowhere"], "no model at 'nowhere'"),
        (["--dtype", "float16"], "dtype='float16' is for a pipeline"),
        (["--size", "3"], "expected HEIGHTxWIDTH"),
        (["--kv-cache", ""], "directory='' names no folder"),
    ],
)
def test_an_option_that_no_row_can_use_is_an_error(kvlock: Kvlock, more: list[object], message: str) -> None:
    ended = kvlock(*words(write([row()]), *more))
    assert ended.exit_code == 2, ended.output
    assert message in plain(ended.output)
    assert not list(Path().glob("out/*"))


def test_the_results_never_replace_the_table(kvlock: Kvlock, edits: list[str]) -> None:
    table = write([row()], "data/results.csv")
    before = Path(table).read_bytes()
    ended = kvlock("batch", table, "--out", "data")
    assert (ended.exit_code, edits) == (2, [])
    assert "is an input or would be written twice" in plain(ended.output)
    assert Path(table).read_bytes() == before


def test_a_spreadsheets_table_is_read(folder: Path) -> None:
    text = '\ufeffClip, mask ,prompt,,\r\n\r\nclip0.gif,mask.png,"a ""red"" ball,\r\nmoving left",,\r\n,,,,\r\n'
    text += "clip0.gif,mask.png\r\nclip0.gif,mask.png,a red ball,moving left\r\n"
    Path("data/jobs.csv").write_bytes(text.encode())
    defaults = {"policy": "half", "sampler": "euler", "kv_cache": None}
    first, second, third = jobs.read_jobs(Path("data/jobs.csv"), Path("out"), defaults, {"model": "tiny"})
    assert (first.error, first.options["prompt"]) == ("", 'a "red" ball,\r\nmoving left')
    assert first.options["clip"] == str(folder / "data" / "clip0.gif")
    assert (second.row, second.error[:15]) == (2, "prompt is empty")
    assert third.error == "4 cells for 3 columns. Put a text with commas in quotes."


def test_a_table_with_semicolons_is_read(folder: Path) -> None:
    """As spreadsheets write it where the comma is in numbers."""
    text = '\ufeff\r\nclip;mask;prompt;seed;strength\r\nclip0.gif;mask.png;"a red ball, moving left";3;0,75\r\n'
    Path("data/jobs.csv").write_bytes(text.encode())
    defaults = {"policy": "half", "sampler": "euler", "kv_cache": None}
    (job,) = jobs.read_jobs(Path("data/jobs.csv"), Path("out"), defaults, {"model": "tiny"})
    assert (job.error, job.options["prompt"], job.options["seed"]) == ("", "a red ball, moving left", 3)
    assert job.options["strength"] == 0.75


def test_a_policy_file_is_found_beside_the_table_and_its_content_counts(kvlock: Kvlock, edits: list[str]) -> None:
    for lock in (0.25, 0.25, 0.75):
        Path("data/mine.toml").write_text(f'[policy]\ntype = "Constant"\nlock = {lock}\n')
        assert kvlock(*words(write([row(policy="mine.toml")]))).exit_code == 0
    assert len(edits) == 2


def test_without_ray_several_workers_are_one(kvlock: Kvlock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(batch, "find_spec", lambda name: None)
    ended = kvlock(*words(write([row()]), "--workers", 2))
    assert ended.exit_code == 0
    assert "2 workers need ray, which is not installed: jobs run one by one" in plain(ended.output)
    ended = kvlock(*words(write([row(seed=1)]), "--address", "auto"))
    assert ended.exit_code == 2
    assert "pip install 'kvlock-sampling[batch]'" in plain(ended.output)


@pytest.mark.parametrize(
    ("deaths", "rows", "ends"), [(range(1, 5), 8, False), (range(1, 13), 8, True), (range(2, 99), 2, False)]
)
def test_a_worker_that_dies_at_its_start_is_started_again(deaths: range, rows: int, ends: bool) -> None:
    """Four workers may each fail at first, as on a cluster that is still coming up; for ever they may not. One that
    the cluster has no room for is not waited for, and one that is not needed is not missed.
    """
    made: list[object] = []

    class Row(NamedTuple):
        row: int

    class LostError(Exception):
        pass

    class RefusedError(LostError):
        pass

    class Actor:
        def __init__(self, *arguments: object) -> None:
            made.append(self)
            self.lost = len(made) in deaths
            self.placed = len(deaths) != 4 or len(made) != 4  # others hold the place of the fourth on the cluster
            self.open = SimpleNamespace(remote=lambda: (self, None))
            self.edit = SimpleNamespace(remote=lambda job: (self, job))

    def get(returned: Any) -> Any:
        actor, job = returned
        if job is None and actor.lost:
            raise LostError("node lost")
        return None if job is None else {"row": job.row}

    ray = SimpleNamespace(
        cluster_resources=dict,
        wait=lambda waiting: (sorted((one for one in waiting if one[0].placed), key=lambda o: o[1] or Row(0))[:1], []),
        get=get,
        exceptions=SimpleNamespace(RayTaskError=RefusedError, RayError=LostError),
    )

    kind = SimpleNamespace(options=lambda **place: SimpleNamespace(remote=Actor))
    done = _run(ray, kind, (), [[Row(i)] for i in range(rows)], 4, False)
    if ends:
        with pytest.raises(KVLockError, match="12 workers died before they began: node lost"):
            list(done)
    else:
        assert sorted(record["row"] for _, record in done) == list(range(rows))


def test_a_kv_cache_serves_a_clip_and_changes_no_job(kvlock: Kvlock) -> None:
    rows = [row(policy=policy, seed=i, name=f"{i}.png") for i, policy in enumerate(("full", "half"))]
    passes, made = {}, {}
    for name, order in {"a": rows, "b": rows[::-1]}.items():
        command = ["batch", write(order), "--out", name, "--steps", 2, "--scale", 1, "--kv-cache", f"kept-{name}"]
        assert kvlock(*command).exit_code == 0
        passes[name] = [json.loads(Path(name, f"{i}.png.json").read_text())["nfe"] for i in range(2)]
        made[name] = outputs(name)
    assert made["a"] == made["b"]
    assert passes["a"][0] > passes["b"][0]  # whose K/V were there


def test_ctrl_c_stops_and_the_same_command_goes_on(kvlock: Kvlock, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def stopped(*args: Any, **options: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(args[2])
        return edit_video(*args, **options)

    monkeypatch.setattr(batch, "edit_video", stopped)
    ended = kvlock(*words(write([row(), row()])))
    assert ended.exit_code == 130
    assert "stopped: what is done is kept" in plain(ended.output)
    assert {path.name for path in Path("out").iterdir()} == {"001-clip0.mp4", "001-clip0.mp4.json"}
    monkeypatch.setattr(batch, "edit_video", edit_video)
    assert "1 done, 1 kept, 0 failed" in plain(kvlock(*words()).output)


def wait_for(count: int, alive: Callable[[], bool], where: str = "out") -> None:
    """Wait for so many records."""
    while alive() and len(list(Path(where).glob("*.json"))) < count:
        time.sleep(0.02)


def test_a_killed_batch_loses_and_repeats_nothing(folder: Path, kvlock: Kvlock, edits: list[str]) -> None:
    write([row(clip=f"clip{i % 2}.gif", seed=i) for i in range(6)])
    process = multiprocessing.get_context("fork").Process(target=kvlock, args=words())
    process.start()
    wait_for(2, process.is_alive)
    process.kill()
    process.join()
    leftover = Path("out/.001-clip0.0123abcd.tmp.mp4")  # what a kill within a write leaves
    leftover.touch()
    Path("out/001-clip0.mp4.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in Path("out").glob("*.mp4.json")}
    ended = kvlock(*words())
    assert ended.exit_code == 0, ended.output
    assert 1 <= len(kept) < 6
    assert len(edits) == 6 - len(kept)
    assert f"{6 - len(kept)} done, {len(kept)} kept, 0 failed" in plain(ended.output)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not leftover.exists()
    assert len(outputs()) == 6


def running(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None


@pytest.mark.slow
def test_workers_on_ray_make_what_one_process_makes(
    folder: Path, kvlock: Kvlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in this process
    table = write([row(clip=f"clip{i % 4 // 2}.gif", seed=i) for i in range(12)])
    command = [sys.executable, "-m", "kvlock_sampling.app", "batch", table, "--out", "ray", "--steps", "1"]
    command += ["--scale", "1", "--workers", "2"]
    process = subprocess.Popen(command, start_new_session=True)
    for count in (2, 5):
        wait_for(count, partial(running, process), "ray")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process = subprocess.Popen(command, start_new_session=True)
    assert process.wait(120) == 0
    assert kvlock(*words()).exit_code == 0
    assert len(outputs()) == 12
    assert outputs("ray") == outputs()


@pytest.mark.slow
def test_a_job_whose_worker_dies_is_tried_three_times(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from kvlock_sampling.integrations.ray import run_on_ray

    class Actor:
        """Stands for an `Editor`: it writes who edits what, and dies where a file says so."""

        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def open(self) -> None:
            if (self.folder / "broken").exists():
                raise KVLockError("no model")

        def edit(self, job: jobs.Job) -> dict[str, Any]:
            with open(self.folder / f"{job.row}.txt", "a") as file:
                file.write(f"{os.getpid()}\n")
            deadly = self.folder / f"{job.row}.deadly"
            if deadly.exists() and len((self.folder / f"{job.row}.txt").read_text().split()) <= int(deadly.read_text()):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.2)
            return {"row": job.row}

    todo = [jobs.Job(i, tmp_path, {}) for i in range(8)]
    groups = [todo[:3], todo[3:6], todo[6:]]
    (tmp_path / "1.deadly").write_text("2")
    (tmp_path / "4.deadly").write_text("9")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = {job.row: record for job, record in run_on_ray(Actor, (tmp_path,), groups, workers=2)}
    pids = [(tmp_path / f"{i}.txt").read_text().split() for i in range(8)]
    assert sorted(found) == list(range(8))
    assert [i for i, record in found.items() if "error" in record] == [4]
    assert found[4]["error"].startswith("its worker died 3 times")
    assert [len(each) for each in pids] == [1, 3, 1, 1, 3, 1, 1, 1]
    assert pids[1][2] == pids[2][0]
    assert pids[6] == pids[7]  # one actor a group
    assert sum("another one tries again" in str(warning.message) for warning in told) == 4

    (tmp_path / "broken").touch()
    with pytest.raises(KVLockError, match="no model"):
        list(run_on_ray(Actor, (tmp_path,), groups, workers=2))


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "127.0.0.1:99999", "nowhere"])
def test_a_cluster_that_does_not_answer_is_named_at_once(address: str) -> None:
    pytest.importorskip("ray")
    from kvlock_sampling.integrations.ray import run_on_ray

    with pytest.raises(KVLockError, match=rf"no Ray cluster at {address}: .+\n.*ray start --head"):
        list(run_on_ray(object, (), [[1]], address=address))


def test_the_embedded_model_counts_by_its_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is named so in the folder; another version of the package has other weights."""
    table = Path(write([row()]))
    defaults = {"policy": "half", "sampler": "euler", "kv_cache": None}

    def content() -> str:
        (job,) = jobs.read_jobs(table, Path("out"), defaults, {"model": "tiny"})
        return job.fingerprint

    first = content()
    Path("tiny").mkdir()
    Path("tiny/file").touch()
    assert content() == first
    monkeypatch.setattr(jobs, "WEIGHTS", Path("tiny/file"))
    assert content() != first


def test_a_model_in_the_home_folder_counts_by_its_files(kvlock: Kvlock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the ~ of --model=~/wan."""
    monkeypatch.setenv("HOME", str(Path.cwd()))
    model = shutil.copytree(WEIGHTS.parent, "mine", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for status in ("done", "kept"):
        ended = kvlock(*words(write([row()])), "--model=~/mine")
        assert ended.exit_code == 0, ended.output
        assert results()[0]["status"] == status
    (weights,) = Path(model).glob("*.safetensors")
    os.utime(weights, (1, 1))
    kvlock(*words(write([row()])), "--model=~/mine")
    assert results()[0]["status"] == "done"


def test_a_models_linked_folders_count_and_hidden_files_do_not(tmp_path: Path) -> None:
    """Models share a text encoder by a link; a download writes its own notes anew when nothing of the model changed."""
    model, part = tmp_path / "model", tmp_path / "part"
    (model / ".cache").mkdir(parents=True)
    part.mkdir()
    (part / "weights").write_text("1")
    (model / "transformer").symlink_to(part)
    (model / "around").symlink_to(tmp_path)
    (part / "other").symlink_to(model)
    first = jobs._weights(model)
    assert [name for name, _, _ in first] == ["transformer/weights"]  # once, also where links go round
    (model / ".cache/note").touch()
    (model / ".DS_Store").touch()
    assert jobs._weights(model) == first
    os.utime(part / "weights", (1, 1))
    assert jobs._weights(model) != first


def test_a_policy_whose_file_changes_before_its_turn_is_that_of_the_fingerprint(folder: Path) -> None:
    Path("data/mine.toml").write_text('[policy]\ntype = "Constant"\nlock = 0.0\n')
    table = Path(write([row(policy="mine.toml")]))
    defaults = {"steps": 1, "scale": 1, "sampler": "euler"} | dict.fromkeys(("kv_cache", "frames", "size"))
    (job,) = jobs.read_jobs(table, Path("out").absolute(), defaults, {"model": "tiny"})
    Path("data/mine.toml").unlink()
    (record,) = batch.run_batch([job], {"model": "tiny"})
    assert record["status"] == "done", record
    assert record["options"]["policy"].endswith("mine.toml")


def test_reasons_are_printed_before_the_report_is_written(kvlock: Kvlock, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvlock_sampling.app.report.write_report", full)
    ended = kvlock(*words(write([row(clip="nowhere.gif")])))
    assert ended.exit_code == 2
    assert "No space left" in ended.output
    assert "row 1:" in ended.output
    assert "nowhere.gif" in ended.output
