"""Fusion, frames, layers and hooks: exact at both ends, silent elsewhere, gone afterwards."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kvlock_sampling as kv
from kvlock_sampling.attention import FusionContext, find_layers, fuse, fusion_ratio
from kvlock_sampling.masks.tokens import token_grid
from kvlock_sampling.types import AttentionError


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**31), st.booleans())
@settings(max_examples=40, deadline=None)
def test_fuse_is_exact_at_both_ends_and_between(batch, heads, tokens, seed, half):
    g = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if half else torch.float32
    edit, source = (torch.randn(batch, heads, tokens, 5, generator=g).to(dtype) for _ in range(2))
    background = torch.rand(batch, tokens, generator=g) > 0.4
    assert torch.equal(fuse(edit, source, fusion_ratio(torch.zeros(batch), background)), edit)
    locked = fuse(edit, source, fusion_ratio(torch.ones(batch), background))
    assert torch.equal(fuse(edit, source.double(), fusion_ratio(torch.ones(batch), background)), locked)
    where = background[:, None, :, None].expand_as(edit)
    assert torch.equal(locked[where], source[where])
    assert torch.equal(locked[~where], edit[~where])
    mixed = fuse(edit.double(), source.double(), fusion_ratio(torch.full((batch,), 0.25), background))
    expected = torch.where(where, 0.25 * source.double() + 0.75 * edit.double(), edit.double())
    torch.testing.assert_close(mixed, expected)


def test_fusion_ratio_takes_a_lock_per_token():
    background = torch.tensor([[True, False, True]])
    ratio = fusion_ratio(torch.tensor([[0.2, 0.9, 0.7]]), background)
    torch.testing.assert_close(ratio, torch.tensor([[0.2, 0.0, 0.7]]))


def test_lockstep_equals_capture_and_inject():
    g = torch.Generator().manual_seed(0)
    key, value = torch.randn(6, 2, 7, 4, generator=g), torch.randn(6, 2, 7, 4, generator=g)
    ratio = torch.rand(2, 5, generator=g)  # two clips, five video tokens after two text tokens
    together = FusionContext("lockstep", ratio).process("a", key, value, 2, ratio)
    capture = FusionContext("capture", ratio)
    capture.process("a", key[4:], value[4:], 2, ratio)
    inject = FusionContext("inject", ratio, source=capture.record.captured)
    apart = inject.process("a", key[:4], value[:4], 2, ratio)
    for one, other, original in zip(together, apart, (key, value), strict=True):
        assert torch.equal(one[:4], other)
        assert torch.equal(one[4:], original[4:])  # the source itself is never touched
        assert torch.equal(one[:, :, :2], original[:, :, :2])  # nor is text
        assert not torch.equal(one[:4, :, 2:], original[:4, :, 2:])


def test_rows_that_are_no_whole_batches_are_refused():
    ratio, rows = torch.ones(2, 5), torch.zeros(3, 1, 5, 2)
    with pytest.raises(AttentionError, match="3 rows; expected a multiple of the batch of 2"):
        FusionContext("lockstep", ratio).process("a", rows, rows, 0, ratio)


def hooks_of(model: nn.Module) -> list:
    return [(n, dict(m._forward_hooks), dict(m._forward_pre_hooks)) for n, m in model.named_modules()]


def test_the_layers_of_wan_are_its_self_attention(setup):
    layers = find_layers(setup.model)
    assert [s.name for s in layers.layers] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert layers.patch == (1, 2, 2)
    assert token_grid(setup.source.shape, layers.patch) == (3, 4, 4)
    assert [s.name for s in layers.select([-1]).layers] == ["blocks.1.attn1"]
    assert [s.name for s in layers.select(slice(0, 1)).layers] == ["blocks.0.attn1"]
    with pytest.raises(AttentionError, match=r"this model has 2 layers, 0 to 1"):
        layers.select([2])
    with pytest.raises(AttentionError, match="multiple of its patch size"):
        token_grid((1, 4, 3, 7, 8), layers.patch)


def test_layers_are_found_behind_functions_and_wrappers(setup):
    model = setup.model

    def closure(x, sigma, cond):
        return model(x, sigma, cond=cond)

    class Wrapper:
        def __init__(self) -> None:
            self.inner_model = model

        def __call__(self, x, sigma, **kw):
            return self.inner_model(x, sigma, **kw)

    for wrapped in (closure, Wrapper(), model.forward, kv.CFGDenoiser(model), kv.FlowDenoiser(closure)):
        assert len(find_layers(wrapped).layers) == 2


def test_the_error_for_a_model_without_layers_says_what_to_pass():
    with pytest.raises(
        AttentionError, match=r"no attention layers found in Linear.*\n.*\n.*\n    KVLock\(model, ..., layers=kv.sdpa"
    ):
        find_layers(nn.Linear(2, 2))
    with pytest.raises(AttentionError, match="no torch module inside"):
        find_layers(lambda x, sigma: x)


class Joint(nn.Module):
    """A foreign model: text first, joint attention, one cross-attention that must be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x, sigma, cond):
        tokens = x.flatten(2).transpose(1, 2)
        joint = torch.cat([cond.expand(len(x), -1, -1), tokens], 1).unsqueeze(1)
        for _ in range(2):
            joint = joint + F.scaled_dot_product_attention(joint, joint, value=joint)
            F.scaled_dot_product_attention(joint, joint[:, :, :2], joint[:, :, :2])
        self.seen.append(joint)
        return joint[:, 0, 2:].transpose(1, 2).reshape(x.shape)


