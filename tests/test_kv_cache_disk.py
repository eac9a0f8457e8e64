"""The KV cache on disk: the same numbers as in memory, and no file that is not whole, sound and of its own entry."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import tempfile
import threading
import time
import traceback
import warnings
from contextlib import contextmanager

import pytest
import torch
from kv_entries import LAYERS, LEVEL_BYTES, entry, equal, run, served, source_pass
from safetensors.torch import load_file, save_file

from kvlock_sampling.kv_cache import CacheEntry, KVCache, KVCacheError, KVCacheWarning
from kvlock_sampling.kv_cache import disk as module
from kvlock_sampling.kv_cache.quantize import pack

SIGMAS = [8.0, 6.5, 4.0, 3.5, 2.0, 1.0, 0.3]


def filled(directory, sigmas=SIGMAS, clip="clip", **settings):
    """Run once over `sigmas`. Returns the level files, from low to high sigma, and their noise levels."""
    one = entry(KVCache(directory, **settings), clip)
    run(one, sigmas)
    stored = sorted(one.sigmas)
    return [directory / one.name[:32] / f"sigma-{sigma:.16e}.safetensors" for sigma in stored], stored


@pytest.fixture(autouse=True)
def no_unexpected_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", KVCacheWarning)
        yield


# -- the same as memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [None, "int8"])
@pytest.mark.parametrize("budget", [None, 2 * LEVEL_BYTES, LEVEL_BYTES // 5, 0])
def test_disk_equals_memory_bit_for_bit(tmp_path, format, budget):
    settings = {"format": format}
    memory, disk = KVCache(budget=None, **settings), KVCache(tmp_path, budget=budget, **settings)
    for again in range(3):
        if again == 2:
            disk = KVCache(tmp_path, budget=budget, **settings)  # as another process would
        a, b = entry(memory), entry(disk)
        for sigma in [*SIGMAS, 1.5, 5.0] if again else SIGMAS:
            one, other = a.lookup(sigma), b.lookup(sigma)
            assert (one is None) == (other is None)
            if one is None:
                one, other = a.put(sigma, source_pass(sigma)), b.put(sigma, source_pass(sigma))
            assert served(a, sigma) == served(b, sigma)
            assert equal(one, other)


def test_a_second_run_with_a_filled_directory_needs_no_source_pass(tmp_path):
    filled(tmp_path)
    kv_cache = KVCache(tmp_path, budget=0)
    assert run(entry(kv_cache), [*SIGMAS, 7.0, 4.1, 2.2]) == []  # other noise levels nearby too
    assert kv_cache.used == 0


def test_clips_and_formats_share_one_directory(tmp_path):
    files = [filled(tmp_path, [4.0], clip, format=f)[0] for clip in ("a", "b") for f in ("int8", None)]
    assert len({file.parent for (file,) in files}) == 4
    assert sorted(tmp_path.glob("*/*")) == sorted(file for (file,) in files)


def test_files_are_plain_safetensors_with_usual_permissions(tmp_path):
    ((path,), _) = filled(tmp_path, [4.0])
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
    tensors = load_file(path)
    for layer, pair in source_pass(4.0).items():
        for side, x in zip(("key", "value"), pair, strict=True):
            for part, expected in pack(x, "int8")[1].items():
                assert torch.equal(tensors[f"{layer}/{side}/{part}"], expected)


def test_odd_shapes_dtypes_and_tensors_stored_unchanged(tmp_path):
    g = torch.Generator().manual_seed(0)
    keys = {layer: (torch.randn(1, 3, 5, 7, generator=g), torch.ones(1, 3, 5, 7)) for layer in LAYERS}
    keys[LAYERS[1]][0][0, 0, 0, 0] = 2.0**120  # does not fit into 8 bits
    keys[LAYERS[2]] = tuple(x.half() for x in keys[LAYERS[2]])
    for format in ("int8", None):
        put = entry(KVCache(tmp_path, format=format)).put(2.0, keys)
        level = entry(KVCache(tmp_path, format=format)).lookup(2.0)
        assert equal(level, put)
        assert [x.dtype for x in level[LAYERS[2]]] == [torch.float16] * 2
        assert level[LAYERS[1]][0][0, 0, 0, 0] == 2.0**120


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("format", [None, "int8"])
def test_levels_are_kept_on_the_host_and_served_on_the_device(tmp_path, format):
    for kv_cache in (KVCache(format=format), KVCache(tmp_path, format=format, budget=0)):
        on_host = entry(kv_cache)
        on_device = CacheEntry(kv_cache, on_host.name, LAYERS, "cuda")
        keys = {layer: (key.cuda(), value.cuda()) for layer, (key, value) in source_pass(4.0).items()}
        put = on_device.put(4.0, keys)
        assert equal(put, on_device.lookup(4.0))
        on_device.settle()
        later = CacheEntry(kv_cache, on_host.name, LAYERS, "cuda").lookup(4.0)
        assert equal(put, later)
        assert all(x.is_cuda for pair in later.values() for x in pair)
        host = entry(kv_cache).lookup(4.0)
        for pair, on_cpu in zip(later.values(), host.values(), strict=True):
            for x, y in zip(pair, on_cpu, strict=True):
                torch.testing.assert_close(x.cpu(), y)


# -- beside the run ---------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that writes only while this event is set. Notes how many levels wait for it at a time."""
    free, waiting, write = threading.Event(), [], module.write

    def held(*args):
        waiting.append(args[2])
        assert free.wait(30)
        write(*args)

    monkeypatch.setattr(module, "write", held)
    free.waiting = waiting
    yield free
    free.set()


