"""A compiled model is locked as it would be uncompiled, and is the compiled model again when nothing is locked.

The compiler's back end is the eager one where nothing else is said: what it would break is found out by its front end.
"""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from conftest import Setup
from networks import random_network
from test_backends import outputs

import kvlock_sampling as kv
from kvlock_sampling.testing.estimator import CheckModel
from kvlock_sampling.types import AttentionError
from kvlock_sampling.utils.threads import without_compiler
from kvlock_sampling.variance import DropoutVariance

KINDS = ("torch.compile", "compile", "compile_repeated_blocks", "denoiser")
SLOW = [pytest.param(k, marks=pytest.mark.slow) if k in ("compile", "denoiser") else k for k in KINDS]


@pytest.fixture(autouse=True)
def compiler():
    """A compiler that has seen nothing, and whose trace is not logged."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    gc.collect()


class Counted:
    """A back end of the compiler that counts what it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def compiled(setup: Setup, kind: str, backend="eager", **options):
    """The setup's denoiser, compiled in one of the ways there are."""
    network = setup.model.inner_model
    options["backend"] = backend
    if kind == "denoiser":
        return torch.compile(setup.model, **options)
    if kind == "torch.compile":
        network.transformer = torch.compile(network.transformer, **options)
    else:
        getattr(network.transformer, kind)(**options)
    return setup.model


def bare(model, setup: Setup):
    with torch.no_grad():
        return model(setup.source, torch.ones(1), cond=setup.cond)


@pytest.mark.parametrize("kind", SLOW)
@pytest.mark.filterwarnings("error:.*without torch.compile")
def test_locked_equals_eager_and_off_is_the_compiled_model_again(kind):
    expected, fused = outputs(Setup(), sigmas=(1.0,))
    setup, backend = Setup(), Counted()
    model = compiled(setup, kind, backend)
    before = bare(model, setup)
    assert backend.graphs  # compiled before the lock is made
    got = outputs(setup, sigmas=(1.0,), model=model)
    torch.testing.assert_close(got[0], expected)
    assert got[1] == fused == [2]
    graphs = backend.graphs
    assert torch.equal(bare(model, setup), before)
    assert backend.graphs == graphs  # what was compiled before the lock is in use again
    again = outputs(setup, sigmas=(1.0,), model=model)
    assert torch.equal(again[0], got[0])
    assert torch.equal(bare(model, setup), before)
    assert backend.graphs == graphs  # both forms stay compiled, also for another lock
    if kind == "compile_repeated_blocks":  # one graph serves all blocks, and a lock of some of them
        other = outputs(setup, sigmas=(1.0,), model=model, layers=[1])
        torch.testing.assert_close(other[0], outputs(Setup(), sigmas=(1.0,), layers=[1])[0])
        assert other[1] == [1]


def test_a_lock_that_comes_before_the_first_compiled_call():
    expected, _ = outputs(Setup(), sigmas=(1.0,))
    setup = Setup()
    model = compiled(setup, "compile_repeated_blocks")
    torch.testing.assert_close(outputs(setup, sigmas=(1.0,), model=model)[0], expected)
    torch.testing.assert_close(bare(model, setup), bare(Setup().model, setup))