def test_sdpa_layers_lock_any_module_that_calls_sdpa():
    torch.manual_seed(0)
    model, source = Joint(), torch.randn(1, 4, 2, 4, 4)
    mask = torch.zeros(1, 1, 2, 4, 4)
    mask[..., :2] = 1
    layers = kv.sdpa_layers(model, patch=(1, 1, 1), start=2)
    cond = torch.randn(1, 2, 4)
    x, sigma = torch.randn_like(source), torch.ones(1)
    free = model(x, sigma, cond)
    lock = kv.KVLock(model, source=source, mask=mask, policy=kv.Constant(lock=1.0), layers=layers, composite=False)
    with lock:
        locked = lock(x * 3, sigma, cond=cond)
        assert not torch.equal(locked, model(x * 3, sigma, cond))
        assert lock.trace.steps[0].fused_layers == 2
    with pytest.raises(AttentionError, match=r"its calls; choose by kv.sdpa_layers\(..., calls="):
        layers.select([1])
    layers = kv.sdpa_layers(model, patch=(1, 1, 1), start=2, calls=[1])
    with kv.KVLock(model, source=source, mask=mask, policy=kv.Constant(1.0), layers=layers) as lock:
        lock(x, sigma, cond=cond)
        assert lock.trace.steps[0].fused_layers == 1
    assert torch.equal(model(x, sigma, cond), free)


def test_sdpa_layers_that_do_not_fit_say_which_calls_were_seen():
    torch.manual_seed(0)
    model, source = Joint(), torch.randn(1, 4, 2, 4, 4)
    mask = torch.zeros(1, 1, 2, 4, 4)
    mask[..., :2] = 1
    wrong = ({"start": 0}, {"start": 3}, {"patch": (1, 2, 2)}, {"calls": [9]}, {"start": 1, "trailing": 0})
    for change in wrong:
        layers = kv.sdpa_layers(model, **{"patch": (1, 1, 1), "start": 2, **change})
        with (
            kv.KVLock(model, source=source, mask=mask, policy=kv.Constant(1.0), layers=layers) as lock,
            pytest.raises(AttentionError, match="no attention call fitted"),
        ):
            lock(source, torch.ones(1), cond=torch.randn(1, 2, 4))
    with pytest.raises(AttentionError, match="watches a torch module"):
        kv.sdpa_layers(lambda x: x, patch=(1, 1, 1))


