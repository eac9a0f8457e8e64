"""A KV cache among others: files that are not its own, levels that others remove, folders that cannot be written."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path

import pytest
from banks import LEVEL_BYTES, contents, equal, key, run, store
from safetensors import safe_open

from kvlock_sampling.kv_cache import KVCache, KVCacheWarning, own
from kvlock_sampling.kv_cache import disk as disk_module
from kvlock_sampling.kv_cache import file as file_module
from kvlock_sampling.utils.files import make_folder

SIGMAS = [8.0, 4.0, 2.0]
LEVEL_NAME = "sigma-1.0000000000000000e+00.safetensors"


def age(folder):
    """Make everything in a folder older than anybody would be writing it."""
    long_ago = time.time() - own.STALE - 10
    for path in folder.iterdir():
        os.utime(path, (long_ago, long_ago))


def kept(shelf, sigmas=SIGMAS):
    """Whether a run is served what a source pass makes, from disk or from memory."""
    return all(equal(contents(shelf.lookup(s)), [x for p in store(s).values() for x in p]) for s in sigmas)


def edit(kv_cache):
    """A whole run that has to come to its end. Returns the folder."""
    with kv_cache.opened(key()) as shelf:
        assert run(shelf, SIGMAS) == SIGMAS
        assert kept(shelf)
        return shelf.directory


def level_bank(folder, **settings):
    return KVCache(folder, **{"format": None, "every": 1, "ratio": 1.1, **settings})


@pytest.fixture(autouse=True)
def no_unexpected_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", KVCacheWarning)
        yield


# -- other people's files ---------------------------------------------------------------------------------------------

FOREIGN = {
    "a manifest alone": {"manifest.json": '{"mine": true}'},
    "a manifest that is no object": {"manifest.json": "[1]"},
    "a manifest of another folder": {"manifest.json": json.dumps({"version": 1, "key": {}, "fingerprint": "b" * 64})},
    "a fingerprint that is no text": {"manifest.json": json.dumps({"version": 1, "key": {}, "fingerprint": 7})},
    "a manifest without the key": {"manifest.json": json.dumps({"fingerprint": "a" * 64})},
    "a manifest that cannot be read": {"manifest.json": "{"},
    "drafts": {"manifest.json": "{}", ".draft.tmp.doc": "mine", ".a.0123abcd.tmp.json": "mine"},
    "names like a level's": {"sigma-1.0.safetensors": "mine", ".sigma-1.0.0123abcd.tmp.safetensors": "mine"},
    "a level's name": {LEVEL_NAME: "mine"},
    "a level's name and a length that lies": {LEVEL_NAME: "\x7f" * 8},
    "a level's name beside a manifest": {LEVEL_NAME: "mine", "manifest.json": "{}"},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_files_of_others_stay_however_tight_the_limit_is(tmp_path, what):
    folder = tmp_path / ("a" * 32)
    folder.mkdir()
    for name, text in FOREIGN[what].items():
        (folder / name).write_text(text)
    age(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KVCacheWarning)  # the limit is told
        for clip in "ab":
            kv_cache = level_bank(tmp_path, disk=2 * LEVEL_BYTES + 4000)
            with kv_cache.opened(key(clip)) as shelf:
                run(shelf, SIGMAS)
                assert kept(shelf)
    assert any(p.parent != folder for p in tmp_path.rglob("sigma-*")), "there was a limit to keep, and room for some"
    assert {p.name: p.read_text() for p in folder.iterdir()} == FOREIGN[what]


def test_a_draft_in_the_banks_own_folder_stays(tmp_path):
    with level_bank(tmp_path).opened(key()) as shelf:
        folder = shelf.directory
    (folder / ".draft.tmp.doc").write_text("mine")
    age(folder)
    with level_bank(tmp_path, disk="1MB").opened(key()):
        pass
    assert (folder / ".draft.tmp.doc").read_text() == "mine"


def test_levels_whose_manifest_is_lost_are_known_by_their_header(tmp_path):
    kv_cache = level_bank(tmp_path, disk=3 * LEVEL_BYTES + 9000)
    with kv_cache.opened(key("a")) as a:
        run(a, SIGMAS)
        (a.directory / "manifest.json").unlink()
    with level_bank(tmp_path, disk=3 * LEVEL_BYTES + 9000).opened(key("b")) as b:
        run(b, SIGMAS)
        assert len(list(b.directory.glob("sigma-*"))) == 3
    assert len(list(a.directory.glob("sigma-*"))) < 3


# -- levels that others remove meanwhile ------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before it is mapped", "after it is mapped", "before it is opened"])
def test_a_level_that_is_removed_while_it_is_opened_is_absent(tmp_path, monkeypatch, when):
    with level_bank(tmp_path).opened(key()) as shelf:
        run(shelf, [8.0, 4.0])

    def evicted(path, **options):
        gone = path.name.startswith("sigma-8")
        if gone and when == "before it is opened":
            path.unlink()
        opened = safe_open(path, **options)
        if gone:
            path.unlink()
        if gone and when == "before it is mapped":
            raise RuntimeError(f"unable to open file <{path}> in read-only mode: No such file or directory (2)")
        return opened

    monkeypatch.setattr(file_module, "safe_open", evicted)
    with level_bank(tmp_path).opened(key()) as shelf:  # and nobody is warned
        assert shelf.sigmas == (4.0,)
        monkeypatch.undo()
        assert run(shelf, [8.0, 4.0]) == [8.0]


def test_a_folder_that_is_removed_while_it_is_listed_has_no_levels(tmp_path, monkeypatch):
    real = os.scandir

    def scandir(path="."):
        for name in os.listdir(path) if Path(path).parent == tmp_path else ():
            (Path(path) / name).unlink()
        if Path(path).parent == tmp_path:
            Path(path).rmdir()
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with level_bank(tmp_path).opened(key()) as shelf:
        assert run(shelf, [8.0]) == [8.0]


def test_a_level_that_is_removed_as_soon_as_it_is_there_is_kept_in_memory(tmp_path, monkeypatch):
    real = os.replace

    def replaced(source, target):
        real(source, target)
        if Path(target).name != "manifest.json":
            Path(target).unlink()  # another process makes room

    monkeypatch.setattr(os, "replace", replaced)
    kv_cache = level_bank(tmp_path)
    edit(kv_cache)  # and nobody is warned
    assert kv_cache.used == len(SIGMAS) * LEVEL_BYTES


@pytest.mark.parametrize("limit", [None, "1MB"])
def test_a_folder_that_is_removed_before_its_file_comes_is_made_again(tmp_path, monkeypatch, limit):
    real, removed = disk_module._create, []

    def create(path, end):
        path.parent.rmdir() if not any(path.parent.iterdir()) else None
        removed.append(not path.parent.exists())
        return real(path, end)

    monkeypatch.setattr(disk_module, "_create", create)
    with level_bank(tmp_path, disk=limit).opened(key()) as shelf:
        assert run(shelf, [8.0]) == [8.0]
        assert [p.name[:8] for p in sorted(shelf.directory.iterdir())] == ["manifest", "sigma-8."]
    assert removed == [True, False]


def test_a_folder_that_goes_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    folder, real, raced = tmp_path / "kv_cache", Path.is_dir, []
    folder.mkdir()

    def is_dir(path):  # `mkdir` has found it there, and looks what it is
        if path == folder and not raced:
            raced.append(path)
            folder.rmdir()
        return real(path)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    make_folder(folder)
    assert raced == [folder]
    assert folder.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file")


# -- what cannot be written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, "1MB"])
def test_a_manifest_that_cannot_be_written_is_told_and_the_edit_goes_on(tmp_path, monkeypatch, limit):
    real = os.replace

    def full(source, target):
        if Path(target).name == "manifest.json":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(KVCacheWarning, match=r"manifest\.json cannot be written \(No space left on device\)") as told:
        folder = edit(level_bank(tmp_path, disk=limit))
    assert len(told) == 1
    assert len(list(folder.iterdir())) == len(SIGMAS)


def test_a_lock_that_cannot_be_taken_leaves_the_run_in_memory(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.warns(KVCacheWarning) as told:
        edit(level_bank(tmp_path, disk="1MB"))
    assert [str(w.message).split(" (")[0].rpartition(" ")[2] for w in told] == ["written", "written"]
    assert "manifest.json" in str(told[0].message)
    assert "in memory alone" in str(told[1].message)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size there")
@pytest.mark.parametrize("most", [100, 1500])  # neither a manifest nor a level; a manifest
def test_a_file_size_limit_leaves_the_run_in_memory(tmp_path, most):
    import resource
    import signal

    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, old[1]))
        with pytest.warns(KVCacheWarning, match="File too large"):
            edit(level_bank(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.rglob("*.tmp.*"))
