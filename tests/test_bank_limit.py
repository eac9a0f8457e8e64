"""A limit on disk: never exceeded, whoever writes; what goes first; and what happens where nothing may go."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from banks import LEVEL_BYTES, SHAPE, SITES, contents, equal, key, run, store
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlock_sampling.kv_cache import KVCache, KVCacheError, KVCacheWarning, own, plan_for
from kvlock_sampling.kv_cache import disk as module
from kvlock_sampling.kv_cache import file as file_module
from kvlock_sampling.kv_cache import folder as folder_module
from kvlock_sampling.kv_cache import shelf as shelf_module
from kvlock_sampling.kv_cache.format import pack
from kvlock_sampling.kv_cache.incoming import describe

SLACK = 4000  # headers and manifests
SIGMAS = [8.0, 6.0, 4.0, 3.0, 2.0, 1.0]
TEMPORARY = ".sigma-1.0000000000000000e+00.abcdef01.tmp.safetensors"


def on_disk(folder):
    """Bytes of every file, the KV cache's or not."""
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())


def levels(shelf_or_folder):
    folder = getattr(shelf_or_folder, "directory", shelf_or_folder)
    return sorted((float(p.stem.removeprefix("sigma-")) for p in folder.glob("sigma-*")), reverse=True)


def level_size():
    """Bytes of one file, and of a manifest."""
    with tempfile.TemporaryDirectory() as folder, KVCache(folder, format=None).opened(key()) as shelf:
        shelf.put(1.0, store(1.0))
        (path,) = shelf.directory.glob("sigma-*")
        return path.stat().st_size, (shelf.directory / "manifest.json").stat().st_size


FILE, MANIFEST = level_size()


def bank_of(folder, count, **more):
    """Room for so many levels of one key, or a few bytes more, or with `keys` of several."""
    keys = more.pop("keys", 1)
    limit = count * (FILE + 8) + keys * (MANIFEST + 8)
    return KVCache(folder, disk=limit, **{"format": None, "every": 1, "ratio": 1.1, **more})


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


@pytest.fixture(autouse=True)
def no_unexpected_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", KVCacheWarning)
        yield


# -- never exceeded ---------------------------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(SIGMAS), st.sampled_from(["close", "keep open", "restart"])),
    min_size=1,
    max_size=30,
)


