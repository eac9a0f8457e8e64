"""What a locked edit costs, in time and in quality, as tables for docs/measured.md and docs/cost.md."""

from __future__ import annotations

import re
from pathlib import Path

from report_grid import table

from kvlock_sampling.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
MEAN, MOST = "mean change / the lock's", "max change / the lock's"
WAYS = {
    "plain": "plain guidance, no lock",
    "procedure": "the published procedure: source pass, all K/V kept, two branches",
    "lockstep": "the source in lockstep",
    "foreground": "the foreground alone",
    "foreground, bank every 3": "the same, with a bank asked anew every third evaluation",
    "foreground, filled bank": "the same, with a bank that an earlier edit filled",
}


def _cell(row: dict) -> str:
    return f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def speed(record: dict) -> str:
    parts = []
    for model in dict.fromkeys(r["model"] for r in record["rows"]):
        mine = [r for r in record["rows"] if r["model"] == model]
        shares = sorted({r["share"] for r in mine if r["share"] is not None})
        body = []
        for way, said in WAYS.items():
            own = [r for r in mine if r["way"] == way]
            anywhere = own[0]["share"] is None
            cells = [_cell(own[0])] * len(shares) if anywhere else [_cell(r) for r in own]
            memory = max(r["memory_ratio"] for r in own)
            body.append([said, *cells, f"{memory:.2f}"])
        base = next(r for r in mine if r["way"] == "plain")
        parts.append(
            f"{model}; plain guidance takes {base['seconds']:.3g} s per evaluation.\n\n"
            + table(["way", *(f"{s:.0%} edited" for s in shares), "memory"], body)
        )
    about = record["about"]
    where = f"{about['device']}, {about['dtype']}, {about['threads']} threads, torch {about['torch']}"
    return (
        f"Time per evaluation over that of plain guidance, median of interleaved rounds (least to most), on {where}. "
        "Memory is the peak of what is alive beyond weights and inputs, over plain guidance's; the largest of the row, "
        "what the bank holds included.\n\n" + "\n\n".join(parts)
    )


def quality(rows: list[dict]) -> str:
    body = []
    for r in rows:
        to_full = f"{r['to full lock, dB']:+.2f} ± {r['its error']:.2f}" if "to full lock, dB" in r else ""
        change = f"{r[MEAN]:.1%}" if MEAN in r else ""
        most = f"{r[MOST]:.1%}" if MOST in r else ""
        gain = f"{r['gain']:+.2f} ± {r['error']:.2f}"
        body.append(
            [r["way"], gain, to_full, change, most, f"{r['colour']:.0%}", f"{r['shape']:.0%}", f"{r['passes']}"]
        )
    header = ["way", "gain, dB", "to full lock, dB", "mean change", "most", "colour", "shape", "passes"]
    return table(header, body)


def _put(text: str, mark: str, content: str) -> str:
    """The text with what stands between a mark and its end replaced."""
    pattern = re.compile(rf"<!-- {mark} -->(?:.*?<!-- /{mark} -->)?", re.DOTALL)
    assert pattern.search(text), f"docs/cost.md has no mark {mark}"
    return pattern.sub(lambda _: f"<!-- {mark} -->\n\n{content}\n\n<!-- /{mark} -->", text, count=1)


def page(record: dict, rows: list[dict]) -> None:
    """Write the figures that docs/cost.md shows."""
    large = [r for r in record["rows"] if r["model"] == record["rows"][0]["model"]]
    quarter = [next(r for r in large if r["way"] == w and r["share"] in (None, 0.25)) for w in WAYS]
    short = table(
        ["way", "time", "memory"],
        [[WAYS[r["way"]], f"{r['ratio']:.2f}", f"{r['memory_ratio']:.2f}"] for r in quarter],
    )
    about = f"At {large[0]['model']}, a quarter of the tokens edited, over plain guidance:"
    path = ROOT / "docs/cost.md"
    text = _put(path.read_text(), "speed", f"{about}\n\n{short}\n\n![Time over the edited share](images/speed.png)")
    write_atomically(path, _put(text, "quality", quality(rows)))
