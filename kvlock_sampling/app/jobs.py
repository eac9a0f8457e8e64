"""Jobs of a batch: the rows of a CSV file, checked, with a fingerprint of everything that their outputs depend on."""

import csv
import functools
import hashlib
import io
import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..masks.fitted import as_transition
from ..presets import load_preset, to_toml
from ..samplers import get
from ..tiny.model import WEIGHTS
from ..types import KVLockError
from ..utils.fields import check_number, check_seed
from ..utils.tables import nearest
from ..video.media import STILLS, files_of
from ..video.write import check_suffix
from .edit import LEAST_STRENGTH, MOST_STEPS

NEEDED = ("clip", "mask", "prompt")
NUMBERS: dict[str, type[int] | type[float]] = {"seed": int, "steps": int, "cfg_scale": float, "strength": float}
LIMITS: dict[str, dict[str, Any]] = {
    "steps": {"at_least": 1, "at_most": MOST_STEPS, "whole": True},
    "strength": {"at_least": LEAST_STRENGTH, "at_most": 1.0},
}
COLUMNS = (*NEEDED, "source_prompt", "policy", *NUMBERS, "sampler", "name")
EXAMPLE = "  clip,mask,prompt\n  clip.mp4,mask.png,a red kite"
LONGEST = 200  # bytes of an output's name: temporary names are longer, and file systems take 255


@dataclass(frozen=True)
class Job:
    """A row of the file.

    Attributes:
        row: Its number, from 1; empty lines do not count.
        output: The file to write.
        options: What to edit and how; paths are absolute.
        fingerprint: Of the options and of the contents of the files.
        policy: The text of the policy, as the fingerprint has it: its file may change before the row's turn.
        error: Why the row cannot be run; "" if nothing is known against it.
    """

    row: int
    output: Path
    options: Mapping[str, Any]
    fingerprint: str = ""
    policy: str = ""
    error: str = ""

    @property
    def record(self) -> Path:
        """The file that says how the output was made."""
        return self.output.with_name(f"{self.output.name}.json")

    @property
    def claim(self) -> Path:
        """A hidden file from before the output is written until its record is: the output is of this batch."""
        return self.output.with_name(f".{self.output.stem}.00000000.tmp{self.output.suffix}")


def read_jobs(path: Path, out: Path, defaults: Mapping[str, Any], model: Mapping[str, Any]) -> list[Job]:
    """Read the jobs of a CSV file.

    Args:
        path: The file: UTF-8, first the names of its columns, some of `COLUMNS`. Its paths are relative to its folder.
        out: The folder of the outputs.
        defaults: The options for empty cells, and those that have no column.
        model: The arguments of `open_model`.

    Raises:
        KVLockError: The file is no such table, two rows write one file, or a row reads what a row writes.
    """
    header, rows = _table(path)
    content_of = functools.cache(digest)  # A file is read once, whatever the number of its rows.
    shared = {key: value for key, value in model.items() if key not in ("model", "offload")}
    own = model["model"] == "tiny"
    shared["weights"] = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() if own else _weights(Path(model["model"]))
    jobs = []
    for row, cells in enumerate(rows, 1):
        given = {name: cell for name, cell in zip(header, cells, strict=False) if cell}
        stem = Path(given.get("clip", "")).stem[:40]
        stem = "".join(letter if letter.isprintable() else "_" for letter in stem)
        job = Job(row, out / f"{row:03}-{stem}.mp4", given)
        try:
            job = replace(job, output=out / _checked_name(given.pop("name", job.output.name)))
            if len(cells) > len(header):
                raise KVLockError(f"{len(cells)} cells for {len(header)} columns. Put a text with commas in quotes.")
            job = replace(job, options={**defaults, **_options(given, path.parent.absolute())})
            get(job.options["sampler"])
            content = shared | dict(job.options) | {name: content_of(job.options[name]) for name in ("clip", "mask")}
            content["policy"] = to_toml(load_preset(job.options["policy"]))
            content["kv_cache"] = job.options["kv_cache"] is not None
            text = json.dumps(content, sort_keys=True)
            found = hashlib.sha256(text.encode()).hexdigest()
            jobs.append(replace(job, fingerprint=found, policy=content["policy"]))
        except (KVLockError, OSError, ValueError) as error:
            jobs.append(replace(job, error=message(error)))
    _check_outputs(jobs)
    return jobs


