"""The levels of one key on disk: DIR/<fingerprint>/, so that any number of clips and models share one DIR.

    manifest.json                            what the K/V belong to, for people
    sigma-1.2500000000000000e+00.safetensors one whole level each

What is found there:
- a truncated, damaged or foreign level file is ignored with a `KVCacheWarning`, and written again when it is needed;
- temporaries of a killed run are ignored, and removed; without file locks once they are an hour old, as a younger one
  may be being written;
- a manifest that cannot be written is a `KVCacheWarning`: no level needs it;
- a manifest that names another key than the folder does is a `KVCacheError`: somebody renamed the folder;
- two processes at once are no harm: files get their names whole, and both would write the same bytes.
"""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from .clock import same
from .disk import Disk, NoRoom, Reader
from .errors import KVCacheError, KVCacheWarning
from .file import VERSION, BadFile, Kinds, LevelFile, Pair, file_size, name_of, write_level
from .fingerprint import KVCacheKey
from .own import MANIFEST, names_in


class RemovedAtOnce(OSError):  # noqa: N818 - a signal: no fault, the level is only not on disk
    """Others removed the level before it was opened."""


class Folder:
    """The part of a KV cache's directory that belongs to one key and format."""

    def __init__(self, disk: Disk, key: KVCacheKey, format: str) -> None:
        self.disk, self.key = disk, key
        self.fingerprint = key.fingerprint(format, f"version {VERSION}")
        self.path = disk.root / self.fingerprint[:32]
        self._bad: list[Path] = []
        self._check_manifest(format)
        disk.sweep(self.path)
        disk.trim(self.path)

    def _check_manifest(self, format: str) -> None:
        file = self.path / MANIFEST
        about = {"version": VERSION, "fingerprint": self.fingerprint, "format": format, "key": asdict(self.key)}
        damage = ""
        try:
            found = json.loads(file.read_text()).get("fingerprint")
        except FileNotFoundError:
            found = None
        except (ValueError, AttributeError, OSError) as error:
            found, damage = None, f"is damaged ({error}) and is written again"
        if found is None:
            text = json.dumps(about, indent=1).encode()
            try:
                # Where there is no room for it there is none for a level either, and that is told.
                with suppress(NoRoom), self.disk.writing(file, len(text)) as out:
                    out.write(text)
            except OSError as error:  # for people alone: the edit goes on
                damage = f"cannot be written ({error.strerror or error}); levels are kept without it where that can be"
            if damage:
                warnings.warn(f"{file} {damage}.", KVCacheWarning, stacklevel=6)
        elif found != self.fingerprint:
            raise KVCacheError(
                f"{self.path} holds the KV cache of another model, clip or setting ({str(found)[:32]}): was it renamed?\n"
                "  Give it back its name, delete it, or pass another directory: KVCache(directory=...)."
            )

    def levels(self) -> list[LevelFile]:
        """Every readable level, from high to low noise. What cannot be read is warned of and left out."""
        found: list[LevelFile] = []
        # Not by `glob`, which fails where the folder goes meanwhile.
        names = (n for n in names_in(self.path) if n.startswith("sigma-") and n.endswith(".safetensors"))
        for path in [self.path / name for name in sorted(names)]:
            try:
                found.append(LevelFile(path, self.fingerprint, self.key.layers))
            except BadFile as bad:
                if path.exists():  # else another process has just made room
                    self.reject(path, str(bad))
        return sorted(found, key=lambda level: -level.sigma)

    def reject(self, path: Path, why: str) -> None:
        """Warn of a file that is no level of this KV cache; it goes when its level is written again."""
        self._bad.append(path)
        warnings.warn(
            f"{path} is ignored: {why}. The source pass at this noise level runs again. Delete the file to be rid of "
            "this warning.",
            KVCacheWarning,
            stacklevel=6,
        )

    def write(
        self,
        sigma: float,
        kinds: Mapping[str, Kinds],
        pairs: Iterable[tuple[str, Pair]],
        reader: Reader,
        *,
        pressing: bool = False,
    ) -> LevelFile:
        """Write a level and open it; see `Disk.writing` for what goes to make room.

        Raises:
            NoRoom: the limit leaves none. `pairs` were not asked for.
            RemovedAtOnce: others made room with it.
        OSError: the disk has no room, or gives no permission.
        """
        path = self.path / name_of(sigma)
        for bad in [b for b in self._bad if _stands_for(b, sigma)]:
            self._bad.remove(bad)
            bad.unlink(missing_ok=True)
        reader.use(path)  # beforehand, so that nobody takes it away the moment it is there
        size = file_size(self.fingerprint, sigma, kinds)
        with self.disk.writing(path, size, reader, pressing=pressing) as out:
            write_level(out, self.fingerprint, sigma, kinds, pairs)
        try:
            return LevelFile(path, self.fingerprint, self.key.layers, sound=True)
        except BadFile as bad:
            raise RemovedAtOnce(errno.ENOENT, f"the level was removed at once: {bad}") from bad


def _stands_for(path: Path, sigma: float) -> bool:
    try:
        return same(float(path.stem.removeprefix("sigma-")), sigma)
    except ValueError:
        return False