class Shortened(nn.Module):
    """It guides in two calls, and in one where both prompts are the same, as in the source's pass."""

    def __init__(self, model) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x, sigma, cond, uncond, cond_scale):
        d_cond = self.inner(x, sigma, cond)
        if torch.equal(cond, uncond):
            return d_cond
        d_uncond = self.inner(x, sigma, uncond)
        return d_uncond + cond_scale * (d_cond - d_uncond)


def test_calls_that_the_sources_pass_lacked_are_named():
    torch.manual_seed(0)
    model, source, mask = Shortened(Joint()), torch.randn(1, 4, 2, 4, 4), torch.zeros(1, 1, 2, 4, 4)
    mask[..., :2] = 1
    options = {"source_args": {"cond": torch.zeros(1, 2, 4)}, "policy": kv.Constant(0.5)}
    layers = kv.sdpa_layers(model, patch=(1, 1, 1), start=2)
    prompts = {"cond": torch.randn(1, 2, 4), "uncond": torch.zeros(1, 2, 4), "cond_scale": 3.0}
    with (
        kv.KVLock(model, source=source, mask=mask, layers=layers, **options) as lock,
        pytest.warns(UserWarning, match=r"(\d) of (?!\1)\d layers saw their attention"),
    ):
        lock(torch.randn_like(source), torch.ones(1), **prompts)


class Causal(nn.Module):
    """Blocks of causal attention, of which tokens can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.out = nn.ModuleList(CausalBlock() for _ in range(2)), nn.Identity()

    def forward(self, x, sigma):
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return self.out(tokens).transpose(1, 2).reshape(x.shape)


class CausalBlock(nn.Module):
    def forward(self, tokens):
        heads = tokens.unsqueeze(1)
        return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)[:, 0]


def test_causal_attention_runs_on_all_tokens_or_not_at_all():
    flow = kv.attention.TokenFlow("out", tokens=("tokens",))
    declared = kv.attention.Architecture("causal", ("*:Causal",), layers=("blocks.*",), patch=(1, 1, 1), flow=flow)
    model, source, mask = Causal(), torch.randn(1, 4, 2, 4, 4), torch.zeros(1, 1, 2, 4, 4)
    mask[..., :2] = 1
    given = {"source": source, "mask": mask, "policy": kv.Constant(1.0), "layers": declared.find(model)}
    with kv.KVLock(model, **given) as lock, pytest.raises(AttentionError, match="foreground=False"):
        lock(torch.randn_like(source), torch.ones(1))
    with kv.KVLock(model, **given, foreground=False) as lock:
        lock(torch.randn_like(source), torch.ones(1))
    assert lock.trace.steps[0].fused_layers == 2


class WithImage(nn.Module):
    """Its layer attends to the video, then to the tokens of an image, as an IP-Adapter's does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ImageBlock()])

    def forward(self, x, sigma, image):
        tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)
        return self.blocks[0](tokens, image.unsqueeze(1))[:, 0].transpose(1, 2).reshape(x.shape)


class ImageBlock(nn.Module):
    def forward(self, tokens, image):
        own = F.scaled_dot_product_attention(tokens, tokens, tokens)
        return own + F.scaled_dot_product_attention(tokens, image, image)


