"""Context parallelism: two processes that hold half of the tokens each give what one process gives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import parallel_worker
import pytest
import torch

WORKER = Path(parallel_worker.__file__)
SECONDS = 240
"""Enough for a loaded machine; two processes that wait for each other for good are ended."""

NEAR = 1e-4
"""Rounding, on latents of order 1 to 10: kernels sum in another order."""


def far_apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("parallel")
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    log = [(folder / f"{rank}.log").open("wb") for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), str(rank)], stdout=log[rank], stderr=log[rank], env=settings
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for file in log:
            file.close()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, (folder / f"{rank}.log").read_text()[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return parallel_worker.whole()


@pytest.mark.parametrize("case", [*parallel_worker.CASES, "pipeline"])
def test_two_processes_give_what_one_gives(case: str, results: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for name, wanted in alone[case].items():
        first, second = (result[case][name] for result in results)
        assert torch.equal(first, second), name  # both measure and decide the same
        assert far_apart(first, wanted) < NEAR, name


@pytest.mark.parametrize("case", parallel_worker.CASES)
def test_there_was_something_to_get_wrong(case: str, alone: dict[str, Any]) -> None:
    """A lock moves the result far beyond the tolerance, and the measured one decides by what it measures."""
    found = alone[case]
    for name in ("half", "full", "measured"):
        assert far_apart(found[name], found["free"]) > 50 * NEAR, name
    assert far_apart(found["half"], found["apart"]) < NEAR
    assert len(found["locks"].unique()) > 1


REFUSED = {
    "attention that does not communicate": "does not\\s+communicate.*leave enable_parallelism away",
    "a lock from before": "after model.enable_parallelism",
    "a KV cache": "without kv_cache=",
    "layers known as calls": "Declare the model",
    "extra tokens": "extra tokens.*leave enable_parallelism away",
    "no plan": "cp_plan",  # diffusers' own
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_it_cannot_work_it_raises(case: str, results: list[dict[str, Any]]) -> None:
    for result in results:
        assert re.search(REFUSED[case], result["refusals"][case], flags=re.DOTALL)
