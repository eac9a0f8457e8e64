"""Attention of every backend is fused once, by this thread's lock alone, and is left as it was found."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import unittest.mock
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import Setup
from networks import random_network
from torch import Tensor, nn

import kvlock_sampling as kv
from kvlock_sampling.attention import FusionContext
from kvlock_sampling.attention.forward_hooks import ForwardHook, hooked, patched
from kvlock_sampling.attention.interception import intercepted
from kvlock_sampling.types import AttentionError


@pytest.fixture
def dispatch():
    """diffusers' attention dispatch; which backend is active, and the table of them, are put back."""
    Setup()  # imports diffusers as the tests' models do
    from diffusers.models import attention_dispatch

    registry = attention_dispatch._AttentionBackendRegistry
    active, table, names = registry._active_backend, registry._backends, dict(registry._supported_arg_names)
    yield attention_dispatch
    assert registry._backends is table
    registry._active_backend, registry._supported_arg_names = active, names


def outputs(setup: Setup, lock: float = 0.7, sigmas=(3.0, 1.0), model=None, **options) -> tuple[Tensor, list[int]]:
    """Two guided evaluations under a constant lock: what they predict, and how many layers acted."""
    model = setup.model if model is None else model
    options = {"policy": kv.Constant(lock=lock), "composite": False, "foreground": False, **options}
    with torch.no_grad(), kv.KVLock(model, source=setup.source, mask=setup.mask, **options) as held:
        noise = setup.x / setup.sigmas[0]
        out = [held(setup.source + s * noise, torch.full((len(noise),), s), **setup.cfg) for s in sigmas]
    return torch.cat(out), [step.fused_layers for step in held.trace.steps]