def test_what_a_layer_attends_to_besides_the_video_is_left_alone():
    declared = kv.attention.Architecture("image", ("*:WithImage",), layers=("blocks.*",), patch=(1, 1, 1))
    torch.manual_seed(0)
    model, source, mask = WithImage(), torch.randn(1, 4, 2, 4, 4), torch.zeros(1, 1, 2, 4, 4)
    mask[..., :2] = 1
    x, image = torch.randn_like(source), torch.randn(1, 3, 4)
    options = {"source": source, "mask": mask, "policy": kv.Constant(1.0), "composite": False, "noise": x - source}
    with kv.KVLock(model, **options, layers=declared.find(model)) as lock:
        found = lock(x, torch.ones(1), image=image)
    tokens, old = (z.flatten(2).transpose(1, 2) for z in (x, source + (x - source)))
    keys = torch.where(mask.flatten(2).transpose(1, 2) > 0, tokens, old)
    attended = F.scaled_dot_product_attention(tokens, keys, keys) + F.scaled_dot_product_attention(tokens, image, image)
    torch.testing.assert_close(found, attended.transpose(1, 2).reshape(x.shape))
    assert lock.trace.steps[0].fused_layers == 1


def test_keys_of_a_block_on_another_device_are_fused_there():
    ratio, keys = torch.ones(1, 6), torch.empty(3, 2, 6, 4, device="meta")
    fused, _ = FusionContext("lockstep", ratio).process("layer", keys, keys, 0, ratio)
    assert fused.device.type == "meta"