@given(
    st.integers(1, 6 * (FILE + MANIFEST)),
    st.sampled_from([None, 0, LEVEL_BYTES, 3 * LEVEL_BYTES]),
    steps,
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_the_limit_is_never_exceeded_and_what_is_served_is_right(limit, budget, steps, second):
    def check():
        assert on_disk(folder) <= limit
        assert all(kv_cache.budget is None or kv_cache.peak <= kv_cache.budget for kv_cache in banks)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", KVCacheWarning)
        settings = {"budget": budget, "format": None, "every": None, "ratio": 1.1}
        banks = [KVCache(folder, disk=limit, **settings) for _ in range(1 + second)]
        open_ = {}
        try:
            for i, (clip, sigma, then) in enumerate(steps):
                kv_cache = banks[i % len(banks)]
                at = (clip, kv_cache)
                if at not in open_:
                    context = kv_cache.opened(key(str(clip)))
                    open_[at] = context, context.__enter__()
                    check()
                shelf = open_[at][1]
                level = shelf.lookup(sigma)
                if level is None:
                    try:
                        level = shelf.put(sigma, store(sigma))
                    except KVCacheError:
                        # Only where neither memory nor disk can have one level, whatever may go.
                        in_use = LEVEL_BYTES * (len(open_) - 1)
                        assert budget is not None
                        assert budget < LEVEL_BYTES + in_use
                        assert len(open_) > 1 or limit < FILE + MANIFEST
                check()
                if level is not None:
                    assert equal(contents(level), [x for pair in store(sigma).values() for x in pair])
                if then == "restart":
                    shelf.restart()
                elif then == "close":
                    open_.pop(at)[0].__exit__(None, None, None)
                check()
        finally:
            for context, _ in open_.values():
                context.__exit__(None, None, None)
        assert all(kv_cache.disk_used == on_disk(folder) for kv_cache in banks)


def test_threads_and_banks_on_one_directory_keep_it(tmp_path):
    banks = [bank_of(tmp_path, 5, keys=3, budget=b) for b in (None, 40 * LEVEL_BYTES)]
    sigmas, failures, most, done = [8.0 * 0.7**i for i in range(8)], [], [0], threading.Event()

    def work(kv_cache, clip):
        try:
            for _ in range(2):
                with kv_cache.opened(key(clip)) as shelf:
                    for sigma in sigmas:
                        level = shelf.lookup(sigma) or shelf.put(sigma, store(sigma))
                        assert equal(contents(level), [x for pair in store(sigma).values() for x in pair])
        except BaseException as error:
            failures.append(error)

    def watch():
        while not done.is_set():
            with banks[0]._disk._locked():
                most[0] = max(most[0], on_disk(tmp_path))

    watcher = threading.Thread(target=watch)
    threads = [threading.Thread(target=work, args=(kv_cache, clip)) for kv_cache in banks for clip in ("a", "b", "c")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KVCacheWarning)
        [t.start() for t in (watcher, *threads)]
        [t.join() for t in threads]
        done.set()
        watcher.join()
    assert failures == []
    assert 2 * FILE < max(most[0], on_disk(tmp_path)) <= banks[0].disk
    assert not list(tmp_path.rglob(".*.tmp.*"))


WRITER = """
import sys, warnings
sys.path.insert(0, "tests")
warnings.simplefilter("ignore")
from KV caches import *
from kvlock_sampling.kv_cache import KVCache
KV cache = KVCache(sys.argv[1], disk=int(sys.argv[2]), format=None, every=1, ratio=1.1)
print("ready", flush=True)
sys.stdin.readline()
for again in range(3):
    with KV cache.opened(key(sys.argv[3])) as shelf:
        for i in range(10):
            level = shelf.lookup(8.0 * 0.8**i) or shelf.put(8.0 * 0.8**i, store(8.0 * 0.8**i))
            assert equal(contents(level), [x for pair in store(8.0 * 0.8**i).values() for x in pair])
"""


def test_processes_on_one_directory_keep_it(tmp_path):
    kv_cache = bank_of(tmp_path, 4, keys=2)
    words = [sys.executable, "-c", WRITER, str(tmp_path), str(kv_cache.disk)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*words, clip], **pipes) for clip in ("a", "b")]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    most = 0
    while any(process.poll() is None for process in processes):
        with kv_cache._disk._locked():
            most = max(most, on_disk(tmp_path))
    assert [(process.wait(), process.stderr.read()) for process in processes] == [(0, ""), (0, "")]
    most = max(most, on_disk(tmp_path))
    assert 2 * FILE < most <= kv_cache.disk


def test_what_is_being_written_is_counted(tmp_path, monkeypatch):
    """The claim is there at full size before the first byte, so that nobody else takes the same room."""
    real, seen = file_module._write, []

    def watched(out, part):
        seen.append(on_disk(tmp_path))
        return real(out, part)

    monkeypatch.setattr(file_module, "_write", watched)
    with bank_of(tmp_path, 3).opened(key()) as shelf:
        shelf.put(2.0, store(2.0))
    assert set(seen) == {FILE + MANIFEST}


def test_a_level_gets_its_name_while_nobody_counts(tmp_path, monkeypatch):
    """Else a level that is renamed while a directory is listed is found under neither name."""
    kv_cache, held, real = bank_of(tmp_path, 3), [], os.replace

    def renamed(*args):
        held.append(kv_cache._disk._directory.writers.locked())
        real(*args)

    monkeypatch.setattr(os, "replace", renamed)
    with kv_cache.opened(key()) as shelf:
        run(shelf, [8.0, 4.0])
    assert held == [True, True, True]  # a manifest and two levels


@pytest.mark.parametrize("format", [None, "float32", "bf16", "int8", "fp8"])
def test_the_size_of_a_file_is_known_beforehand(tmp_path, format):
    from kvlock_sampling.kv_cache.file import file_size

    with KVCache(tmp_path, format=format).opened(key()) as shelf:
        shelf.put(0.1, store(0.1, shape=(*SHAPE[:-1], 7)))
        (path,) = shelf.directory.glob("sigma-*")
        kinds = describe(store(0.1, shape=(*SHAPE[:-1], 7)), SITES, format or "verbatim")
        assert path.stat().st_size == file_size(shelf._folder.fingerprint, 0.1, kinds)


# -- who goes first ---------------------------------------------------------------------------------------------------