class Attends(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(4, 12)

    def forward(self, tokens):
        return tokens + torch.nn.functional.scaled_dot_product_attention(*self.qkv(tokens).chunk(3, -1))


class Watched(torch.nn.Module):
    """A network of somebody's own, seen at its calls of F.scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Attends() for _ in range(2))

    def forward(self, x, sigma):
        tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens[:, 0].transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("lock_first", [False, True])
def test_compiled_blocks_of_a_watched_network_are_fused_once_and_the_rewriting_is_not_traced(batched, lock_first):
    torch.manual_seed(0)
    network, backend, source = Watched(), Counted(), torch.randn(1, 4, 2, 4, 4)
    mask = torch.zeros(1, 1, 2, 4, 4)
    mask[..., :2] = 1

    def run():
        layers = kv.sdpa_layers(network, patch=(1, 1, 1))
        options = {"policy": kv.Constant(0.5), "layers": layers, "composite": False, "batched": batched}
        with torch.no_grad(), kv.KVLock(network, source=source, mask=mask, **options) as lock:
            out = [lock(source.flip(-1) * s, torch.full((1,), s)) for s in (2.0, 1.0)]
        assert [step.fused_layers for step in lock.trace] == [2, 2]
        return torch.cat(out)

    expected = run()
    for block in network.blocks:
        block.compile(backend=backend)
    if not lock_first:
        with torch.no_grad():
            network(source, torch.ones(1))
    assert torch.equal(run(), expected)
    graphs = backend.graphs
    for _ in range(10):  # more than the compiler's limit of recompilations
        assert torch.equal(run(), expected)
    assert backend.graphs == graphs <= 4  # the whole block without a lock; its parts around the call, for 1 or 2 rows


@pytest.mark.parametrize("wrap", [lambda network: network, kv.FlowDenoiser], ids=["network", "denoiser"])
def test_a_compiled_network_keeps_its_graph_under_a_lock_that_watches_what_is_around_it(wrap):
    torch.manual_seed(0)
    backend, source = Counted(), torch.randn(1, 4, 2, 4, 4)
    mask = torch.zeros(1, 1, 2, 4, 4)
    mask[..., :2] = 1
    model = wrap(torch.compile(Watched(), backend=backend))

    def bare():
        with torch.no_grad():
            return model(source, torch.ones(1))

    expected, graphs = bare(), backend.graphs
    layers = kv.sdpa_layers(model, patch=(1, 1, 1))
    with torch.no_grad(), kv.KVLock(model, source=source, mask=mask, policy="half", layers=layers) as lock:
        lock(source.flip(-1) * 2, torch.full((1,), 2.0))
    assert torch.equal(bare(), expected)
    assert backend.graphs == graphs == 1


def test_an_idle_lock_is_the_compiled_model_bit_for_bit():
    setup, backend = Setup(), Counted()
    model = compiled(setup, "compile_repeated_blocks", backend)
    idle = kv.stateless(lambda obs: kv.Control(0.0))
    plain = kv.CFGDenoiser(model)
    with torch.no_grad(), setup.lock(policy=idle, composite=False) as lock:
        first = lock(setup.source, torch.ones(1), **setup.cfg)
        graphs = backend.graphs
        assert torch.equal(first, plain(setup.source, torch.ones(1), **setup.cfg))
    assert backend.graphs == graphs == 1  # the blocks are one graph without a break


@pytest.mark.parametrize("kind", ["compile_repeated_blocks", "torch.compile"])
def test_a_graph_that_may_not_break_runs_uncompiled_where_locked_and_warns_once(kind):
    expected, fused = outputs(Setup())
    setup, backend = Setup(), Counted()
    model = compiled(setup, kind, backend, fullgraph=True)
    before = bare(model, setup)
    with pytest.warns(UserWarning, match=r"fullgraph=True\), so evaluations that lock run without") as seen:
        got = outputs(setup, model=model)
    assert len(seen) == 1
    torch.testing.assert_close(got[0], expected)
    assert got[1] == fused
    graphs = backend.graphs
    assert torch.equal(bare(model, setup), before)
    assert backend.graphs == graphs


def test_a_graph_that_does_not_look_at_the_model_again_is_no_silent_no_op():
    expected, fused = outputs(Setup(), sigmas=(1.0,))
    setup = Setup()
    model = compiled(setup, "compile_repeated_blocks")
    both = torch.cat([setup.source] * 3), torch.ones(3)
    with torch.no_grad():  # compiled for the very shapes of the locked call, then never to be checked again
        model(*both, cond=torch.cat([setup.cond] * 3))
        with (
            torch.compiler.set_stance(skip_guard_eval_unsafe=True),
            pytest.warns(UserWarning, match="a lock cannot reach into the compiled model"),
        ):
            got = outputs(setup, sigmas=(1.0,), model=model)
    torch.testing.assert_close(got[0], expected)
    assert got[1] == fused


def test_a_layer_error_of_an_uncompiled_model_does_not_run_it_twice(setup):
    torch._dynamo.utils.counters.clear()  # nothing has been compiled in this process
    calls = []
    setup.model.inner_model.register_forward_pre_hook(lambda module, args: calls.append(1))
    with pytest.raises(AttentionError, match="attends over 48 tokens"):
        outputs(setup, layers=kv.find_layers(setup.model).with_extra(after=1))
    assert len(calls) == 1


@pytest.mark.parametrize("foreground", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_joint_model_compiled(foreground):
    def run(network):
        mask = torch.zeros_like(network.x[:, :1])
        mask[..., :2] = 1
        lock = kv.KVLock(
            network.denoiser,
            source=network.x.flip(-1),
            mask=mask,
            policy=kv.Constant(1.0),
            foreground=foreground,
        )
        with torch.no_grad(), lock:
            return lock(network.x, torch.ones(1), **network.extra_args), lock.trace.steps[0].fused_layers

    expected = run(random_network("flux", clips=1))
    network, backend = random_network("flux", clips=1), Counted()
    network.layers.networks[0].compile_repeated_blocks(backend=backend)
    with torch.no_grad():
        network.denoiser(network.x, torch.ones(1), **network.extra_args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = run(network)
    torch.testing.assert_close(got[0], expected[0])
    assert got[1] == expected[1] == 2
    assert backend.graphs > 2  # a block of each kind, and its parts around the layer


@pytest.mark.slow
def test_offloaded_cast_and_cached_blocks_compiled():
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks import apply_group_offloading

    def prepared() -> Setup:
        setup, cpu = Setup(), torch.device("cpu")
        network = setup.model.inner_model.transformer
        network.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        apply_group_offloading(network, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        network.enable_cache(FirstBlockCacheConfig(threshold=0.4))
        return setup

    expected, fused = outputs(prepared())
    setup = prepared()
    model = compiled(setup, "compile_repeated_blocks")
    got = outputs(setup, model=model)
    torch.testing.assert_close(got[0], expected)
    assert got[1] == fused


def test_a_compiled_network_is_thinned_as_an_uncompiled_one():
    x, sigmas, found = torch.randn(1, 4, 2, 4, 4) * 10, torch.tensor([10.0, 3.0, 1.0, 0.0]), []
    for compile_first in (False, True):
        model = CheckModel()
        if compile_first:
            model.compile(backend="eager")
        lock = kv.KVLock(model, policy=kv.Sigmoid(lock_range=(0.0, 0.0)), estimator=DropoutVariance(rate=0.5))
        lock.sample("euler", x, sigmas)
        found.append([float(step.variance) for step in lock.trace])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert min(found[0]) > 0


def test_the_stance_of_the_compiler_is_put_back_when_the_last_thread_leaves():
    backend = Counted()
    function = torch.compile(lambda x: x.sin() + 1, backend=backend)
    x = torch.ones(3)
    first, second = without_compiler(), without_compiler()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    function(x)
    assert backend.graphs == 0
    second.__exit__(None, None, None)
    function(x)
    assert backend.graphs == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_with_inductor(kind):
    expected, fused = outputs(Setup())
    setup = Setup()
    model = compiled(setup, kind, "inductor")
    before = bare(model, setup)
    got = outputs(setup, model=model)
    torch.testing.assert_close(got[0], expected, atol=1e-4, rtol=1e-4)
    assert got[1] == fused
    assert torch.equal(bare(model, setup), before)
