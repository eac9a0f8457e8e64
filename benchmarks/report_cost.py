"""What a locked edit costs, in time and in quality, as tables for benchmarks/measured.md and docs/cost.md."""

from __future__ import annotations

import re
from pathlib import Path

from report_grid import table

from kvlock_sampling.utils.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
MEAN, MOST = "mean change / the lock's", "max change / the lock's"
WAYS = {
    "plain": "plain guidance, no lock",
    "one more row": "plain guidance with one more row that does nothing",
    "procedure": "the published procedure: source pass, all K/V kept, two branches",
    "lockstep": "the source in lockstep",
    "foreground": "lock 1, edited tokens only",
    "foreground, KV cache every 3": "the same, with a KV cache and a source pass at every third evaluation",
    "foreground, filled KV cache": "the same, with a KV cache that an earlier edit filled",
}


def _cell(row: dict) -> str:
    return f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def _models(record: dict) -> dict[str, list[dict]]:
    """Rows by what they were measured on."""
    models: dict[str, list[dict]] = {}
    for row in record["rows"]:
        depth = "" if row["layers"] is None else f", {row['layers']} layers"
        models.setdefault(f"{row['model']}{depth}", []).append(row)
    return models


def speed(record: dict) -> str:
    parts = []
    for model, mine in _models(record).items():
        shares = sorted({r["share"] for r in mine if r["share"] is not None})
        body = []
        for way, said in WAYS.items():
            own = [r for r in mine if r["way"] == way]
            if not own:
                continue
            anywhere = own[0]["share"] is None
            cells = [_cell(own[0])] * len(shares) if anywhere else [_cell(r) for r in own]
            memory = max(r["memory_ratio"] for r in own)
            body.append([said, *cells, f"{memory:.2f}"])
        base = next(r for r in mine if r["way"] == "plain")
        how = " Extrapolated from the two depths above, round by round." if base["computed"] else ""
        parts.append(
            f"{model}; plain guidance takes {base['seconds']:.3g} s per evaluation.{how}\n\n"
            + table(["way", *(f"{s:.0%} edited" for s in shares), "memory"], body)
        )
    about = record["about"]
    where = f"{about['device']}, {about['dtype']}, {about['threads']} threads, torch {about['torch']}"
    return (
        f"Time per evaluation over that of plain guidance, median of interleaved rounds (least to most), on {where}. "
        "Memory is the peak beyond weights and inputs, with the KV cache, over that of plain guidance; the largest of "
        "the row.\n\n" + "\n\n".join(parts)
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


def _ends(record: dict) -> tuple[int, int]:
    """The fewest and the most layers of the network of which there are several depths."""
    depths = [row["layers"] for row in record["rows"] if row["layers"] is not None]
    return min(depths), max(depths)


def where(record: dict) -> str:
    kinds = [name for name in record["rows"][0] if name not in ("way", "seconds")]
    cached = "with a KV cache and a source pass at every third evaluation"
    named = WAYS | {"foreground, KV cache every 3": f"lock 1, edited tokens only, {cached}"}
    body = [[named[r["way"]], *(f"{r[name]:.1%}" for name in kinds)] for r in record["rows"]]
    about = f"{record['model']}, a quarter of the tokens edited, {record['threads']} threads, by torch's profiler:"
    return f"{about}\n\n{table(['way', *kinds], body)}"


def gpu(record: dict, stored: dict) -> str:
    """The table of a whole network on a GPU, and what storing and reading a level takes there."""
    rows, about = record["rows"], record["about"]
    shares = sorted({r["share"] for r in rows if r["share"] is not None})
    body = []
    for way, said in WAYS.items():
        own = [r for r in rows if r["way"] == way]
        cells = [f"{r['ratio']:.2f}" for r in (own * len(shares) if own[0]["share"] is None else own)]
        body.append([said, *cells, f"{max(r['memory_ratio'] for r in own):.2f}"])
    plain = next(r for r in rows if r["way"] == "plain")
    name = f"{plain['model']}, all {plain['layers']} layers, {about['dtype']}, {about['machine']}"
    level, unchanged, passing = stored["int8"], stored["unchanged"], stored["seconds of a source pass"]
    refreshed = min(r["seconds"] for r in rows if r["way"] == "foreground, KV cache every 3")
    refreshed -= (level["seconds"] - unchanged["seconds"]) / 3 + level["seconds to read it"]
    return (
        f"{name}. Time per evaluation over that of plain guidance ({plain['seconds']:.2f} s), median of rounds that "
        "take turns, and the most memory beyond weights and inputs:\n\n"
        + table(["way", *(f"{share:.0%} edited" for share in shares), "memory"], body)
        + f"\n\nA level of the KV cache is {level['bytes of a level'] / 1e9:.1f} GB in 8 bits at a quarter edited. "
        f"Storing it takes {level['of a source pass']:.1%} of the source pass that made it, reading it "
        f"{level['seconds to read it'] / passing:.1%}. Kept unchanged (`format=None`) it is "
        f"{unchanged['bytes of a level'] / 1e9:.1f} GB, and these times are {unchanged['of a source pass']:.1%} and "
        f"{unchanged['seconds to read it'] / passing:.1%}. A cache with a source pass at every third evaluation "
        f"would then take {refreshed / plain['seconds']:.2f}, by count: every third stores a level, and each reads one."
    )


def page(record: dict, larger: dict, on_gpu: dict, stored: dict, profile: dict) -> None:
    """Write the figures that docs/cost.md shows."""
    few, deep = (rows for model, rows in _models(record).items() if rows[0]["layers"] in _ends(record))
    quarter = [[next(r for r in m if r["way"] == w and r["share"] in (None, 0.25)) for w in WAYS] for m in (few, deep)]
    whole = {r["way"]: f"{r['ratio']:.2f}" for r in larger["rows"]}
    few_tokens, many_tokens = (found[0]["model"].split(", ")[1] for found in (few, larger["rows"]))
    short = table(
        ["way", *(f"{n[0]['layers']} layers" for n in (few, deep)), f"{deep[0]['layers']}, {many_tokens}", "memory"],
        [
            [WAYS[way], f"{a['ratio']:.2f}", f"{b['ratio']:.2f}", whole.get(way, ""), f"{b['memory_ratio']:.2f}"]
            for way, a, b in zip(WAYS, *quarter, strict=True)
        ],
    )
    about = (
        f"Wan-1.3B geometry, a quarter of the tokens edited, time per evaluation over plain guidance. {few_tokens}: "
        f"{few[0]['layers']} layers are measured; {deep[0]['layers']}, the whole network, extrapolated on the line "
        f"through two depths, and memory with them. {many_tokens}: the whole network is measured, in one round:"
    )
    path = ROOT / "docs/cost.md"
    text = _put(path.read_text(), "gpu", gpu(on_gpu, stored))
    text = _put(text, "speed", f"{about}\n\n{short}\n\n![Time over the edited fraction](images/speed.png)")
    write_atomically(path, _put(text, "where", where(profile)))