def test_a_level_serves_while_it_is_written(tmp_path, slow_disk):
    one = entry(KVCache(tmp_path, budget=0), kind=CacheEntry)
    put = one.put(2.0, source_pass(2.0))
    assert not list(tmp_path.glob("*/sigma*"))
    assert 2.0 in one.sigmas
    assert equal(one.lookup(2.0), put)
    slow_disk.set()
    one.settle()
    assert len(list(tmp_path.glob("*/sigma*"))) == 1
    assert equal(one.lookup(2.0), put)
    assert equal(entry(KVCache(tmp_path, budget=0)).lookup(2.0), put)


def test_one_level_at_a_time_is_on_its_way(tmp_path, slow_disk):
    one = entry(KVCache(tmp_path), kind=CacheEntry)
    one.put(4.0, source_pass(4.0))
    second = threading.Thread(target=one.put, args=(2.0, source_pass(2.0)))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert slow_disk.waiting == [4.0]
    slow_disk.set()
    second.join(30)
    one.settle()
    assert sorted(module.sigmas_in(tmp_path / one.name[:32])) == [2.0, 4.0]


@pytest.mark.parametrize("budget", [0, None])
def test_what_went_wrong_with_the_disk_is_told_when_the_run_settles(tmp_path, monkeypatch, budget):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write", full)
    one = entry(KVCache(tmp_path, budget=budget), kind=CacheEntry)
    one.put(2.0, source_pass(2.0))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        one.settle()
    texts = [str(warning.message) for warning in told]
    assert "No space left" in texts[0]
    assert [("one level needs" in text) for text in texts[1:]] == [True] * (budget == 0)
    assert one.sigmas == (set() if budget == 0 else {2.0})


# -- files that are not what they should be ---------------------------------------------------------------------------


def rewritten(path, about=None, tensors=None):
    """A valid safetensors file with other metadata or tensors, under a checksum that fits if it is valid at all."""
    save_file(load_file(path) | (tensors or {}), path, {"checksum": "0" * 64} | (about or {}))


def header(path, text):
    """A file whose header is this text."""
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode())


def damage(path, how):
    data = bytearray(path.read_bytes())
    path.unlink()  # another inode: a map of the old file stays what it was
    dtypes = {f"{layer}/{side}": "float32" for layer in LAYERS for side in ("key", "value")}
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.touch()
    elif how == "cut in the header":
        path.write_bytes(data[:50])
    elif how == "garbage":
        path.write_bytes(random.Random(0).randbytes(len(data)))
    elif how == "a length that lies":
        path.write_bytes(b"\x7f" * 8)
    elif how == "another text file":
        path.write_text("mine")
    elif how == "a bit in the last byte":
        data[-1] ^= 1
        path.write_bytes(data)
    elif how == "deep JSON":
        header(path, '{"a":' * 100_000)
    elif how == "deep JSON in the metadata":
        header(path, json.dumps({"__metadata__": {"checksum": "[" * 100_000}}))
    elif how == "no metadata":
        path.write_bytes(data)
        save_file(load_file(path), path)
    elif how == "a foreign level":
        path.write_bytes(filled(path.parent.parent, [2.0], "theirs")[0][0].read_bytes())
    elif how == "a level under another name":
        path.write_bytes(next(p for p in path.parent.glob("sigma-*") if p != path).read_bytes())
    elif how == "crafted dtype":
        path.write_bytes(data)
        rewritten(path, dtypes | {f"{LAYERS[0]}/key": "load"})
    elif how == "crafted shape":
        path.write_bytes(data)
        rewritten(path, dtypes, {f"{LAYERS[0]}/key/values": torch.zeros(5, dtype=torch.int8)})
    elif how == "a pipe":
        os.mkfifo(path)
    elif how == "a link to a device":
        path.symlink_to("/dev/zero")
    elif how == "a link to itself":
        path.symlink_to(path)
    else:
        raise AssertionError(how)


