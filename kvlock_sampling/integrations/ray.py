"""Jobs on the actors of a Ray cluster. Each actor takes a group of jobs at a time, in order; a dead one is replaced."""

import math
import os
import socket
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

from ..types import KVLockError
from ..utils.extras import require
from ..utils.warn import warn

TRIES = 3  # how often a job is given to an actor that dies
STORE = 100 * 2**20  # bytes of Ray's object store; jobs and records are small


def run_on_ray(
    kind: type,
    arguments: tuple[Any, ...],
    groups: Sequence[Sequence[Any]],
    *,
    workers: int | None = None,
    address: str | None = None,
    share: bool = False,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield every job with its record, in the order in which they end.

    Args:
        kind: Class of the actors: `open()` prepares one and may raise; `edit(job)` returns a record and does not raise.
        arguments: Of the class.
        groups: Lists of jobs; the jobs of a list go to one actor.
        workers: The number of actors. Default: one per GPU of the cluster, or one.
        address: "auto" or HOST:PORT of a cluster; None starts Ray on this machine and stops it afterwards.
        share: Let an actor without a group take the last job of another's.

    Raises:
        KVLockError: Ray is not installed, no cluster answers, or actors die before they begin.
    """
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # Under `uv run` it would pack the working directory.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use to its makers.
    ray = require("ray", "batch")
    local = {} if address else {"include_dashboard": False, "num_cpus": workers, "object_store_memory": STORE}
    try:
        host, _, port = (address or "").rpartition(":")
        if port.isdecimal() and "/" not in host:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()  # Ray would wait for minutes.
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **local)
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        raise KVLockError(
            f"no Ray cluster at {address or 'this machine'}: {str(error).partition(chr(10))[0]}\n"
            "  Start one, ray start --head, and pass --address auto; or leave --address away."
        ) from error
    try:
        yield from _run(ray, ray.remote(kind), arguments, list(map(list, groups)), workers, share)
    finally:
        ray.shutdown()


def _run(
    ray: Any, kind: Any, arguments: tuple[Any, ...], groups: list[list[Any]], workers: int | None, share: bool
) -> Iterator[tuple[Any, dict[str, Any]]]:
    gpus = int(ray.cluster_resources().get("GPU", 0))
    workers = min(workers or gpus or 1, sum(map(len, groups)) if share else len(groups))
    place = {"num_cpus": 0, "num_gpus": 1 / math.ceil(workers / gpus) if gpus else 0, "scheduling_strategy": "SPREAD"}
    waiting, tries = deque(groups), Counter[Any]()
    at_work: dict[Any, tuple[Any, list[Any], Any]] = {}  # by what an actor will return: the actor, its group, its job

    def start(own: list[Any]) -> None:
        actor = kind.options(**place).remote(*arguments)
        at_work[actor.open.remote()] = actor, own, None

    for _ in range(workers):
        start([])
    # An actor for which the cluster has no room yet is not waited for.
    while waiting or any(own or job for _, own, job in at_work.values()):
        (returned, *_), _ = ray.wait(list(at_work))
        actor, own, job = at_work.pop(returned)
        try:
            record = ray.get(returned)
        except ray.exceptions.RayTaskError as error:  # raised by `open`
            raise error.cause from None
        except ray.exceptions.RayError as error:  # the process of the actor died, or its machine
            said, key = str(error).strip().splitlines(), None if job is None else job.row
            tries[key] += 1
            if tries[key] < TRIES * (workers if job is None else 1):
                if job is not None:
                    warn(f"the worker of row {job.row} died; another one tries again.")
                    own.insert(0, job)
            elif job is None:
                raise KVLockError(
                    f"{tries[None]} workers died before they began: {said[-1]}\n  Is this library installed on every "
                    "machine of the cluster? If memory ran out, give fewer --workers."
                ) from None
            else:
                yield job, {"error": f"its worker died {TRIES} times, as it does if memory runs out: {said[0]}"}
            if own or waiting or (share and any(group for _, group, _ in at_work.values())):
                start(own)
            continue
        if job is not None:
            yield job, record
        else:
            tries[None] = 0
        if not own and waiting:
            own = waiting.popleft()
        if not own and share:
            longest = max((group for _, group, _ in at_work.values()), key=len, default=[])
            own = [longest.pop()] if longest else []
        if own:
            job = own.pop(0)
            at_work[actor.edit.remote(job)] = actor, own, job
