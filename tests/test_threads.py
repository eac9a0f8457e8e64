"""Threads, tasks and copies: each run has its own state, and a copy of a model is that model without a lock."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import pickle
import sys
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
from conftest import Setup
from networks import random_network
from torch import Tensor, nn

import kvlock_sampling as kv
from kvlock_sampling.attention.forward_hooks import ForwardHook, hooked
from kvlock_sampling.types import KVLockError, RunError

SIGMAS = (5.0, 3.0, 1.0, 0.5)


def start(setup: Setup, seed: int) -> Tensor:
    return torch.randn(setup.source.shape, generator=torch.Generator().manual_seed(seed))


def evaluations(lock: kv.KVLock, setup: Setup, seed: int) -> Any:
    """A sampling loop of somebody's own that can be left after every evaluation."""
    for sigma in SIGMAS:
        yield lock(setup.source + sigma * start(setup, seed), torch.tensor([sigma]), **setup.cfg)


def alone(setup: Setup, seed: int) -> tuple[Tensor, list[dict[str, Any]]]:
    with setup.lock(policy=kv.Linear(), threshold=0.01) as lock:
        return torch.cat(list(evaluations(lock, setup, seed))), lock.trace.rows()


def test_two_tasks_with_one_lock_have_two_runs(setup):
    lock = setup.lock(policy=kv.Linear(), threshold=0.01)

    async def edit(seed: int) -> tuple[Tensor, list[dict[str, Any]]]:
        results = []
        with lock:
            for result in evaluations(lock, setup, seed):
                results.append(result)
                await asyncio.sleep(0)  # the other task's turn
        await asyncio.sleep(0)
        return torch.cat(results), lock.trace.rows()  # this task's run, although the other's was left later

    async def both() -> Any:
        return await asyncio.gather(edit(1), edit(2))

    for seed, (result, rows) in enumerate(asyncio.run(both()), 1):
        wanted = alone(setup, seed)
        assert torch.equal(result, wanted[0])
        assert repr(rows) == repr(wanted[1])