def digest(path: str | os.PathLike[str]) -> str:
    """A digest of the contents of a file, or of the images in a folder. Raises VideoError if there are none."""
    path, found = Path(path), hashlib.sha256()
    for file in sorted(files_of(path) or [path]):
        with open(file, "rb") as opened:
            name = file.name if path.is_dir() else file.suffix
            found.update(f"{len(name)} {name}".encode() + hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()


def message(error: BaseException) -> str:
    """What an error says: with advice if memory ran out, with its class if the error is unexpected."""
    if isinstance(error, torch.OutOfMemoryError):
        less = "Use less at a time: --offload model or group, --dtype bfloat16, fewer --frames, a smaller --size."
        return f"out of memory: {str(error).splitlines()[0]}\n  {less}"
    return str(error) if isinstance(error, KVLockError | OSError) else f"{type(error).__name__}: {error}"


def policy_file(policy: str, folder: Path) -> str:
    """The absolute path of a policy's file, given relative to a folder. The name of a preset stays as it is."""
    is_file = policy.endswith(".toml") or os.sep in policy
    return str(folder.absolute() / Path(os.path.expanduser(policy))) if is_file else policy


def _table(path: Path) -> tuple[list[str], list[list[str]]]:
    """The names of the columns, and the cells of each row that has any."""
    try:
        text = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
        first = text.getvalue().lstrip().partition("\n")[0]
        options: Any = {"strict": True, "skipinitialspace": True}
        options["delimiter"] = ";" if ";" in first and "," not in first else ","  # where a comma is in numbers
        lines = [[cell.strip() for cell in line] for line in csv.reader(text, **options)]
    except OSError as error:
        raise KVLockError(f"cannot read the table {str(path)!r}: {error.strerror}; expected:\n{EXAMPLE}") from None
    except UnicodeDecodeError as error:
        raise KVLockError(f"{str(path)!r} is not UTF-8: {error}. Save it as CSV UTF-8.") from None
    except csv.Error as error:
        raise KVLockError(f"{str(path)!r} is not CSV: {error}. Write a quote within quotes twice.") from None
    header, *rows = [line for line in lines if any(line)] or [[]]
    names = [name.lower() for name in header]
    while names and not names[-1]:  # Spreadsheets write empty columns at the end.
        names.pop()
    for name in names:
        if name not in COLUMNS:
            raise KVLockError(f"{str(path)!r} has the column {name!r}; {nearest(name, COLUMNS)}. Commas separate them.")
        if names.count(name) > 1:
            raise KVLockError(f"{str(path)!r} has two columns {name!r}; expected one.")
    if missing := [name for name in NEEDED if name not in names]:
        raise KVLockError(f"{str(path)!r} has no column {missing[0]!r}; expected at least these:\n{EXAMPLE}")
    if not rows:
        raise KVLockError(f"{str(path)!r} has no rows; expected one edit a row:\n{EXAMPLE}")
    return names, [row[: len(names)] if not any(row[len(names) :]) else row for row in rows]


def _checked_name(name: str) -> str:
    name = name if Path(name).suffix else f"{name}.mp4"
    plain = Path(name).name == name and not any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in name)
    if not plain or name.startswith(".") or len(name.encode()) > LONGEST:
        raise KVLockError(f"name={name!r}; expected the name of a file, without folders, e.g. kite.mp4.")
    check_suffix(name)
    return name


def _options(given: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """The cells of a row as options of an edit."""
    if missing := [name for name in NEEDED if name not in given]:
        raise KVLockError(f"{missing[0]} is empty; expected {', '.join(NEEDED)} in every row.")
    options: dict[str, Any] = dict(given)
    for name in NUMBERS.keys() & given.keys():
        try:
            options[name] = NUMBERS[name](given[name].replace(",", "."))
        except ValueError:
            whole = "a whole number" if NUMBERS[name] is int else "a number"
            raise KVLockError(f"{name}={given[name]!r}; expected {whole}, e.g. {NUMBERS[name](1)}.") from None
        check_number(name, options[name], KVLockError, **LIMITS.get(name, {}))
    paths = {name: str(folder / Path(os.path.expanduser(given[name]))) for name in ("clip", "mask")}
    return options | paths | ({"policy": policy_file(given["policy"], folder)} if "policy" in given else {})


def _check_outputs(jobs: Sequence[Job]) -> None:
    writes: dict[str, Job] = {}
    for job in jobs:
        first = writes.setdefault(_same(job.output), job)
        if first is not job:
            raise KVLockError(f"rows {first.row} and {job.row} both write {job.output.name!r}; give each its own name.")
    for job in jobs:
        if job.output.suffix.lower() in STILLS:  # a folder of images would grow by it
            writes[_same(job.output.parent)] = job
    for job in jobs:
        for read in (job.options.get("clip", ""), job.options.get("mask", "")):
            if os.path.isabs(read) and "\0" not in read and (writer := writes.get(_same(read))) is not None:
                raise KVLockError(
                    f"row {job.row} reads {read!r}, which row {writer.row} writes to. Give another --out."
                )


def check_outputs(writes: Sequence[Path], reads: Sequence[Path]) -> None:
    """Raise KVLockError if a file to write is also read, lies among images that are read, or is named twice."""
    known = {_same(path) for path in reads}
    for path in writes:
        if _same(path) in known:
            raise KVLockError(f"{path} is an input or would be written twice. Name another file.")
        if _same(path.parent) in known and path.suffix.lower() in STILLS:
            raise KVLockError(f"{path} would become one of the images in {path.parent}, which is read. Name another.")
        known.add(_same(path))


def check_run(
    sampler: str,
    policy: str,
    seed: int,
    *,
    prompt: str = "all",
    cfg_scale: float | None = None,
    transition: Any = None,
) -> None:
    """Check what can be checked before a model or a clip is opened; raise KVLockError."""
    get(sampler), load_preset(policy), check_seed(seed, KVLockError), as_transition(transition)
    check_number("cfg_scale", 1.0 if cfg_scale is None else cfg_scale, KVLockError)
    if not prompt.strip():
        raise KVLockError("--prompt is empty; expected what the masked region should show, e.g. 'a red ball'.")


def _same(path: str | Path) -> str:
    """A text that two paths of one file share; some file systems ignore case."""
    return os.path.realpath(path).casefold()


def _weights(path: Path) -> list[Any]:
    """The names, sizes and times of a model's files, which tell a changed one without reading it. Linked folders, as
    of parts that models share, count; hidden files do not, because downloads and version control write them anew.
    """
    files, met = [path] if path.is_file() else [], {os.path.realpath(path)}
    for folder, folders, names in os.walk(path, followlinks=True):
        real = {n: os.path.realpath(Path(folder, n)) for n in sorted(folders) if n[0] != "."}
        folders[:] = [n for n, place in real.items() if place not in met]  # links may go round
        met.update(real.values())
        files += [file for n in names if n[0] != "." and (file := Path(folder, n)).is_file()]
    return [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