def test_other_keys_go_first_the_least_recently_used_first(tmp_path):
    kv_cache = bank_of(tmp_path, 5, keys=3, budget=0)
    folders = {}
    for clip in "abc":
        with kv_cache.opened(key(clip)) as shelf:
            run(shelf, SIGMAS[:1] if clip == "c" else SIGMAS[:2])
            folders[clip] = shelf.directory
    with kv_cache.opened(key("a")) as shelf:
        run(shelf, [6.0])  # used again
    with kv_cache.opened(key("c")) as shelf:
        run(shelf, [4.0])
        assert (levels(folders["a"]), levels(folders["b"])) == ([6.0], [8.0, 6.0])
        run(shelf, [3.0])
        assert (levels(folders["a"]), levels(folders["b"])) == ([6.0], [6.0])
        run(shelf, [2.0])
        assert (levels(folders["a"]), folders["b"].exists()) == ([6.0], False)
        run(shelf, [1.0])
        assert not folders["a"].exists()
        assert levels(shelf) == [8.0, 4.0, 3.0, 2.0, 1.0]
    with kv_cache.opened(key("a")) as shelf:  # what went is computed anew, and no map of it is left to serve
        assert run(shelf, [6.0]) == [6.0]


def test_what_a_run_uses_stays_and_the_rest_goes_to_memory_with_one_warning(tmp_path):
    kv_cache = bank_of(tmp_path, 3)
    with kv_cache.opened(key()) as shelf:
        with pytest.warns(KVCacheWarning, match=r"may hold .* nothing may[^$]*memory alone[^$]*disk=") as told:
            assert run(shelf, SIGMAS) == SIGMAS
        assert len(told) == 1
        assert levels(shelf) == [8.0, 6.0, 4.0]
        assert run(shelf, SIGMAS) == []  # from memory
    # A next run, in another process, finds the first three, and does not lose them to the last.
    for _ in range(2):
        with bank_of(tmp_path, 3).opened(key()) as shelf, pytest.warns(KVCacheWarning) as told:
            assert run(shelf, SIGMAS) == SIGMAS[3:]
        assert len(told) == 1


def test_levels_of_another_schedule_give_way_to_this_ones(tmp_path):
    with bank_of(tmp_path, 3).opened(key()) as shelf:
        run(shelf, [8.0, 6.0, 4.0])
    with bank_of(tmp_path, 3).opened(key()) as shelf:
        assert run(shelf, [6.0, 3.0, 2.0]) == [3.0, 2.0]
        assert levels(shelf) == [6.0, 3.0, 2.0]
        shelf.restart()
        run(shelf, [1.0])  # another run in the block: the first one's may go
        assert levels(shelf) == [3.0, 2.0, 1.0]