class Skipping(nn.Module):
    """It computes its attention up to the second evaluation, and remembers it from there on."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.layers, self.calls, self.kept = layers, 0, {}

    def forward(self, x, sigma):
        tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)
        self.calls += 1
        for layer in range(2):
            if layer >= self.layers or self.calls <= 2:
                self.kept[layer] = F.scaled_dot_product_attention(tokens, tokens, tokens)
            tokens = tokens + self.kept[layer]
        return tokens[:, 0].transpose(1, 2).reshape(x.shape) / 4


@pytest.mark.parametrize(("skipped", "locks"), [(2, [0.5, 0.5, 0, 0]), (1, [0.5] * 4), (0, [0.5] * 4)])
def test_attention_that_is_skipped_later_is_told_and_the_trace_says_what_acted(skipped, locks):
    torch.manual_seed(0)
    model, source = Skipping(skipped), torch.randn(1, 4, 2, 4, 4)
    mask = torch.zeros(1, 1, 2, 4, 4)
    mask[..., :2] = 1
    layers = kv.sdpa_layers(model, patch=(1, 1, 1))
    with (
        warnings.catch_warnings(record=True) as seen,
        kv.KVLock(model, source=source, mask=mask, policy=kv.Constant(0.5), layers=layers) as lock,
    ):
        warnings.simplefilter("always")
        for sigma in (3.0, 2.0, 1.0, 0.5):
            lock(source + sigma * torch.randn(source.shape), torch.full((1,), sigma))
    left = 2 - skipped
    assert [step.fused_layers for step in lock.trace] == [2, 2, left, left]
    assert [float(step.lock) for step in lock.trace] == locks
    assert [str(w.message).startswith(f"{left} of 2 layers saw their attention. Is it") for w in seen] == [True] * (
        2 if skipped else 0
    )


@pytest.mark.parametrize("patch", [2, None, (1, 2), (1, 2.0, 2), (1, 0, 2)])
def test_a_patch_is_three_integers(patch):
    with pytest.raises(AttentionError, match="expected latents per token"):
        kv.sdpa_layers(nn.Identity(), patch=patch)
    with pytest.raises(AttentionError, match="expected latents per token"):
        kv.attention.Architecture("mine", ("mine:DiT",), ("blocks.*",), patch)


def test_a_model_that_never_calls_the_function_is_told_so(setup):
    layers = kv.sdpa_layers(nn.Conv3d(4, 4, 1), patch=(1, 2, 2))
    with (
        kv.KVLock(lambda x, sigma: x, source=setup.source, mask=setup.mask, policy="full", layers=layers) as lock,
        pytest.raises(AttentionError, match=r"never called F\.scaled_dot_product_attention"),
    ):
        lock(setup.x, setup.sigmas[:1])


def test_a_layer_that_never_fires_is_an_error(setup):
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = setup.model.inner_model.transformer

        def forward(self, x, sigma, cond):
            return x * 0.5

    with (
        kv.KVLock(Detached(), source=setup.source, mask=setup.mask, policy=kv.Constant(1.0)) as lock,
        pytest.raises(AttentionError, match="none of the model's 2 attention layers fired"),
    ):
        lock(setup.x, setup.sigmas[:1], cond=setup.cond)


def test_calls_from_elsewhere_are_untouched(setup):
    """The bare model, called inside the block, in this thread and in another one during a locked call."""
    sigma = torch.ones(1)
    plain = setup.model(setup.x, sigma, cond=setup.cond)
    results: list[torch.Tensor] = []
    inside, done = threading.Event(), threading.Event()

    def other_thread() -> None:
        inside.wait(30)
        results.append(setup.model(setup.x, sigma, cond=setup.cond))
        done.set()

    thread = threading.Thread(target=other_thread)
    thread.start()

    def wait(module, args):
        if not done.is_set() and threading.current_thread() is threading.main_thread():
            inside.set()
            done.wait(30)

    with setup.lock(policy=kv.Constant(lock=1.0), composite=False) as lock:
        assert torch.equal(setup.model(setup.x, sigma, cond=setup.cond), plain)
        handle = setup.model.inner_model.transformer.blocks[1].register_forward_pre_hook(wait)
        locked = lock(setup.x, sigma, cond=setup.cond)
        handle.remove()
    thread.join()
    assert torch.equal(results[0], plain)
    assert not torch.equal(locked, plain)


@pytest.mark.parametrize("where", ["model", "sampler", "policy", "nested", "repeated"])
def test_nothing_is_left_behind(setup, where):
    before = hooks_of(setup.model)
    sigma = torch.ones(1)
    plain = setup.model(setup.x, sigma, cond=setup.cond)

    class BoomError(Exception):
        pass

    def failing_sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        model(x, sigmas[:1], **extra_args)
        raise BoomError

    def failing_policy(obs):
        raise BoomError

    def fail(module, args):
        raise BoomError

    lock = setup.lock(policy=kv.Constant(lock=1.0))
    if where == "model":
        handle = setup.model.inner_model.transformer.blocks[0].attn1.to_out[0].register_forward_pre_hook(fail)
        with pytest.raises(BoomError):
            lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
        handle.remove()
    elif where == "sampler":
        with pytest.raises(BoomError):
            lock.sample(failing_sampler, setup.x, setup.sigmas, extra_args=setup.cfg)
    elif where == "policy":
        failing = setup.lock(policy=kv.stateless(failing_policy))
        with pytest.raises(BoomError):
            failing.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    elif where == "nested":
        with lock, setup.lock(policy=kv.Constant(lock=0.5)) as inner, lock:
            inner(setup.x, sigma, cond=setup.cond)
            lock(setup.x, sigma, cond=setup.cond)
    else:
        outs = [lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg) for _ in range(2)]
        assert torch.equal(*outs)
    assert hooks_of(setup.model) == before
    assert torch.equal(setup.model(setup.x, sigma, cond=setup.cond), plain)
    from torch.overrides import _len_torch_function_stack

    assert _len_torch_function_stack() == 0


def test_fused_projections_give_the_same_lock(setup):
    def run():
        return setup.lock(policy=kv.Constant(lock=0.7)).sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)

    plain = run()
    setup.model.inner_model.transformer.fuse_qkv_projections()
    torch.testing.assert_close(run(), plain, rtol=1e-4, atol=1e-4)


def test_foreground_keys_are_untouched_and_background_keys_are_the_sources(setup):
    """At every layer, seen from inside the attention call."""
    seen = []
    original = FusionContext.process

    def spy(self, layer, key, value, start, ratio):
        out = original(self, layer, key, value, start, ratio)
        seen.append((self.ratio, key, value, out))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusionContext, "process", spy)
        with setup.lock(policy=kv.Constant(lock=1.0), foreground=False) as lock:
            lock(setup.x, setup.sigmas[:1], **setup.cfg)
    assert len(seen) == 2
    for ratio, key, value, (new_key, new_value) in seen:
        background = ratio[0] > 0
        assert 0 < background.sum() < background.numel()
        for old, new in ((key, new_key), (value, new_value)):
            assert torch.equal(new[:, :, ~background], old[:, :, ~background])
            assert torch.equal(new[:2, :, background], old[2:, :, background].expand(2, -1, -1, -1))


def test_hooks_do_nothing_without_a_frame(setup):
    sigma = torch.ones(1)
    plain = setup.model(setup.x, sigma, cond=setup.cond)
    with setup.lock(policy=kv.Constant(lock=1.0)) as lock:
        assert torch.equal(setup.model(setup.x, sigma, cond=setup.cond), plain)
        lock(setup.x, sigma, cond=setup.cond)
        assert torch.equal(setup.model(setup.x, sigma, cond=setup.cond), plain)


class Strange(nn.Module):
    """Text stands first in the second layer alone, and the last norm takes it, too. Blocks hold their parts by name."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList([nn.ModuleDict({"attn": Mixing()})])
        self.single = nn.ModuleList([nn.ModuleDict({"attn": Mixing()})])
        self.norm = nn.LayerNorm(4)

    def forward(self, x, sigma, text):
        tokens = self.pairs[0]["attn"](x.flatten(2).transpose(1, 2))
        both = self.norm(self.single[0]["attn"](torch.cat([text, tokens], 1)))
        return both[:, text.shape[1] :].transpose(1, 2).reshape(x.shape)


