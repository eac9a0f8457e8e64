"""Measure every table of the stage anew, after its weights have changed:  python benchmarks/tables.py [--processes 2]

First `kvlock calibrate --clips 128`, whose curve goes into variance/thresholds.py. Then this, ten hours of one CPU
core or three minutes of an H200 and 45 of its cores; freed memory is kept, which saves a sixth of the time on a CPU.
benchmarks/results/tables.json says for which weights what is measured: a run that was killed goes on from there, and
other weights begin anew. At the end `report.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from release import RESULTS, ROWS, SEARCHED, report

from kvlock_sampling.tiny.model import WEIGHTS
from kvlock_sampling.utils.files import write_atomically

HERE, PARTS = Path(__file__).resolve().parent, RESULTS / "parts"
SEEDS = range(820_000, 820_000 + 27 * 50, 50)
RELEASE = ["release.py", "--edits", "300"]
OTHER = [*RELEASE, "--sampler", "dpmpp_2m", "--seed", "1", "--steps", "12", "--name", "release_dpmpp"]
JOBS: dict[str, list[str]] = (
    {
        "embedded_model": ["embedded_model.py"],
        "risk": ["risk.py", "--bfloat16"],
        "transfer": ["transfer.py"],
        "refresh": ["refresh.py"],
        "step_cache": ["step_cache.py", "--edits", "20", "--bfloat16"],
        "seeds": ["seeds.py", "--edits", "150", "--bfloat16"],
    }
    | {f"release: {row}": [*RELEASE, "--bfloat16", "--only", row] for row in ROWS}
    | {
        f"release_dpmpp: {row}": [*OTHER, "--bfloat16", "--only", row]
        for row in ("composited", "static", "static, anywhere", "release", "release at random")
    }
    | {
        f"release_search: {row}": ["release.py", "--edits", "60", "--bfloat16", "--search", "--only", row]
        for row in SEARCHED
    }
    | {
        f"seeds_release: {first}": [
            *("seeds.py", "--policy", "release", "--edits", "50", "--bfloat16", "--dry", "--first", str(first))
        ]
        for first in SEEDS
    }
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--processes", type=int, default=2, help="at a time, of one thread each")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    path, weights, lock = RESULTS / "tables.json", hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(), Lock()
    record = json.loads(path.read_text()) if path.exists() else {}
    if record.get("weights") != weights:
        record = {"weights": weights, "done": []}
        for old in (*RESULTS.glob("release*.json"), *PARTS.glob("*")):
            old.unlink()
    if set(record["done"]) >= set(JOBS) and not PARTS.exists():
        parser.exit(message="every table was measured on these weights\n")
    PARTS.mkdir(exist_ok=True)
    lost = {f"seeds_release: {first}" for first in SEEDS if not (PARTS / f"{first}.json").exists()}
    record["done"] = [name for name in record["done"] if name not in lost]

    def run(name: str) -> None:
        command = [sys.executable, *JOBS[name], *([] if name == "refresh" else ["--device", given.device])]
        alone = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
        out = subprocess.run(command, cwd=HERE, env=alone, check=True, stdout=subprocess.PIPE, text=True).stdout
        if "--dry" in command:
            write_atomically(PARTS / f"{name.split()[-1]}.json", out)
        with lock:
            record["done"].append(name)
            write_atomically(path, json.dumps(record, indent=1) + "\n")
            print(f"{len(record['done'])} of {len(JOBS)}: {name}", flush=True)

    with ThreadPoolExecutor(given.processes) as pool:
        list(pool.map(run, [name for name in JOBS if name not in record["done"]]))
    for name in ("release", "release_dpmpp", "release_search"):
        rows = json.loads((RESULTS / f"{name}.json").read_text())
        write_atomically(RESULTS / f"{name}.md", report(rows) + "\n")
    parts = [str(PARTS / f"{first}.json") for first in SEEDS]
    subprocess.run([sys.executable, "seeds.py", "--join", *parts], cwd=HERE, check=True)
    shutil.rmtree(PARTS)


if __name__ == "__main__":
    main()
