"""The KV cache on disk: the same numbers as in memory, and no file that is not whole, sound and its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from banks import LEVEL_BYTES, SITE_BYTES, SITES, contents, equal, key, run, store
from safetensors.torch import load_file

from kvlock_sampling.kv_cache import KVCache, KVCacheError, KVCacheWarning, own
from kvlock_sampling.kv_cache.format import pack

SIGMAS = [8.0, 6.5, 4.0, 3.5, 2.0, 1.0, 0.3]


def filled(directory, sigmas=SIGMAS, clip="clip", **settings):
    """Run once over `sigmas`. Returns the folder of the key."""
    with KVCache(directory, **settings).opened(key(clip)) as shelf:
        run(shelf, sigmas)
        return shelf.directory


def level_files(path):
    return sorted(path.glob("sigma-*.safetensors"))


@pytest.fixture(autouse=True)
def no_unexpected_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", KVCacheWarning)
        yield


# -- the same as memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [None, "float32", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("budget", [None, 2 * LEVEL_BYTES, LEVEL_BYTES // 3, 0])
@pytest.mark.parametrize("interpolate", [False, True])
def test_disk_equals_memory_bit_for_bit(tmp_path, format, budget, interpolate):
    settings = {"format": format, "interpolate": interpolate}
    memory, disk = KVCache(budget=None, **settings), KVCache(tmp_path, budget=budget, **settings)
    for again in range(3):
        if again == 2:
            disk = KVCache(tmp_path, budget=budget, **settings)  # another process, as it were
        with memory.opened(key()) as a, disk.opened(key()) as b:
            for sigma in [*SIGMAS, 1.5, 5.0] if again else SIGMAS:
                one, other = a.lookup(sigma), b.lookup(sigma)
                assert (one is None) == (other is None)
                if one is None:
                    one, other = a.put(sigma, store(sigma)), b.put(sigma, store(sigma))
                assert one.sigmas == other.sigmas
                assert equal(contents(one), contents(other))
            assert a.stats == b.stats
        assert budget is None or disk.peak <= budget


def test_a_second_edit_with_a_filled_bank_needs_no_source_pass(tmp_path):
    filled(tmp_path)
    kv_cache = KVCache(tmp_path, budget=0)
    with kv_cache.opened(key()) as shelf:
        assert run(shelf, SIGMAS) == []
        assert run(shelf, [7.0, 4.1, 2.2]) == []  # another schedule, nearby
        assert shelf.stats.stored == 0
    assert kv_cache.peak == 0


def test_many_clips_models_and_formats_share_one_directory(tmp_path):
    folders = {filled(tmp_path, [4.0], clip, format=f) for clip in ("a", "b") for f in ("int8", "bf16")}
    assert len(folders) == 4
    assert {p.parent for p in folders} == {tmp_path}
    for path in folders:
        about = json.loads((path / "manifest.json").read_text())
        assert about["fingerprint"].startswith(path.name)
        assert about["key"]["clip"] in ("a", "b")
        assert len(level_files(path)) == 1


def test_files_are_plain_safetensors(tmp_path):
    (path,) = level_files(filled(tmp_path, [4.0]))
    tensors = load_file(path)
    for layer, pair in store(4.0).items():
        for side, x in zip(("key", "value"), pair, strict=True):
            for part, expected in pack(x, "int8").parts.items():
                assert torch.equal(tensors[f"{layer}/{side}/{part}"], expected)


def test_odd_shapes_and_tensors_kept_verbatim_are_aligned(tmp_path):
    kv = {
        layer: (torch.randn(1, 3, 5, 7, generator=torch.Generator().manual_seed(0)), torch.ones(1, 3, 5, 7))
        for layer in SITES
    }
    kv[SITES[1]][0][0, 0, 0, 0] = float("inf")  # 8 bits have no room for it
    kv[SITES[2]] = tuple(x.half() for x in kv[SITES[2]])
    for format in ("int8", "fp8", "bf16", None):
        with KVCache(tmp_path, format=format).opened(key()) as shelf:
            put = contents(shelf.put(2.0, kv))
        with KVCache(tmp_path, format=format).opened(key()) as shelf:
            assert equal(contents(shelf.lookup(2.0)), put)
            assert shelf.lookup(2.0).get(SITES[1])[0][0, 0, 0, 0].isinf()


def test_a_level_larger_than_the_budget_is_held_in_part(tmp_path):
    kv_cache = KVCache(tmp_path, budget=2 * SITE_BYTES + 1, format=None)
    with kv_cache.opened(key()) as shelf:
        level = shelf.put(4.0, store(4.0))
        assert kv_cache.used == kv_cache.peak == 2 * SITE_BYTES
        assert equal(contents(level), [x for pair in store(4.0).values() for x in pair])


def test_levels_on_disk_are_held_where_that_is_nearer_to_the_device(tmp_path, monkeypatch):
    from kvlock_sampling.kv_cache import shelf as module

    filled(tmp_path, format=None)
    monkeypatch.setattr(module, "is_copied", lambda tier, device: True)  # as beside an accelerator
    kv_cache = KVCache(tmp_path, budget=LEVEL_BYTES + SITE_BYTES, format=None)
    with kv_cache.opened(key()) as shelf:
        for sigma in SIGMAS:
            level = shelf.lookup(sigma)
            (stored,) = level.sigmas
            assert kv_cache.used >= LEVEL_BYTES
            assert equal(contents(level), [x for pair in store(stored).values() for x in pair])
    assert kv_cache.peak <= kv_cache.budget


# -- files that are not what they should be ---------------------------------------------------------------------------


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = b""
    elif how == "cut in the header":
        data = data[:50]
    elif how == "garbage":
        data = os.urandom(len(data))
    elif how == "bit in the last byte":
        data[-1] ^= 1
    elif how == "version":
        assert data.count(b'\\"version\\": 1') == 1
        data = data.replace(b'\\"version\\": 1', b'\\"version\\": 2')
    elif how == "dtype":
        assert data.count(b'\\"float32\\"') > 0
        data = data.replace(b'\\"float32\\"', b'\\"float16\\"', 1)
    elif how == "shape":
        data = data.replace(b"[2, 2, 6, 8]", b"[2, 2, 8, 6]").replace(b"[2,2,6,8]", b"[2,2,8,6]")
    elif how == "checksums":
        at = data.index(b'\\"crc\\": \\"') + 12
        data[at : at + 8] = b"xxxxxxxx"
    elif how == "one checksum less":
        at = data.index(b'\\"crc\\": \\"') + 11
        data[at : at + 8] = b""
        size = int.from_bytes(data[:8], "little")
        data[8 + size - 8 : 8 + size - 8] = b" " * 8
    # Another inode: a map of the old file, in this process, stays what it was.
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "empty",
        "cut in the header",
        "garbage",
        "bit in the last byte",
        "version",
        "dtype",
        "shape",
        "checksums",
        "one checksum less",
    ],
)
def test_a_damaged_level_is_ignored_with_a_warning_and_written_again(tmp_path, how):
    path = filled(tmp_path)
    whole = [p.read_bytes() for p in level_files(path)]
    stored = [float(p.stem.removeprefix("sigma-")) for p in level_files(path)]
    damage(level_files(path)[stored.index(2.0)], how)
    with (
        pytest.warns(KVCacheWarning, match=r"sigma-2\.0.*is ignored.*runs again"),
        KVCache(tmp_path).opened(key()) as shelf,
    ):
        assert run(shelf, SIGMAS) == [2.0]
    assert [p.read_bytes() for p in level_files(path)] == whole
    with KVCache(tmp_path).opened(key()) as shelf:
        assert run(shelf, SIGMAS) == []


def test_a_flipped_bit_anywhere_in_the_data_is_found(tmp_path):
    (path,) = level_files(filled(tmp_path, [2.0]))
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for at in range(start, len(data), 97):
        flipped = bytearray(data)
        flipped[at] ^= 0x10
        path.unlink()
        path.write_bytes(flipped)
        with (
            pytest.warns(KVCacheWarning, match="not those that were written"),
            KVCache(tmp_path).opened(key()) as shelf,
        ):
            assert shelf.lookup(2.0) is None


def test_a_level_of_another_clip_or_under_another_name_is_ignored(tmp_path):
    mine, theirs = filled(tmp_path, [2.0]), filled(tmp_path, [2.0], "theirs")
    (file,) = level_files(theirs)
    (mine / file.name).unlink()
    (mine / file.name).write_bytes(file.read_bytes())
    with pytest.warns(KVCacheWarning, match="another model, clip or setting"), KVCache(tmp_path).opened(key()) as shelf:
        assert shelf.lookup(2.0) is None
    file.rename(theirs / file.name.replace("2.0", "3.0"))
    with (
        pytest.warns(KVCacheWarning, match="does not fit its name or its layers"),
        KVCache(tmp_path).opened(key("theirs")) as shelf,
    ):
        assert shelf.lookup(3.0) is None


def test_a_renamed_folder_is_refused_and_a_damaged_manifest_is_written_again(tmp_path):
    mine, theirs = filled(tmp_path, [2.0]), filled(tmp_path, [2.0], "theirs")
    (mine / "manifest.json").write_text("{")
    with pytest.warns(KVCacheWarning, match="damaged"), KVCache(tmp_path).opened(key()) as shelf:
        assert shelf.lookup(2.0).sigma == 2.0
    assert json.loads((mine / "manifest.json").read_text())["fingerprint"].startswith(mine.name)
    (mine / "manifest.json").write_text((theirs / "manifest.json").read_text())
    with (
        pytest.raises(KVCacheError, match=r"another model, clip or setting[^$]*delete it"),
        KVCache(tmp_path).opened(key()),
    ):
        pass


def test_strange_files_are_left_alone(tmp_path):
    path = filled(tmp_path, [2.0])
    (path / "notes.txt").write_text("mine")
    (tmp_path / "holiday.mp4").write_bytes(b"mine")
    (path / "sigma-.safetensors").write_bytes(b"?")
    with pytest.warns(KVCacheWarning, match="cannot be read"), KVCache(tmp_path).opened(key()) as shelf:
        assert run(shelf, [2.0]) == []
    assert (path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["file", "under a file", "proc"])
def test_a_directory_that_cannot_be_written_to_is_found_at_once(tmp_path, place):
    (tmp_path / "file").write_text("")
    where = {"file": tmp_path / "file", "under a file": tmp_path / "file" / "kv_cache", "proc": "/proc/bank"}[place]
    with pytest.raises(KVCacheError, match=r"cannot be written to: .*[^$]*KVCache\(directory='kv-bank'\)"):
        KVCache(where)


def test_a_full_disk_leaves_the_level_in_memory_or_says_that_there_is_no_room(tmp_path, monkeypatch):
    def full(out, part):
        full.left -= 1
        if full.left < 0:
            raise OSError(28, "No space left on device")
        return real(out, part)

    from kvlock_sampling.kv_cache import file as module

    real = module._write
    monkeypatch.setattr(module, "_write", full)
    for allowed in (0, 5):
        full.left = allowed
        kv_cache = KVCache(tmp_path / "a", budget=LEVEL_BYTES, format=None)
        with kv_cache.opened(key(str(allowed))) as shelf:
            with pytest.warns(KVCacheWarning, match="No space left on device.*in memory alone"):
                level = shelf.put(2.0, store(2.0))
            assert equal(contents(level), [x for pair in store(2.0).values() for x in pair])
            assert kv_cache.used == kv_cache.peak == LEVEL_BYTES
            assert os.listdir(shelf.directory) == ["manifest.json"]
        full.left = allowed
        kv_cache = KVCache(tmp_path / "b", budget=LEVEL_BYTES - 1, format=None)
        with kv_cache.opened(key(str(allowed))) as shelf:
            with pytest.raises(KVCacheError, match=r"No space left on device[^$]*Free some disk space"):
                shelf.put(2.0, store(2.0))
            assert kv_cache.used == 0
            assert shelf.lookup(2.0) is None


# -- processes that die or share --------------------------------------------------------------------------------------

WRITER = """
import sys, time
sys.path.insert(0, "tests")
from KV caches import *
from kvlock_sampling.kv_cache import KVCache, file
from kvlock_sampling.kv_cache.clock import same
real = file._write
def slow(out, part):
    result = real(out, part)
    if {slow}:
        out.flush(); print("writing", flush=True); time.sleep(60)
    return result
