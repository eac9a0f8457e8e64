"""The levels of one key on disk: DIR/<fingerprint>/, so that any number of clips and models share one DIR.

    manifest.json                            what the K/V belong to, for people
    sigma-1.2500000000000000e+00.safetensors one whole level each

What is found there:
- a truncated, damaged or foreign level file is ignored with a `BankWarning`, and written again when it is needed;
- temporaries of a killed run are ignored, and removed once they are an hour old (a younger one may be being written);
- a manifest that names another key than the folder does is a `BankError`: somebody renamed the folder;
- two processes at once are no harm: files get their names whole, and both would write the same bytes.
"""

from __future__ import annotations

import json
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from ..files import write_atomically
from .clock import same
from .errors import BankError, BankWarning
from .file import VERSION, BadFile, Kinds, LevelFile, Pair, name_of, write_level
from .key import BankKey

STALE = 3600.0
"""Seconds after which a temporary file belongs to nobody."""


class Folder:
    """The part of a bank's directory that belongs to one key and format."""

    def __init__(self, root: Path, key: BankKey, format: str) -> None:
        self.key = key
        self.fingerprint = key.fingerprint(format, f"version {VERSION}")
        self.path = root / self.fingerprint[:32]
        self._bad: list[Path] = []
        self._check_manifest(format)
        self._sweep()

    def _check_manifest(self, format: str) -> None:
        file = self.path / "manifest.json"
        about = {"version": VERSION, "fingerprint": self.fingerprint, "format": format, "key": asdict(self.key)}
        try:
            found = json.loads(file.read_text()).get("fingerprint")
        except FileNotFoundError:
            found = None
        except (ValueError, AttributeError, OSError) as error:
            warnings.warn(f"{file} is damaged ({error}) and is written again.", BankWarning, stacklevel=6)
            found = None
        if found is None:
            write_atomically(file, json.dumps(about, indent=1))
        elif found != self.fingerprint:
            raise BankError(
                f"{self.path} holds the bank of another model, clip or setting ({str(found)[:32]}): was it renamed?\n"
                "  Give it back its name, delete it, or pass another directory: Bank(directory=...)."
            )

    def _sweep(self) -> None:
        for temporary in self.path.glob(".*.tmp.*"):
            try:
                if time.time() - temporary.stat().st_mtime > STALE:
                    temporary.unlink(missing_ok=True)
            except OSError:
                continue  # another process was faster

    def levels(self) -> list[LevelFile]:
        """Every readable level, from high to low noise. What cannot be read is warned of and left out."""
        found: list[LevelFile] = []
        for path in sorted(self.path.glob("sigma-*.safetensors")):
            try:
                found.append(LevelFile(path, self.fingerprint, self.key.sites))
            except BadFile as bad:
                self.reject(path, str(bad))
        return sorted(found, key=lambda level: -level.sigma)

    def reject(self, path: Path, why: str) -> None:
        """Warn of a file that is no level of this bank; it goes when its level is written again."""
        self._bad.append(path)
        warnings.warn(
            f"{path} is ignored: {why}. The source pass at this noise level runs again. Delete the file to be rid of "
            "this warning.",
            BankWarning,
            stacklevel=6,
        )

    def write(self, sigma: float, kinds: Mapping[str, Kinds], pairs: Iterable[tuple[str, Pair]]) -> LevelFile:
        """Write a level and open it. Raises OSError where the disk has no room or no permission."""
        path = self.path / name_of(sigma)
        write_level(path, self.fingerprint, sigma, kinds, pairs)
        for bad in [b for b in self._bad if _stands_for(b, sigma)]:
            self._bad.remove(bad)
            if bad != path:
                bad.unlink(missing_ok=True)
        return LevelFile(path, self.fingerprint, self.key.sites, sound=True)


def _stands_for(path: Path, sigma: float) -> bool:
    try:
        return same(float(path.stem.removeprefix("sigma-")), sigma)
    except ValueError:
        return False


def check_directory(directory: Path) -> None:
    """Make the directory and write to it once: better found now than after the first source pass.

    Raises:
        BankError: it cannot be made or written to.
    """
    probe = directory / f".probe.{uuid.uuid4().hex[:8]}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise BankError(
            f"directory={str(directory)!r} cannot be written to: {error.strerror or error}.\n"
            "  Pass a folder of your own, e.g. Bank(directory='kv-bank'), or none to keep K/V in memory."
        ) from error