HOW = (
    "truncated",
    "empty",
    "cut in the header",
    "garbage",
    "a length that lies",
    "another text file",
    "a bit in the last byte",
    "deep JSON",
    "deep JSON in the metadata",
    "no metadata",
    "a foreign level",
    "a level under another name",
    "crafted dtype",
    "crafted shape",
    "a pipe",
    "a link to a device",
    "a link to itself",
)


@pytest.mark.parametrize("how", HOW)
def test_a_file_that_is_no_level_is_ignored_with_one_warning_and_replaced(tmp_path, how):
    files, stored = filled(tmp_path)
    whole = [load_file(path) for path in files]
    damage(files[stored.index(2.0)], how)
    one = entry(KVCache(tmp_path))
    with pytest.warns(KVCacheWarning, match=r"sigma-2\.0.*is ignored.*runs again") as told:
        passes = run(one, SIGMAS)
    assert (passes, len(told)) == ([2.0], 1)
    for path, tensors in zip(files, whole, strict=True):
        torch.testing.assert_close(load_file(path), tensors, rtol=0, atol=0)
    assert run(entry(KVCache(tmp_path)), SIGMAS) == []


def test_a_crafted_dtype_is_not_looked_up_even_under_a_valid_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_checksum", lambda *_: "0" * 64)
    ((path,), _) = filled(tmp_path, [2.0])
    for name in ("load", "__class__", "int8", "float8_e4m3fn", "", "float32 "):
        dtypes = {f"{layer}/{side}": name for layer in LAYERS for side in ("key", "value")}
        rewritten(path, dtypes)
        with pytest.warns(KVCacheWarning, match="is ignored"):
            assert entry(KVCache(tmp_path)).lookup(2.0) is None


def test_a_flipped_bit_anywhere_in_the_data_is_found(tmp_path):
    ((path,), _) = filled(tmp_path, [2.0])
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for at in range(start, len(data), 97):
        flipped = bytearray(data)
        flipped[at] ^= 0x10
        path.unlink()
        path.write_bytes(flipped)
        with pytest.warns(KVCacheWarning, match="its checksum does not fit"):
            assert entry(KVCache(tmp_path)).lookup(2.0) is None


def test_a_link_to_a_sound_level_serves_and_is_not_written_through(tmp_path):
    ((path,), _) = filled(tmp_path, [2.0])
    target = path.rename(tmp_path / "moved")
    path.symlink_to(target)
    one = entry(KVCache(tmp_path, budget=0))
    put = one.lookup(2.0)
    target.write_bytes(target.read_bytes()[:-1] + b"?")  # never written to: the map in use is the reader's own risk
    assert len(put) == len(LAYERS)
    with pytest.warns(KVCacheWarning, match="checksum"):
        assert run(entry(KVCache(tmp_path)), [2.0]) == [2.0]
    assert not path.is_symlink()
    assert target.read_bytes().endswith(b"?")


def test_other_files_are_left_alone(tmp_path):
    ((path,), _) = filled(tmp_path, [2.0])
    strange = {"notes.txt", "sigma-.safetensors", "sigma-1.0.safetensors", "sigma-nan.safetensors", ".draft.tmp.doc"}
    for name in strange:
        (path.parent / name).write_bytes(b"mine")
        os.utime(path.parent / name, (0, 0))
    (tmp_path / "holiday.mp4").write_bytes(b"mine")
    assert run(entry(KVCache(tmp_path)), [2.0, 1.0]) == [1.0]
    assert all((path.parent / name).read_bytes() == b"mine" for name in strange)
    assert (tmp_path / "holiday.mp4").read_bytes() == b"mine"


def test_a_level_that_is_removed_meanwhile_is_absent_or_stays_readable(tmp_path):
    (first, second), _ = filled(tmp_path, [8.0, 4.0], format=None)
    one = entry(KVCache(tmp_path, format=None))
    level = one.lookup(4.0)
    first.unlink()
    second.unlink()
    assert equal(level, source_pass(4.0))
    assert run(one, [8.0]) == [8.0]


# -- directories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "under a file", "proc"])
def test_a_directory_that_cannot_be_written_to_raises(tmp_path, place):
    (tmp_path / "file").write_text("")
    where = {"file": tmp_path / "file", "under a file": tmp_path / "file" / "cache", "proc": "/proc/cache"}[place]
    with pytest.raises(KVCacheError, match=r"cannot be written to: .*[^$]*KVCache\('kv-cache'\)"):
        KVCache(where)


@contextmanager
def read_only(monkeypatch):
    """As a disk that is mounted read-only: tests may run as root, whom no permission stops."""

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", refuse)
        patch.setattr(os, "replace", refuse)
        yield


