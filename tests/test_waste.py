"""No waste: one read from the device per evaluation, no growth over steps, inference mode."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
from torch import Tensor

from kvlock_sampling.utils.host import HostReads


class Reads(Counter):
    """Counts what makes the host wait for a device: `tolist`, `item`, `nonzero`, `float(tensor)`, `bool(tensor)`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        for name in ("tolist", "item", "nonzero", "__float__", "__int__", "__bool__", "cpu", "numpy"):
            original = getattr(Tensor, name)

            def counted(*args, _name=name, _original=original, **kwargs):
                self[_name] += 1
                return _original(*args, **kwargs)

            patch.setattr(Tensor, name, counted)


@pytest.mark.parametrize("policy", ["default", "full", "fast", "half", "paper", "pid", "sigmoid", "off"])
@pytest.mark.parametrize("foreground", [None, False])
def test_one_read_per_evaluation(setup, policy, foreground, monkeypatch):
    lock = setup.lock(policy=policy, foreground=foreground)
    monkeypatch.setattr("kvlock_sampling.utils.host.HostReads.free", lambda value: False)  # reads on the CPU alone
    with lock, torch.inference_mode():
        lock.on_schedule(setup.sigmas)
        for _ in range(2):
            for i, sigma in enumerate(setup.sigmas[:-1]):
                with pytest.MonkeyPatch.context() as patch:
                    seen = Reads(patch)
                    lock(setup.x, sigma[None], **setup.cfg)
                warm = i > 0 and len(lock.trace) > len(setup.sigmas)  # masks are cut to size once, sources noised once
                if warm:
                    assert sum(seen.values()) <= 1, (policy, i, seen)


def test_reads_are_together_and_exact():
    values = torch.tensor([0.1, 0.7]), torch.tensor(3), torch.tensor([[1e-30, 2.5]])
    reads = HostReads()
    with pytest.MonkeyPatch.context() as patch:
        seen = Reads(patch)
        reads.together(*values, 1.0, None)
        got = [reads.range(v) for v in values]
        assert seen["tolist"] == 1
    assert got == [(float(v.min()), float(v.max())) for v in values]
    assert reads.range(2.0) == (2.0, 2.0)


@pytest.mark.parametrize("policy", ["default", "full", "half"])
def test_nothing_grows_over_steps(setup, policy):
    """Tensors that are alive after a step are as many after the next ones, but for the trace's few numbers."""
    lock = setup.lock(policy=policy)
    alive = []
    with lock, torch.inference_mode():
        for i, sigma in enumerate(torch.logspace(2, -1, 24)):
            lock(setup.x, sigma[None], **setup.cfg)
            if i not in (19, 23):  # by then the timeline is as deep as it gets
                continue
            gc.collect()
            # By type, not isinstance: that would wake every lazy object of every library.
            alive.append(sum(t.numel() for t in gc.get_objects() if type(t) is Tensor))
    grown = alive[1] - alive[0]
    # A step's row of the trace: a number each per clip, and for each token what is decided there.
    tokens = lock.settings.tokens if lock.trace.steps[-1].composite.ndim > 1 else 0
    assert grown <= 4 * (16 + 6 * tokens)


def test_the_trace_of_a_run_in_inference_mode_may_be_used_outside(setup):
    with torch.inference_mode():
        lock = setup.lock(policy="full")
        lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    out = lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)  # masks made there serve here too
    assert torch.isfinite(out).all()
    assert lock.trace.rows()
