"""What storing a level of the KV cache costs beside the pass that made it.  python benchmarks/storing.py [--layers 4]

Wan-1.3B's layer geometry with random weights, a quarter of the tokens edited. Storing is timed apart: quantising the
keys and values of the background and putting them where they are kept; copies to the host and to disk go on beside the
run. Beside it stand the bytes of a level, the operations that torch counts, the floor: those bytes, read and written
once, at the bandwidth of a plain copy, and the time that reading a level takes.
Writes benchmarks/results/storing.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from speed import FULL, wan
from torch.profiler import ProfilerActivity, profile

import kvlock_sampling as kv
from kvlock_sampling.kv_cache import KVCache, cache
from kvlock_sampling.kv_cache.cache import CacheEntry
from kvlock_sampling.utils.files import write_atomically

PLACES = ("int8", "unchanged", "int8, to the host", "int8, to disk")
RESULTS = Path(__file__).resolve().parent / "results"


def seconds(call: Callable[[], object], device: torch.device, rounds: int, *, warm: bool = True) -> float:
    def once() -> float:
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    if warm:
        once()
    return statistics.median(once() for _ in range(rounds))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--latents", type=int, nargs=3, default=[5, 16, 24])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", nargs="+", default=PLACES, choices=PLACES)
    parser.add_argument("--name", default="storing", help="of the results' file")
    parser.add_argument("--dry", action="store_true", help="print only; write nothing")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    subject = wan(given.layers, tuple(given.latents), 1, device, getattr(torch, given.dtype))
    lock = kv.KVLock(
        subject.model, source=subject.source, mask=subject.mask(0.25), policy=FULL, kv_cache=KVCache(budget=None)
    )
    settings, layers = lock.settings, lock.settings.layers
    selection, _ = settings.mask.selection(subject.source, layers.patch, None)
    heads, width = 12, 128
    shape = 1, heads, len(selection.stored), width
    g = torch.Generator(device).manual_seed(0)
    made = [torch.randn(shape, generator=g, device=device, dtype=getattr(torch, given.dtype)) for _ in range(2)]
    keys = {layer.name: (made[0], made[1]) for layer in layers.layers}
    record = {"model": subject.name, "layers": given.layers, "device": str(device), "dtype": given.dtype}
    source = {"cond": subject.cfg["cond"]}
    sigma = torch.tensor([subject.sigmas[0]], device=device)
    passing = seconds(lambda: subject.model(subject.x, sigma, **source), device, given.rounds)
    with tempfile.TemporaryDirectory() as folder:
        for title in PLACES:
            format, kept_apart = None if title == "unchanged" else "int8", "," in title
            directory = folder if title.endswith("disk") else None
            if title not in given.only or (title.endswith("host") and device.type == "cpu"):
                continue
            with mock.patch.object(cache, "room_on", lambda *_, kept_apart=kept_apart: not kept_apart):
                entry = CacheEntry(KVCache(directory, budget=None, format=format), "x", list(keys), device)
                entry.put(1.0, keys)
                entry.settle()
                storing, settled = [], []
                for _ in range(given.rounds):
                    storing.append(seconds(lambda entry=entry: entry.put(1.0, keys), device, 1, warm=False))
                    settled.append(storing[-1] + seconds(entry.settle, device, 1, warm=False))
                kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
                with profile(activities=kinds) as seen:
                    entry.put(1.0, keys)
                entry.settle()
                level = entry.lookup(1.0)
                reading = seconds(lambda level=level: [level[layer] for layer in level], device, given.rounds)
            operations = sum(e.count for e in seen.key_averages() if e.key.startswith("aten::"))
            size = entry._cache.used
            plain = torch.empty(size // 4, device=device)
            floor = seconds(lambda plain=plain: plain.clone(), device, given.rounds)
            held = statistics.median(storing)
            record[title] = {
                "bytes of a level": size,
                "operations of a level": operations,
                "of a source pass": round(held / passing, 4),
                "of the floor": round(held / floor, 2),
                "seconds": held,
                "seconds until it is kept": statistics.median(settled),
                "seconds to read it": reading,
            }
            print(title, record[title], flush=True)
            del entry, level, plain
    record["seconds of a source pass"] = passing
    print(json.dumps(record, indent=1))
    if not given.dry:
        write_atomically(RESULTS / f"{given.name}.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