def test_without_memory_a_run_goes_on_with_what_the_disk_holds(tmp_path):
    kv_cache = bank_of(tmp_path, 2, budget=0)
    with kv_cache.opened(key()) as shelf:
        assert run(shelf, SIGMAS) == SIGMAS
        assert levels(shelf) == SIGMAS[-2:]
        assert shelf.sigmas == tuple(SIGMAS[-2:])
    small = KVCache(tmp_path / "small", budget=0, disk=FILE // 2)
    with (
        small.opened(key()) as shelf,
        pytest.raises(KVCacheError, match=r"may hold[^$]*memory has room for 0[^$]*Raise disk="),
    ):
        shelf.put(1.0, store(1.0))


def test_a_key_that_is_open_in_this_process_loses_nothing_to_another(tmp_path):
    ours, theirs = bank_of(tmp_path, 3, keys=2), bank_of(tmp_path, 3, keys=2)
    with ours.opened(key("a")) as a:
        run(a, [8.0, 6.0])
        with theirs.opened(key("b")) as b:
            with pytest.warns(KVCacheWarning, match="nothing may") as told:
                run(b, [8.0, 6.0, 4.0])
            assert len(told) == 1
            assert (levels(a), levels(b)) == ([8.0, 6.0], [8.0])
    with theirs.opened(key("b")) as b:
        run(b, [3.0])
        assert (levels(a.directory), levels(b)) == ([6.0], [8.0, 3.0])


def test_two_shelves_of_one_key_keep_each_others_levels(tmp_path):
    with bank_of(tmp_path, 2).opened(key()) as a, bank_of(tmp_path, 2, budget=0).opened(key()) as b:
        run(a, [8.0])
        run(b, [6.0, 4.0, 3.0])  # without memory: takes the place of its own
        assert levels(a) == [8.0, 3.0]


def test_a_level_is_in_use_the_moment_it_is_there(tmp_path, monkeypatch):
    real = folder_module.LevelFile
    with bank_of(tmp_path, 1).opened(key()) as a, bank_of(tmp_path, 1, budget=0).opened(key()) as b:

        def meanwhile(*args, **options):
            monkeypatch.undo()
            with pytest.raises(KVCacheError, match="nothing may"):
                b.put(4.0, store(4.0))
            return real(*args, **options)

        monkeypatch.setattr(folder_module, "LevelFile", meanwhile)
        a.put(8.0, store(8.0))
        assert levels(a) == [8.0]


def test_a_level_at_hand_stays_readable_whatever_becomes_of_its_file(tmp_path):
    kv_cache = bank_of(tmp_path, 1, budget=0)
    with kv_cache.opened(key()) as a, kv_cache.opened(key()) as b:
        level = a.put(8.0, store(8.0))
        a.restart()  # a new run: the level may go, but somebody still reads it
        b.put(4.0, store(4.0))
        assert levels(a) == [4.0]
        assert equal(contents(level), [x for pair in store(8.0).values() for x in pair])


def test_what_another_bank_removed_is_not_served_from_a_map_of_it(tmp_path):
    ours, theirs = bank_of(tmp_path, 1, keys=2, budget=0), bank_of(tmp_path, 1, keys=2)
    with ours.opened(key("a")) as a:
        run(a, [8.0])
    with theirs.opened(key("b")) as b:
        run(b, [8.0])
    with ours.opened(key("a")) as a:
        assert a.sigmas == ()
        assert run(a, [8.0]) == [8.0]


def test_without_memory_a_level_is_packed_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(shelf_module, "pack", lambda x, format: calls.append(x) or pack(x, format))
    with bank_of(tmp_path, 2, budget=0).opened(key()) as shelf:
        run(shelf, SIGMAS)
    assert len(calls) == 2 * len(SITES) * len(SIGMAS)


def test_a_level_that_went_but_is_whole_in_memory_stays_there(tmp_path):
    kv_cache = bank_of(tmp_path, 1, keys=2)
    with kv_cache.opened(key("a")) as a:
        run(a, [8.0])
    with kv_cache.opened(key("b")) as b:
        run(b, [8.0])
    with kv_cache.opened(key("a")) as a:
        assert levels(a) == []
        assert run(a, [8.0]) == []
        assert equal(contents(a.lookup(8.0)), [x for pair in store(8.0).values() for x in pair])


def test_a_lowered_limit_is_kept_from_the_next_shelf_on(tmp_path):
    for clip in "ab":
        with KVCache(tmp_path, format=None, every=1, ratio=1.1).opened(key(clip)) as shelf:
            run(shelf, SIGMAS)
    kv_cache = bank_of(tmp_path, 4)
    with kv_cache.opened(key("a")) as shelf:
        assert on_disk(tmp_path) <= kv_cache.disk
        assert levels(shelf) == SIGMAS[-4:]  # its own went last, the oldest first
        assert shelf.sigmas == tuple(SIGMAS[-4:])


# -- other people's files, and files that go away ---------------------------------------------------------------------


def test_only_the_banks_own_files_count_and_go(tmp_path):
    mine = [tmp_path / "holiday.mp4", tmp_path / "other" / "sigma-1.0.safetensors", tmp_path / ("f" * 32) / "notes.txt"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 10 * FILE)
    kv_cache = bank_of(tmp_path, 1, keys=2)
    for clip in "ab":
        with kv_cache.opened(key(clip)) as shelf:
            run(shelf, [8.0])
            (shelf.directory / "notes.txt").write_text("mine")
            assert kv_cache.disk_used <= kv_cache.disk
    assert all(path.stat().st_size == 10 * FILE for path in mine)
    assert [p.read_text() for p in tmp_path.glob("*/notes.txt") if p not in mine] == ["mine", "mine"]


def test_levels_that_vanish_meanwhile_are_no_harm(tmp_path, monkeypatch):
    kv_cache = bank_of(tmp_path, 3, keys=2)
    with kv_cache.opened(key("a")) as a:
        run(a, [8.0, 6.0, 4.0])
        folder = a.directory
    real = module.Disk._removable

    def faster(self, *args):
        able = real(self, *args)
        for path in folder.glob("sigma-*"):  # another process makes room at the same time
            path.unlink()
        return able

    monkeypatch.setattr(module.Disk, "_removable", faster)
    with kv_cache.opened(key("b")) as b:
        run(b, [8.0])
        assert levels(b) == [8.0]
    monkeypatch.undo()
    kv_cache.clear()
    with kv_cache.opened(key("a")) as a:
        assert a.sigmas == ()
        assert run(a, [8.0]) == [8.0]


def test_a_level_that_vanishes_while_a_folder_is_read_is_none(tmp_path, monkeypatch):
    with bank_of(tmp_path, 3).opened(key()) as shelf:
        run(shelf, [8.0, 4.0])
    real = folder_module.LevelFile

    def vanished(path, *args, **options):
        if path.name.startswith("sigma-8"):
            path.unlink()
        return real(path, *args, **options)

    monkeypatch.setattr(folder_module, "LevelFile", vanished)
    with bank_of(tmp_path, 3).opened(key()) as shelf:  # and nobody is warned of a damaged file
        assert shelf.sigmas == (4.0,)


def test_files_that_cannot_be_removed_are_passed_over(tmp_path, monkeypatch):
    """As on Windows, where a mapped file stays."""
    kv_cache = bank_of(tmp_path, 3, keys=2)
    with kv_cache.opened(key("a")) as a:
        run(a, [8.0, 6.0, 4.0])
        folder = a.directory
    real = Path.unlink

    def held(path, **kwargs):
        if path.name.startswith("sigma-8") and path.parent == folder:
            raise PermissionError(13, "in use", str(path))
        real(path, **kwargs)

    monkeypatch.setattr(Path, "unlink", held)
    with kv_cache.opened(key("b")) as b:
        with pytest.warns(KVCacheWarning, match=r"cannot be removed\. This level"):
            run(b, [8.0, 6.0, 4.0])
        assert (levels(folder), levels(b)) == ([8.0], [8.0, 6.0])
        assert on_disk(tmp_path) <= kv_cache.disk


def test_what_killed_runs_left_goes_first(tmp_path):
    kv_cache = bank_of(tmp_path, 2, keys=2)
    with kv_cache.opened(key("a")) as a:
        run(a, [8.0])
        left = a.directory / TEMPORARY
        left.write_bytes(b"x" * FILE)
    with kv_cache.opened(key("c")) as c:  # killed between its manifest and its first level
        bare = c.directory
    long_ago = time.time() - own.STALE - 10
    for path in (left, bare / "manifest.json"):
        os.utime(path, (long_ago, long_ago))
    with kv_cache.opened(key("b")) as b:
        run(b, [8.0])
        assert (levels(a.directory), levels(b)) == ([8.0], [8.0])
    assert not left.exists()
    assert not bare.exists()


def test_what_others_are_writing_counts_and_stays(tmp_path):
    kv_cache = bank_of(tmp_path, 2)
    with kv_cache.opened(key()) as shelf, ExitStack() as until:
        theirs = shelf.directory / TEMPORARY
        theirs.write_bytes(b"x" * FILE)
        with open(theirs, "r+b") as out:
            own.hold(out, until)
        with pytest.warns(KVCacheWarning, match="nothing may"):
            run(shelf, [8.0, 4.0])
        assert levels(shelf) == [8.0]
    assert theirs.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks there")
def test_what_a_killed_writer_claimed_is_free_at_once(tmp_path):
    kv_cache = bank_of(tmp_path, 2)
    with kv_cache.opened(key()) as shelf:
        left = shelf.directory / TEMPORARY
        left.write_bytes(b"x" * FILE)  # a moment ago, and nobody has it locked
        run(shelf, [8.0, 4.0])
        assert levels(shelf) == [8.0, 4.0]
    assert not left.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks there")
@pytest.mark.parametrize("limited", [False, True])
def test_a_claim_is_marked_until_it_has_its_name(tmp_path, monkeypatch, limited):
    """While it is written, and also while it is renamed, when its writer has closed it."""
    seen, real, write = [], os.replace, file_module._write

    def look():
        return [own.remove_abandoned(tmp_path, f) for f in own.files_in(tmp_path) if f.name.startswith(".")]

    monkeypatch.setattr(os, "replace", lambda *args: (seen.append(look()), real(*args)))
    monkeypatch.setattr(file_module, "_write", lambda *args: (seen.append(look()), write(*args))[1])
    kv_cache = bank_of(tmp_path, 3) if limited else KVCache(tmp_path, format=None)
    with kv_cache.opened(key()) as shelf:
        shelf.put(8.0, store(8.0))
    assert seen == [[0]] * len(seen)
    assert len(seen) == 2 + 2 * len(SITES)  # a manifest and a level renamed, keys and values written


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks there")
@pytest.mark.parametrize("limited", [False, True])
def test_a_claim_that_goes_before_it_is_marked_is_made_again(tmp_path, monkeypatch, limited):
    real, gone = own.hold, []

    def late(out, until):
        if len(gone) < 2:
            gone.extend(own.remove_abandoned(tmp_path, f._replace(size=1)) for f in own.files_in(tmp_path))
        return real(out, until)

    monkeypatch.setattr(module, "hold", late)
    kv_cache = bank_of(tmp_path, 3) if limited else KVCache(tmp_path, format=None)
    with kv_cache.opened(key()) as shelf:
        shelf.put(8.0, store(8.0))
        assert levels(shelf) == [8.0]
    assert gone == [1, 1]


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks there")
def test_where_files_have_no_locks_a_claim_stands_for_an_hour(tmp_path, monkeypatch):
    def without(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(own.fcntl, "flock", without)
    kv_cache = bank_of(tmp_path, 2)
    with kv_cache.opened(key()) as shelf:
        left = shelf.directory / TEMPORARY
        left.write_bytes(b"x" * FILE)
        with pytest.warns(KVCacheWarning, match="nothing may"):
            run(shelf, [8.0, 4.0])
        assert left.exists()
        os.utime(left, (time.time() - own.STALE - 10,) * 2)
        assert run(shelf, [8.0, 4.0, 2.0]) == [2.0]
        assert levels(shelf) == [8.0, 2.0]
    assert not left.exists()


def test_a_damaged_level_makes_room_for_its_successor(tmp_path, stack):
    with bank_of(tmp_path, 2).opened(key()) as shelf:
        run(shelf, [8.0, 4.0])
        path = max(shelf.directory.glob("sigma-*"))
    path.write_bytes(b"x" * FILE)
    kv_cache = bank_of(tmp_path, 2)
    with pytest.warns(KVCacheWarning, match="is ignored"):
        shelf = stack.enter_context(kv_cache.opened(key()))
    assert run(shelf, [8.0, 4.0]) == [8.0]
    assert levels(shelf) == [8.0, 4.0]


# -- told before ------------------------------------------------------------------------------------------------------


def test_a_plan_tells_what_stays_on_disk():
    arguments = (30, 12, 128, 32760, 0.7, 17, "int8", "4GB")
    assert "give the KV cache a directory" in str(plan_for(*arguments))
    plan = plan_for(*arguments, directory=True)
    assert (plan.on_disk, plan.in_memory) == (17, 1)
    assert "all of them on disk, 36.5 GB: the next edit" in str(plan)
    plan = plan_for(*arguments, directory=True, disk="20GB")
    assert plan.on_disk == 9
    assert "disk limit 20 GB" in str(plan)
    assert "All levels take 36.5 GB, and disk=20 GB is the limit: 9 of 17 stay there, the rest are kept in" in str(plan)
    assert "Raise it to 36.7 GB" in str(plan)
    nothing = plan_for(*arguments[:-1], 0, directory=True, disk="1GB")
    assert "not one fits" in str(nothing)
    assert "later ones take the place" in str(plan_for(*arguments[:-1], 0, directory=True, disk="20GB"))
    with pytest.raises(KVCacheError, match=r"disk='much'; expected bytes, e\.g\. disk="):
        plan_for(*arguments, directory=True, disk="much")


def test_a_plan_that_fits_is_a_run_that_is_not_told(tmp_path):
    plan = plan_for(3, 2, 8, 10, 0.6, len(SIGMAS), None, None, clips=2, dtype=torch.float32, directory=True)
    kv_cache = KVCache(tmp_path, disk=plan.total + len(SIGMAS) * SLACK, format=None, every=1)
    with kv_cache.opened(key()) as shelf:
        run(shelf, SIGMAS)
        assert levels(shelf) == SIGMAS
    assert plan.total <= kv_cache.disk_used <= kv_cache.disk