def kernel(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Attention as an external kernel computes it: (rows, length, heads, dim), no mask, no call of torch's own."""
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    assert key.is_contiguous()
    weights = torch.einsum("blhd,bmhd->bhlm", query, key) * (scale or query.shape[-1] ** -0.5)
    return torch.einsum("bhlm,bmhd->blhd", weights.softmax(-1), value)


@pytest.fixture
def flash(dispatch, monkeypatch):
    """The kernel above in the place of the `flash` backend."""
    registry, name = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName.FLASH
    monkeypatch.setitem(registry._backends, name, kernel)
    monkeypatch.setitem(registry._supported_arg_names, name, {"query", "key", "value", "scale"})
    return name


def choose(network: nn.Module, backend: object) -> None:
    """What `set_attention_backend` does to a model, without asking whether the kernel is installed."""
    for module in network.modules():
        if hasattr(getattr(module, "processor", None), "_attention_backend"):
            module.processor._attention_backend = backend


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("way", ["model", "context"])
def test_flex_attention_is_locked_as_native_is(dispatch, way):
    expected, fused = outputs(Setup())
    setup = Setup()
    if way == "model":
        setup.model.inner_model.transformer.set_attention_backend("flex")
        got = outputs(setup)
    else:
        with dispatch.attention_backend("flex"):
            got = outputs(setup)
    torch.testing.assert_close(got[0], expected, atol=1e-4, rtol=1e-4)
    assert got[1] == fused == [2, 2]
    assert not torch.allclose(outputs(Setup(), lock=0.0)[0], expected, atol=1e-2)


def test_a_kernel_outside_of_torch_is_locked_each_model_by_its_own_choice(flash):
    expected = outputs(Setup())
    fast, plain = Setup(), Setup()
    choose(fast.model.inner_model.transformer, flash)
    for setup in (fast, plain):
        got = outputs(setup)
        torch.testing.assert_close(got[0], expected[0], atol=1e-4, rtol=1e-4)
        assert got[1] == [2, 2]


def test_a_joint_model_is_locked_behind_a_kernel_too(flash):
    network = random_network("flux", clips=1)
    mask = torch.zeros_like(network.x[:, :1])
    mask[..., :2] = 1

    def run() -> tuple[Tensor, int]:
        lock = kv.KVLock(
            network.denoiser, source=network.x.flip(-1), mask=mask, policy=kv.Constant(1.0), foreground=False
        )
        with torch.no_grad(), lock:
            out = lock(network.x * 2, torch.ones(1), **network.extra_args)
        return out, lock.trace.steps[0].fused_layers

    expected = run()
    choose(network.denoiser, flash)
    got = run()
    torch.testing.assert_close(got[0], expected[0], atol=1e-4, rtol=1e-4)
    assert got[1] == expected[1] == len(network.layers.layers)


def test_the_foreground_path_runs_behind_a_kernel(flash):
    expected = outputs(Setup(), lock=1.0, composite=True, foreground=True)
    setup = Setup()
    choose(setup.model.inner_model.transformer, flash)
    got = outputs(setup, lock=1.0, composite=True, foreground=True)
    torch.testing.assert_close(got[0], expected[0], atol=1e-4, rtol=1e-4)


TORCHS_OWN = F.scaled_dot_product_attention


def sage(query, key, value, tensor_layout="HND", is_causal=False, sm_scale=None, **kwargs):
    """A kernel with another fourth argument, as SageAttention's, which never calls torch's own function."""
    assert tensor_layout == "HND"
    return ((query @ key.mT) * (sm_scale or query.shape[-1] ** -0.5)).softmax(-1) @ value


REPLACEMENTS = {"a kernel": sage, "a fallback": lambda *args, **kwargs: TORCHS_OWN(*args, **kwargs)}


@pytest.mark.parametrize("family", ["cogvideox", "flux", "watched"])
@pytest.mark.parametrize("kind", REPLACEMENTS)
@pytest.mark.parametrize("when", ["before the lock", "after the lock", "within the block"])
def test_a_replaced_function_is_called_with_fused_keys_and_values(monkeypatch, family, kind, when):
    """SageAttention's recipe; diffusers calls F.scaled_dot_product_attention past its dispatch for CogVideoX."""
    network, calls = random_network("flux" if family == "watched" else family, clips=1), []
    inner = network.layers.networks[0]
    layers = kv.sdpa_layers(inner, patch=network.layers.patch, start=5) if family == "watched" else network.layers
    mask = torch.zeros_like(network.x[:, :1])
    mask[..., :2] = 1

    def replacement(*args, **kwargs):
        calls.append(args)
        return REPLACEMENTS[kind](*args, **kwargs)

    def replace(now: str) -> None:
        if now == when:
            monkeypatch.setattr(F, "scaled_dot_product_attention", replacement)

    def run(replace) -> tuple[Tensor, list[int]]:
        options = {"policy": kv.Constant(0.5), "composite": False, "layers": layers}
        replace("before the lock")
        lock = kv.KVLock(network.denoiser, source=network.x.flip(-1), mask=mask, **options)
        replace("after the lock")
        with torch.no_grad(), lock:
            out = [lock(network.x * 2, torch.full((1,), 2.0), **network.extra_args)]
            replace("within the block")
            out.append(lock(network.x, torch.ones(1), **network.extra_args))
        return torch.cat(out), [step.fused_layers for step in lock.trace]

    expected, fused = run(lambda now: None)
    got = run(replace)
    torch.testing.assert_close(got[0], expected, atol=1e-4, rtol=1e-4)
    assert got[1] == fused == [2, 2]
    assert calls
    assert F.scaled_dot_product_attention is replacement  # nothing is left of the lock
    with torch.no_grad():
        plain = network.denoiser(network.x, torch.ones(1), **network.extra_args)
        monkeypatch.undo()
        own = network.denoiser(network.x, torch.ones(1), **network.extra_args)
    torch.testing.assert_close(plain, own, atol=1e-4, rtol=1e-4)


class Kernel:
    """A kernel without a hash, as a dataclass is."""

    __hash__ = None

    def __call__(self, *args, **kwargs):
        return TORCHS_OWN(*args, **kwargs)


def test_a_replacement_is_not_kept_beyond_its_use(monkeypatch, setup):
    layers = kv.sdpa_layers(setup.model, patch=(1, 2, 2))
    expected = outputs(setup, lock=0.5, layers=layers)[0]
    kernel = Kernel()
    gone = weakref.ref(kernel)
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    assert torch.equal(outputs(setup, lock=0.5, layers=layers)[0], expected)
    monkeypatch.undo()
    del kernel
    gc.collect()
    assert gone() is None


def test_a_function_that_was_replaced_before_the_library_was_imported():
    code = """
import torch, torch.nn.functional as F
own = F.scaled_dot_product_attention
F.scaled_dot_product_attention = lambda *args, **kwargs: own(*args, **kwargs)
import kvlock_sampling as kv
class Net(torch.nn.Module):
    def forward(self, x, sigma):
        tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)
        return F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].transpose(1, 2).reshape(x.shape)
net, x, mask, answers = Net(), torch.randn(1, 4, 2, 4, 4), torch.zeros(1, 1, 2, 4, 4), []
mask[..., :2] = 1
for function in (F.scaled_dot_product_attention, own):
    F.scaled_dot_product_attention = function
    layers = kv.sdpa_layers(net, patch=(1, 1, 1))
    lock = kv.KVLock(net, source=x.flip(-1), mask=mask, policy=kv.Constant(0.5), layers=layers, composite=False)
    with lock:
        answers.append(lock(x, torch.ones(1)))
    assert lock.trace.steps[0].fused_layers == 1
assert torch.equal(*answers)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_native_attention_below_the_dispatch_is_fused_once(dispatch, monkeypatch):
    seen = []
    process = FusionContext.process

    def spy(self, layer, *args):
        seen.append(layer)
        return process(self, layer, *args)

    monkeypatch.setattr(FusionContext, "process", spy)
    outputs(Setup(), sigmas=(1.0,))
    assert sorted(seen) == ["blocks.0.attn1", "blocks.1.attn1"]


def test_the_error_for_a_kernel_of_the_models_own_names_what_a_lock_can_see(setup):
    class OwnMath:
        _attention_backend = _parallel_config = None

        def __call__(self, attn, hidden_states, *args, **kwargs):
            query, key, value = (f(hidden_states) for f in (attn.to_q, attn.to_k, attn.to_v))
            return attn.to_out[0]((query @ key.mT).softmax(-1) @ value)

    for layer in kv.find_layers(setup.model).layers:
        layer.module.set_processor(OwnMath())
    with pytest.raises(AttentionError, match=r"kernel of the model's own.*set_attention_backend\('native'\)"):
        outputs(setup)


def test_another_thread_meanwhile_is_not_touched(flash):
    setup = Setup()
    choose(setup.model.inner_model.transformer, flash)
    sigma = torch.ones(1)
    plain = setup.model(setup.x, sigma, cond=setup.cond)
    inside, answers = threading.Event(), []
    waiting = threading.Event()

    def elsewhere() -> None:
        inside.wait(10)
        answers.append(setup.model(setup.x, sigma, cond=setup.cond))
        waiting.set()

    def during(module, args) -> None:
        if threading.current_thread() is not thread:
            inside.set()
            waiting.wait(10)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    handle = setup.model.inner_model.transformer.blocks[0].attn1.to_k.register_forward_pre_hook(during)
    locked, _ = outputs(setup, sigmas=(1.0,))  # stops within the first layer until the other thread has been through
    handle.remove()
    thread.join()
    assert torch.equal(answers[0], plain)
    assert torch.equal(locked, outputs(setup, sigmas=(1.0,))[0])


def test_two_locks_in_two_threads_on_one_model(setup):
    expected = {lock: outputs(setup, lock=lock)[0] for lock in (0.3, 1.0)}
    got: dict[float, list[Tensor]] = {0.3: [], 1.0: []}

    def work(lock: float) -> None:
        for _ in range(5):
            got[lock].append(outputs(setup, lock=lock)[0])

    threads = [threading.Thread(target=work, args=(lock,)) for lock in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(runs) == 5 and all(torch.equal(r, expected[lock]) for r in runs) for lock, runs in got.items())
    assert all("forward" not in vars(module) for module in setup.model.modules())


def test_a_backend_registered_meanwhile_is_kept(dispatch, setup):
    registry = dispatch._AttentionBackendRegistry
    layers = kv.find_layers(setup.model)

    def register(module, args) -> None:
        registry._backends["late"] = kernel

    handle = layers.layers[0].module.to_q.register_forward_pre_hook(register)
    outputs(setup)
    handle.remove()
    assert registry._backends.pop("late") is kernel


def test_a_mask_that_a_kernel_cannot_take_is_refused(flash, setup):
    choose(setup.model.inner_model.transformer, flash)

    def masking(query, key, value, mask):
        return key, value, torch.ones(1, 1, 1, key.shape[-2], dtype=torch.bool)

    with intercepted(masking), pytest.raises(AttentionError, match="backend 'kernel' takes no mask"):
        setup.model(setup.x, torch.ones(1), cond=setup.cond)


class Adds(nn.Module):
    def forward(self, x: Tensor, by: float = 1.0) -> Tensor:
        return x + by


def twice(call, args, kwargs):
    return 2 * call(*args, **kwargs)


def test_hooks_nest_restore_what_stood_there_and_survive_errors():
    module, x = Adds(), torch.zeros(1)
    hook = ForwardHook(module, around=twice)
    with hooked([hook]):
        assert module(x).item() == 2
        with hooked([hook, ForwardHook(module, before=lambda args, kwargs: (args, {"by": 5.0}))]):
            assert module(x).item() == 20
        assert module(x).item() == 2
    assert vars(module).get("forward") is None
    own = module.forward
    module.forward = replaced = lambda x: own(x) + 10  # as offloading does
    with hooked([hook]):
        assert module(x).item() == 22
    with pytest.raises(TypeError), hooked([hook]):
        module(x, "nothing to add")
    assert module.forward is replaced
    with hooked([hook]):
        held = module.forward
        module.forward = wrapped = lambda x: held(x) + 100  # other code wraps the hook itself
    assert module.forward is wrapped
    assert module(x).item() == 111


@pytest.mark.parametrize("how", ["set", "mock", "delete"])
def test_a_forward_that_is_replaced_for_one_call_leaves_nothing_behind(how):
    """As other tools do around every call of a network."""
    module, x = Adds(), torch.zeros(1)
    with hooked([ForwardHook(module, around=twice)]):
        for _ in range(300):
            own = module.forward
            if how == "mock":
                with unittest.mock.patch.object(module, "forward", lambda x, own=own: own(x) + 10):
                    assert module(x).item() in (12, 22)
                continue
            module.forward = lambda x, own=own: own(x) + 10
            assert module(x).item() in (12, 22)
            if how == "set":
                module.forward = own
            else:
                del module.forward
        assert module(x).item() == 2
    assert module(x).item() == 1
    assert getattr(vars(module).get("forward"), "__func__", Adds.forward) is Adds.forward
    assert not patched(module)


def test_a_hook_does_not_keep_its_module_alive():
    import gc
    import weakref

    module = Adds()
    with hooked([ForwardHook(module, around=twice)]):
        module(torch.zeros(1))
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