def test_two_threads_with_one_lock_have_two_runs(setup):
    lock, turn, found = setup.lock(policy=kv.Linear(), threshold=0.01), threading.Barrier(2), {}

    def edit(seed: int) -> None:
        results = []
        with lock:
            for result in evaluations(lock, setup, seed):
                results.append(result)
                turn.wait(10)
        turn.wait(10)
        found[seed] = torch.cat(results), lock.trace.rows()

    threads = [threading.Thread(target=edit, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        wanted = alone(setup, seed)
        assert torch.equal(found[seed][0], wanted[0])
        assert repr(found[seed][1]) == repr(wanted[1])


def test_a_run_is_of_the_context_that_entered_it(setup):
    """A task, or a context, that begins within a block gets a copy of the block's values, and no part in its run."""
    lock = setup.lock(policy=kv.Linear(), threshold=0.01)
    first, second = contextvars.copy_context(), contextvars.copy_context()
    runs = first.run(evaluations, lock, setup, 1), second.run(evaluations, lock, setup, 2)
    first.run(lock.__enter__)
    second.run(lock.__enter__)
    for context, run in zip((first, second), runs, strict=True):
        context.run(next, run)
    within = first.copy()
    with pytest.raises(RunError, match="another thread or task"):
        within.run(lock, setup.x, setup.sigmas[:1], **setup.cfg)
    results = [[context.run(next, run) for _ in SIGMAS[1:]] for context, run in zip((first, second), runs, strict=True)]
    for seed, got in enumerate(results, 1):
        assert torch.equal(torch.cat(got), alone(setup, seed)[0][1:])
    # With a block of its own it has a run of its own, and the outer one goes on.
    within.run(lock.__enter__)
    within.run(lock, setup.x, setup.sigmas[:1], **setup.cfg)
    assert len(within.run(lambda: lock.trace)) == 1
    within.run(lock.__exit__, None, None, None)
    assert len(within.run(lambda: lock.trace)) == 1
    assert len(first.run(lambda: lock.trace)) == len(SIGMAS)

    async def both() -> Any:
        async def edit(seed: int) -> list[Tensor]:
            return list(evaluations(lock, setup, seed))

        with pytest.warns(UserWarning, match="was not called"), lock:
            return await asyncio.gather(edit(1), edit(2), return_exceptions=True)

    assert [type(error) for error in asyncio.run(both())] == [RunError, RunError]


def test_the_trace_is_that_of_the_innermost_open_block_and_afterwards_of_the_last(setup):
    lock, x, sigma = setup.lock(), setup.x, setup.sigmas[:1]
    assert len(lock.trace) == 0
    with lock:
        lock(x, sigma, **setup.cfg)
        outer = lock.trace
        with lock:
            lock(x, sigma, **setup.cfg)
            lock(x / 2, sigma / 2, **setup.cfg)
            inner = lock.trace
        assert lock.trace is outer
        lock.sample("euler", x, setup.sigmas, extra_args=setup.cfg)
        assert lock.trace is outer
        lock(x / 4, sigma / 4, **setup.cfg)
    assert lock.trace is outer
    assert (len(outer), len(inner)) == (2, 2)
    lock.sample("euler", x, setup.sigmas, extra_args=setup.cfg)
    assert lock.trace is not outer
    # A thread that has run nothing reads the latest run, whoever made it.
    other = setup.lock()
    thread = threading.Thread(target=other.sample, args=("euler", x, setup.sigmas), kwargs={"extra_args": setup.cfg})
    thread.start()
    thread.join()
    assert len(other.trace) == len(setup.sigmas) - 1


def test_a_run_that_is_over_holds_no_clip_and_no_lock(setup):
    lock = setup.lock(policy="full")
    with lock:
        lock(setup.x, setup.sigmas[:1], **setup.cfg)
        run = lock._run()
    assert run.noise is None
    assert run.timeline.last is None
    gone = weakref.ref(lock)
    del lock
    gc.collect()
    assert gone() is None


def test_a_lock_that_is_never_called_warns(setup):
    lock = setup.lock()
    with pytest.warns(UserWarning, match="was not called in its block") as seen, lock:
        setup.model(setup.x, setup.sigmas[:1], cond=setup.cond)  # the model instead of the lock
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lock:
            lock(setup.source, torch.zeros(1), **setup.cfg)  # sigma 0 decides nothing, and is a call
        with pytest.raises(KeyError), lock:
            raise KeyError  # what broke the block says more
        with lock, pytest.raises(KVLockError):
            lock(setup.x, -setup.sigmas[:1], **setup.cfg)


def copies_within(model: nn.Module, layer: nn.Module, call: Any) -> list[nn.Module]:
    """Copies of a model that other code makes while a call of the model is in one of its layers."""
    made: list[nn.Module] = []

    def copying(module: nn.Module, args: Any) -> None:
        handle.remove()  # else the copies have this hook
        made.append(copy.deepcopy(model))
        made.append(copy.copy(model))
        if type(model).__module__ in sys.modules:  # k-diffusion's private package may be gone again
            made.append(pickle.loads(pickle.dumps(model)))

    handle = layer.register_forward_pre_hook(copying)
    call()
    assert made
    return made


def check_copy(made: nn.Module, model: nn.Module, call: Any) -> None:
    """It computes as the model does, by its own weights, has the model's classes, and nothing of the lock."""
    for mine, theirs in zip(made.modules(), model.modules(), strict=True):
        assert type(mine) is type(theirs)
        assert vars(mine).keys() == vars(theirs).keys()
    assert torch.equal(call(made), call(model))
    if next(made.parameters()) is next(model.parameters()):
        return  # copy.copy shares them
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(1.5)
    assert not torch.equal(call(made), call(model))


ROUTES = {
    "lock 0.5": (0.5, {}),
    "full": (1.0, {}),
    "dense": (1.0, {"foreground": False}),
    "apart": (1.0, {"batched": False}),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["wan", "flux", "cogvideox", "k-diffusion-v1"])
def test_a_copy_made_while_a_lock_acts_is_the_model_without_a_lock(name, route):
    value, options = ROUTES[route]
    try:
        network = random_network(name, clips=1)
    except KVLockError as error:
        pytest.skip(str(error).splitlines()[0])
    mask = torch.zeros_like(network.x[:, :1] if network.x.ndim > 3 else network.x[..., :1])
    (mask if network.x.ndim > 3 else mask.movedim(1, -1))[..., :2] = 1
    lock = kv.KVLock(
        network.denoiser,
        source=network.x.flip(-1),
        mask=mask,
        policy=kv.Constant(value),
        layers=network.layers,
        **options,
    )
    inner = network.layers.networks[0]
    layer = next(module for module in network.layers.layers[-1].module.modules() if not list(module.children()))

    def locked() -> None:
        with torch.no_grad(), lock:
            lock(network.x * 2, torch.ones(1), **network.extra_args)
        assert lock.trace.steps[0].fused_layers

    example: tuple[Any, ...] = ()

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal example
        example = args, kwargs

    handle = inner.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        network.denoiser(network.x, torch.ones(1), **network.extra_args)
    handle.remove()

    def call(model: nn.Module) -> Tensor:
        with torch.no_grad():
            out = model(*example[0], **example[1])
        return out if isinstance(out, Tensor) else out[0]

    for made in copies_within(inner, layer, locked):
        check_copy(made, inner, call)


class Watched(nn.Module):
    """A network of somebody's own, whose attention is seen at F.scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)
        out = nn.functional.scaled_dot_product_attention(*self.qkv(tokens).chunk(3, -1))
        return out[:, 0].transpose(1, 2).reshape(x.shape)


def test_a_copy_of_a_watched_network_made_while_a_lock_acts():
    model, x = Watched(), torch.randn(1, 4, 2, 4, 4)
    mask = torch.zeros(1, 1, 2, 4, 4)
    mask[..., :2] = 1
    layers = kv.sdpa_layers(model, patch=(1, 1, 1))
    lock = kv.KVLock(model, source=x.flip(-1), mask=mask, policy=kv.Constant(0.5), layers=layers)

    def locked() -> None:
        with torch.no_grad(), lock:
            lock(x, torch.ones(1))

    def call(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(x, torch.ones(1))

    for made in copies_within(model, model.qkv, locked):
        check_copy(made, model, call)


def test_a_copy_is_not_locked_while_the_model_is(setup):
    """A copy that is called within the very evaluation, by the thread of the lock."""
    wanted, answers, asking = setup.model(setup.x, torch.ones(1), cond=setup.cond), [], False

    def calling(module: nn.Module, args: Any) -> None:
        nonlocal asking
        if not asking:  # the copy has this hook as well
            asking = True
            answers.append(copy.deepcopy(setup.model)(setup.x, torch.ones(1), cond=setup.cond))
            asking = False

    setup.model.inner_model.transformer.blocks[1].register_forward_pre_hook(calling)
    for foreground in (True, False):
        with setup.lock(policy="full", foreground=foreground, batched=foreground) as lock:
            lock(setup.x, setup.sigmas[:1], **setup.cfg)
    assert len(answers) == 4  # one call, as such a hook is to see every token; then source and branches apart
    assert all(torch.equal(answer, wanted) for answer in answers)


class Adds(nn.Module):
    by = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def test_a_copy_keeps_the_forward_that_offloading_had_set():
    from accelerate.hooks import ModelHook, add_hook_to_module

    module = add_hook_to_module(Adds(), ModelHook())
    with hooked([ForwardHook(module, around=lambda call, args, kwargs: 2 * call(*args, **kwargs))]):
        made = copy.deepcopy(module)
        assert module(torch.zeros(1)).item() == 2
    made.by = 5.0
    assert made(torch.zeros(1)).item() == 5
    assert vars(made).keys() == vars(module).keys() | {"by"}


def test_other_code_may_set_a_forward_while_hooks_are_there():
    """As offloading does that learns at its first call what comes next, or that is enabled by another thread."""

    def twice(call: Any, args: Any, kwargs: Any) -> Any:
        return 2 * call(*args, **kwargs)

    for wraps, before, after in ((False, 200, 100), (True, 202, 101)):
        module, x = Adds(), torch.zeros(1)
        with hooked([ForwardHook(module, around=twice)]):
            held = module.forward
            module.forward = (lambda x, held=held: held(x) + 100) if wraps else (lambda x: x + 100)
            assert module(x).item() == before
        assert module(x).item() == after
        with hooked([ForwardHook(module, around=twice)]):
            assert module(x).item() == before  # once, although what was set may lead here again