class Mixing(nn.Module):
    def forward(self, tokens):
        heads = tokens.unsqueeze(1)
        return tokens + F.scaled_dot_product_attention(heads, heads, heads)[:, 0]


def strange(**changed: Any) -> kv.attention.Architecture:
    flow = kv.attention.TokenFlow(changed.pop("leave", "norm"), tokens=("tokens",))
    first = kv.attention.LayerPattern("pairs.*.attn", text="none")
    declared = {"layers": (first, "single.*.attn"), "patch": (1, 1, 1), "text": "first", "text_arguments": ("text",)}
    return kv.attention.Architecture("strange", (f"{__name__}:Strange",), flow=flow, **{**declared, **changed})


@pytest.mark.parametrize("length", [5, 16])  # as many as are kept: what is narrow is then as long as the video
@pytest.mark.parametrize("batched", [True, False])
def test_text_in_later_layers_and_in_the_last_norm(batched, length):
    model, source, mask = Strange(), torch.randn(1, 4, 2, 4, 4), torch.zeros(1, 1, 2, 4, 4)
    mask[..., :2] = 1
    layers = strange().find(model)
    assert layers.narrows
    given = {"source": source, "mask": mask, "policy": kv.Constant(1.0), "layers": layers, "batched": batched}
    x, text = torch.randn_like(source), torch.randn(1, length, 4)
    found = []
    for foreground in (None, False):
        with kv.KVLock(model, **given, foreground=foreground) as lock:
            found.append(lock(x, torch.ones(1), text=text))
    torch.testing.assert_close(*found)
    assert not torch.allclose(found[0], model(x, None, text), atol=1e-3)


def test_slips_in_a_declaration_are_told():
    with pytest.raises(AttentionError, match="no module is named 'nrm', as flow= says"):
        strange(leave="nrm").find(Strange())
    for wrong in (Strange, "Strange"):
        with pytest.raises(AttentionError, match=r'expected the name "package.module:Class"'):
            kv.attention.Architecture("strange", (wrong,), ("pairs.*.attn",))
    with pytest.raises(AttentionError, match=r"patch=None; expected latents per token .* patch=\(1, 2, 2\)"):
        kv.attention.Architecture("strange", ("*:Strange",), ("pairs.*.attn",)).find(Strange())
