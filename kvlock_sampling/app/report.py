"""What became of a batch: a row for each job, as `results.csv` and as `report.html`, a page without scripts."""

import csv
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..types import KVLockError
from ..utils.files import write_atomically
from .jobs import COLUMNS, Job

FIGURES = {"nfe": "model passes", "seconds": "seconds", "background_psnr": "background PSNR (dB)"}
HEAD = '<!doctype html><html lang="en"><meta charset="utf-8"><title>'
STYLE = """body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; color-scheme: light dark }
table { border-collapse: collapse } td, th { padding: .4em .8em; text-align: left; vertical-align: top }
tr { border-bottom: 1px solid #8886 } td { white-space: pre-wrap; overflow-wrap: anywhere }
img { height: 128px; image-rendering: pixelated } .failed { color: #c33 }"""


def write_report(out: Path, jobs: Sequence[Job], records: Sequence[Mapping[str, Any]]) -> None:
    """Write `results.csv` and `report.html` into a folder, from the jobs and from what became of each."""
    rows = [_row(job, record) for job, record in zip(jobs, records, strict=True)]
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomically(out / "results.csv", text.getvalue())
    write_atomically(out / "report.html", _page(rows, records))


def check_report(out: Path) -> None:
    """Raise KVLockError if the folder has a file of another kind where a report would be written."""
    for name, begins in (("results.csv", b"row,status,output,"), ("report.html", HEAD.encode())):
        with suppress(FileNotFoundError, NotADirectoryError), open(path := out / name, "rb") as file:
            # Without what spreadsheets add.
            found = file.read(99).removeprefix(b"\xef\xbb\xbf").replace(b'"', b"").replace(b";", b",")
            if found and not found.startswith(begins.replace(b'"', b"")):
                raise KVLockError(f"{str(path)!r} is no report of a batch and would be replaced: move it elsewhere.")


def told(record: Mapping[str, Any]) -> list[str]:
    """The error of a job; else what was left out of the clip and of the output, and the warnings."""
    return [record["error"]] if "error" in record else [*record.get("lost", ()), *record.get("warnings", ())]


def _row(job: Job, record: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: job.options.get(name) for name in COLUMNS if name != "name"}
    figures = {name: record.get(name) for name in FIGURES} | {"message": "\n".join(told(record))}
    return {"row": job.row, "status": record["status"], "output": job.output.name} | given | figures


def _page(rows: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> str:
    counts = {kind: sum(row["status"] == kind for row in rows) for kind in ("done", "kept", "failed")}
    title = f"{len(rows)} edits: {', '.join(f'{count} {kind}' for kind, count in counts.items())}"
    lines = []
    for row, record in zip(rows, records, strict=True):
        name = f'<a href="{quote(row["output"])}">{escape(row["output"])}</a>'
        image = f'<br><img alt="" src="data:image/png;base64,{escape(record.get("still", ""))}">'
        asked = "\n".join(f"{key}: {row[key]}" for key in COLUMNS if row.get(key) is not None and key != "prompt")
        cells = [
            str(row["row"]),
            f'<span class="{row["status"]}">{row["status"]}</span>',
            name + image if "still" in record else escape(row["output"]),
            f"<b>{escape(row['prompt'] or '')}</b>\n<small>{escape(asked)}</small>",
            *(escape("" if row[figure] is None else str(row[figure])) for figure in FIGURES),
            escape(row["message"]),
        ]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = "".join(f"<th>{head}</th>" for head in ("row", "", "source and result", "edit", *FIGURES.values(), ""))
    body = "\n".join(lines)
    return (
        f"{HEAD}{title}</title><style>{STYLE}</style><h1>{title}</h1><table><tr>{heads}</tr>\n{body}\n</table></html>\n"
    )