def test_a_filled_directory_that_can_only_be_read_serves(tmp_path, monkeypatch):
    filled(tmp_path, [8.0, 4.0], format=None)
    (tmp_path / "empty").mkdir()
    with read_only(monkeypatch):
        with pytest.raises(KVCacheError, match="Read-only file system"):
            KVCache(tmp_path / "empty")
        one = entry(KVCache(tmp_path, format=None))
        assert equal(one.lookup(4.0), source_pass(4.0))
        with pytest.warns(KVCacheWarning, match=r"Read-only file system.*in memory alone") as told:
            run(one, [2.0, 1.0])
        assert len(told) == 1
        assert run(one, [8.0, 4.0, 2.0, 1.0]) == []
        assert KVCache(tmp_path.parent).directory == tmp_path.parent  # a batch has a folder for each schedule
    assert len(list(tmp_path.glob("*/*"))) == 2


@pytest.mark.parametrize("budget", [LEVEL_BYTES, LEVEL_BYTES - 1])
def test_a_full_disk_keeps_the_level_in_memory_if_it_fits(tmp_path, budget):
    import resource

    kv_cache = KVCache(tmp_path, budget=budget, format=None)
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, old[1]))
        with pytest.warns(KVCacheWarning) as told:
            level = entry(kv_cache).put(2.0, source_pass(2.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert equal(level, source_pass(2.0))
    fits = budget == LEVEL_BYTES
    assert (entry(kv_cache).lookup(2.0) is not None) == fits
    assert "in memory alone" in str(told[0].message)
    assert [("one level needs" in str(w.message)) for w in told] == [False] + [True] * (not fits)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# -- processes that die or share --------------------------------------------------------------------------------------


def forked(work) -> int:
    """Do `work` in a child process. Returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@needs_fork
def test_a_writer_killed_at_any_moment_leaves_whole_levels(tmp_path):
    """Writes levels, over and over, until it is killed: every file with a level's name is whole and sound."""
    sigmas, large = [8.0, 4.0, 2.0, 1.0], (2, 2, 3000, 32)
    keys = {sigma: source_pass(sigma, shape=large) for sigma in sigmas}

    def work():
        one = entry(KVCache(tmp_path, format=None, budget=0))
        while True:
            for sigma in order:
                one.put(sigma, keys[sigma])

    left = set()
    for i in range(12):
        order = sigmas[i // 2 % 4 :] + sigmas[: i // 2 % 4]
        child = forked(work)
        time.sleep(0.03 + random.Random(i).random() * 0.1)
        late = time.monotonic() + 30
        # Every other kill comes while a file is written, the others at any time after the first file.
        while not (
            set(tmp_path.glob("*/.*")) - left if i % 2 else order[0] in entry(KVCache(tmp_path, format=None)).sigmas
        ):
            assert time.monotonic() < late, "the writer does not write"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        one = entry(KVCache(tmp_path, format=None))
        for sigma in one.sigmas:
            assert equal(one.lookup(sigma), keys[sigma])
        left = set(tmp_path.glob("*/.*"))
    assert one.sigmas == set(sigmas)
    assert left, "no kill came while a file was being written"
    entry(KVCache(tmp_path, format=None))
    assert set(tmp_path.glob("*/.*")) == left, "a young temporary may be in use"
    for path in tmp_path.glob("*/.*"):
        os.utime(path, (time.time() - module.STALE - 1,) * 2)
    entry(KVCache(tmp_path, format=None))
    assert not list(tmp_path.glob("*/.*"))


@needs_fork
def test_processes_that_share_a_directory_do_no_harm(tmp_path):
    def work():
        one = entry(KVCache(tmp_path, format=None, budget=0, ratio=1.0))
        for sigma in SIGMAS:
            assert equal(one.lookup(sigma) or one.put(sigma, source_pass(sigma)), source_pass(sigma))

    children = [forked(work) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    one = entry(KVCache(tmp_path, format=None, ratio=1.0))
    assert one.sigmas == set(SIGMAS)
    assert all(equal(one.lookup(sigma), source_pass(sigma)) for sigma in SIGMAS)
    assert sorted(p.name[:6] for p in tmp_path.glob("*/*")) == ["sigma-"] * len(SIGMAS)


@needs_fork
def test_a_level_that_is_replaced_while_it_is_read_is_one_or_the_other(tmp_path):
    def work():
        one = entry(KVCache(tmp_path, format=None, budget=0))
        for _ in range(200):
            one.put(2.0, source_pass(2.0))

    filled(tmp_path, [2.0], format=None)
    child = forked(work)
    for _ in range(50):
        assert equal(entry(KVCache(tmp_path, format=None)).lookup(2.0), source_pass(2.0))
    assert os.waitpid(child, 0)[1] == 0