with KVCache(sys.argv[1], format=None).opened(key()) as shelf:
    run(shelf, [8.0, 4.0])
    print("ready", flush=True)
    file._write = slow
    sys.stdin.readline()
    run(shelf, [2.0, 1.0])
"""


def writer(directory, slow):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER.format(slow=slow), str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_run_killed_while_it_writes_leaves_whole_levels_and_a_temporary(tmp_path, monkeypatch):
    process = writer(tmp_path, slow=True)
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()
    assert process.stdout.readline() == "writing\n"  # in the midst of the level at 2.0
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (path,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    (temporary,) = path.glob(".*.tmp.*")
    assert temporary.stat().st_size > 0
    assert len(level_files(path)) == 2
    with KVCache(tmp_path, format=None).opened(key()) as shelf:
        assert run(shelf, [8.0, 4.0]) == []
        assert equal(contents(shelf.lookup(4.0)), [x for pair in store(4.0).values() for x in pair])
        assert run(shelf, [2.0, 1.0]) == [2.0, 1.0]
    # The shelf was opened after the kill: nobody holds the lock of the temporary, so it is gone. Where there are no
    # locks it might still be being written, for an hour.
    if sys.platform == "win32":
        assert temporary.exists()
        os.utime(temporary, (time.time() - own.STALE - 1,) * 2)
    with KVCache(tmp_path, format=None).opened(key()) as shelf:
        assert run(shelf, [8.0, 4.0, 2.0, 1.0]) == []
    assert not temporary.exists()


def test_processes_that_share_a_folder_do_no_harm(tmp_path):
    processes = [writer(tmp_path, slow=False) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    with KVCache(tmp_path, format=None).opened(key()) as shelf:
        assert shelf.sigmas == (8.0, 4.0, 2.0, 1.0)
        for sigma in shelf.sigmas:
            assert equal(contents(shelf.lookup(sigma)), [x for pair in store(sigma).values() for x in pair])
        assert not list(shelf.directory.glob(".*"))


def test_levels_of_another_shape_do_not_join_those_on_disk(tmp_path):
    filled(tmp_path, [4.0])
    with KVCache(tmp_path).opened(key()) as shelf, pytest.raises(KVCacheError, match="other levels of this key"):
        shelf.put(1.0, store(1.0, shape=(1, 2, 6, 8)))


def test_files_taken_away_while_a_shelf_is_open_stay_readable(tmp_path):
    path = filled(tmp_path, format=None)
    with KVCache(tmp_path, format=None).opened(key()) as shelf:
        for file in level_files(path):
            file.unlink()
        assert equal(contents(shelf.lookup(4.0)), [x for pair in store(4.0).values() for x in pair])
