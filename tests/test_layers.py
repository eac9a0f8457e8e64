"""Every architecture keeps what a lock promises; whatever does not is told so."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from networks import FAMILIES, random_network
from torch import nn

import kvlock_sampling as kv
from kvlock_sampling.attention import (
    Architecture,
    AttentionLayer,
    FusionContext,
    LayerPattern,
    TokenFlow,
    context,
    find_layers,
)
from kvlock_sampling.attention.architectures import BUILT_IN
from kvlock_sampling.testing import check_layers
from kvlock_sampling.types import AttentionError, KVLockError

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast", "ignore:.*deprecated")

FUSED = {"wan-vace": 3, "sd3.5": 3}
"""AttentionLayers of one evaluation; two everywhere else."""

ODD = (3, 3, 5)

AGAIN = ("-2.2", "-ti2v", "-df", "-2b", "-1.5", "-image", "-guided", "-kontext", "-edit", "-2511", "3.5", "-refiner")
"""Endings of the second and third form of a class: half precision is tried once for each class."""


@pytest.mark.parametrize("name", FAMILIES)
def test_every_architecture_keeps_every_promise(name):
    """At odd sizes, two clips, with texts of two lengths, in single and half precision."""
    made = random_network(name, grid=ODD)
    sigma = (2.0, 0.5) if name == "wan-2.2" else 0.7
    # Kandinsky embeds time in float32 under CUDA's autocast: its class has no half precision elsewhere.
    again = name.endswith(AGAIN) and name not in ("hunyuan-image", "hunyuan-video-1.5", "qwen-image", "z-image")
    half = None if again or name == "kandinsky5" else torch.bfloat16
    check_layers(
        made.denoiser,
        made.x,
        made.extra_args,
        layers=made.layers,
        expected=FUSED.get(name, 2),
        sigma=sigma,
        half=half,
    )


def test_every_architecture_is_tried():
    made = [random_network(name) for name in FAMILIES]
    tried = {type(part).__name__ for one in made for part in one.denoiser.modules() if known_to(part)}
    entries = {entry for family in BUILT_IN for entry in family.classes}
    known = {entry.partition(":")[2] for entry in entries if not entry.startswith("comfy.")}  # tried in test_comfy.py
    assert known <= tried


def known_to(module):
    return any(family.matches(module) for family in BUILT_IN)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("wan-vace", ["vace_blocks.0.attn1", "blocks.0.attn1", "blocks.1.attn1"]),
        ("hunyuan-video", ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]),
        ("ltx-2", ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]),
        ("sd3.5", ["transformer_blocks.0.attn", "transformer_blocks.1.attn", "transformer_blocks.0.attn2"]),
        ("z-image", ["layers.0.attention", "layers.1.attention"]),
        ("wan-2.2", ["0.blocks.0.attn1", "0.blocks.1.attn1", "1.blocks.0.attn1", "1.blocks.1.attn1"]),
    ],
)
def test_layers_are_self_attention_alone(name, layers):
    assert [layer.name for layer in random_network(name).layers.layers] == layers


def test_a_function_around_a_network_is_seen_through_wrappers():
    made = random_network("wan")
    network = made.layers.networks[0]
    for model in (
        kv.FlowDenoiser(lambda z, t, **given: network(z, t, **given)),
        kv.CFGDenoiser(kv.FlowDenoiser(lambda z, t, **given: network(z, t, **given))),
    ):
        assert kv.find_layers(model).networks == (network,)


def test_layers_of_experts_are_counted_in_each():
    made = random_network("wan-2.2")
    assert [s.name for s in made.layers.select([-1]).layers] == ["0.blocks.1.attn1", "1.blocks.1.attn1"]
    check_layers(
        made.denoiser, made.x, made.extra_args, layers=made.layers.select([1]), expected=1, sigma=(2, 0.5), half=None
    )


@pytest.mark.parametrize("name", ["wan", "wan-vace", "cogvideox", "flux", "qwen-image"])
def test_fused_projections_keep_every_promise_too(name):
    made = random_network(name)
    before = made.denoiser(made.x, torch.ones(2), **made.extra_args)
    made.denoiser.inner_model.network.fuse_qkv_projections()
    torch.testing.assert_close(made.denoiser(made.x, torch.ones(2), **made.extra_args), before, rtol=1e-4, atol=1e-4)
    check_layers(made.denoiser, made.x, made.extra_args, expected=FUSED.get(name, 2), half=None)


def mask_of(x):
    mask = torch.zeros_like(x[:, :1])
    mask[..., : x.shape[-1] // 2] = 1
    return mask


@pytest.mark.parametrize("name", ["cogvideox", "hunyuan-video", "mochi", "flux", "qwen-image"])
def test_a_source_with_a_longer_prompt_of_its_own(name):
    """Then it cannot share a call with the edit; the video stands elsewhere in its sequences."""
    torch.manual_seed(1)
    made = random_network(name)
    cond = made.extra_args["cond"]
    longer = {k: torch.cat([v, v], 1) if k in ("text", "valid") else v for k, v in cond.items()}
    if name == "cogvideox":  # has room for five words, and takes fewer
        longer = {"text": cond["text"][:, :4]}
    source, noise = torch.randn_like(made.x), torch.randn_like(made.x)
    given = {"source": source, "mask": mask_of(made.x), "noise": noise, "composite": False, "layers": made.layers}

    def locked(prompt):
        lock = kv.KVLock(made.denoiser, policy=kv.Constant(lock=1.0), source_args={"cond": prompt}, **given)
        with lock:
            out = lock(made.x, torch.ones(2), cond=cond)
        assert lock.trace.steps[0].fused_layers == 2
        return out

    doubled = {k: torch.cat([v, torch.zeros_like(v)], 1) if k == "valid" else longer[k] for k, v in cond.items()}
    own, other = locked(cond), locked(longer)
    assert (own - other).abs().max() > 1e-3  # the source reads its own prompt
    if name in ("hunyuan-video", "mochi"):  # the same words and masked padding are the same prompt
        torch.testing.assert_close(locked(doubled), own, rtol=1e-3, atol=1e-4)


def test_experts_take_turns_in_one_run():
    made = random_network("wan-2.2")
    networks = made.denoiser.inner_model.network
    calls = []
    for which, expert in enumerate((networks.transformer, networks.transformer_2)):
        expert.register_forward_pre_hook(lambda *_, which=which: calls.append(which))
    lock = kv.KVLock(made.denoiser, source=torch.randn_like(made.x), mask=mask_of(made.x), policy=kv.Constant(lock=0.5))
    sigmas = torch.tensor([4.0, 1.5, 0.6, 0.2, 0.0])
    out = lock.sample("euler", made.x, sigmas, extra_args=made.extra_args)
    assert calls == [0, 0, 1, 1]
    assert [step.fused_layers for step in lock.trace.steps] == [2, 2, 2, 2]
    assert out.isfinite().all()


class Packed(nn.Module):
    """A denoiser of packed tokens, as pipelines of LTX and Flux have them."""

    def __init__(self, made) -> None:
        super().__init__()
        self.inner_model, self.like = made.denoiser, made.x.shape[1:]
        self.patch = 2 if made.x.ndim == 4 else 1

    def forward(self, x, sigma, cond):
        from networks.base import packed, unpacked

        z = unpacked(x, torch.empty(len(x), *self.like), self.patch)
        return packed(self.inner_model(z, sigma, cond=cond), self.patch)


@pytest.mark.parametrize("name", ["ltx", "flux", "qwen-image"])
def test_packed_latents_keep_every_promise(name):
    from networks.base import packed

    made = random_network(name)
    x = packed(made.x, 2 if made.x.ndim == 4 else 1)
    assert x.ndim == 3
    check_layers(Packed(made), x, made.extra_args, expected=2, half=None)


def test_a_model_that_guides_itself_keeps_every_promise():
    made = random_network("cogvideox")
    cond = made.extra_args["cond"]
    guided = {"cond": cond, "uncond": {"text": 0 * cond["text"]}, "cond_scale": 3.0}
    check_layers(kv.CFGDenoiser(made.denoiser), made.x, guided, expected=2, half=None)


class FlowClock(nn.Module):
    """A flow model under its own clock: x = sigma * noise + (1 - sigma) * x0, sigma in (0, 1]."""

    def __init__(self, inner_model) -> None:
        super().__init__()
        self.inner_model = inner_model

    def forward(self, x, sigma, cond):
        return x - sigma.view(-1, 1, 1, 1, 1) * self.inner_model(x, sigma, cond)

    def add_noise(self, x0, noise, sigma):
        return sigma * noise + (1 - sigma) * x0

    def to_ve(self, sigma):
        return sigma / (1 - sigma)


def test_a_model_with_its_own_clock_keeps_every_promise():
    made = random_network("wan")
    check_layers(FlowClock(made.denoiser.inner_model), made.x, made.extra_args, expected=2)


# -- what does not fit -------------------------------------------------------------------------------------------------


def refused(made, match: str, denoiser=None, **options) -> None:
    given = {"layers": made.layers, "half": None, **options}
    with pytest.raises(AttentionError, match=match):
        check_layers(denoiser or made.denoiser, made.x, made.extra_args, **given)


def with_text(layers, text):
    return replace(layers, layers=tuple(replace(layer, text=text) for layer in layers.layers))


def also(made, *names: str):
    modules = dict(made.denoiser.inner_model.network.named_modules())
    return replace(made.layers, layers=(*made.layers.layers, *(AttentionLayer(name, modules[name]) for name in names)))


def test_a_wrong_patch():
    made = random_network("wan", grid=(2, 3, 4))
    refused(made, "attends over 24 tokens; expected the mask's 48", layers=replace(made.layers, patch=(1, 2, 1)))
    # As many tokens, in other places.
    refused(made, r"(?s)moves position .* patch= is not the network's", layers=replace(made.layers, patch=(2, 1, 2)))


@pytest.mark.parametrize(
    ("name", "wrong", "match"),
    [
        ("hunyuan-video", "first", 'comes first: declare text="last"'),
        ("sd3", "first", 'comes first: declare text="last"'),
        ("flux", "last", 'comes last: declare text="first"'),
        ("cogvideox", "last", 'comes last: declare text="first"'),
        ("cogvideox", "none", "attends over 29 tokens; expected the mask's 24"),
    ],
)
def test_a_wrong_place_of_the_text(name, wrong, match):
    made = random_network(name)
    refused(made, match, layers=with_text(made.layers, wrong))


def test_cross_attention_and_refiners():
    made = random_network("wan")
    refused(made, r"'blocks.0.attn2' attends over 5 tokens", layers=also(made, "blocks.0.attn2"))
    made.extra_args["cond"]["text"] = torch.randn(2, 24, 8)  # as many words as the video has tokens
    refused(made, "(?s)attn2': its keys and values do not change.*cross-attention", layers=also(made, "blocks.0.attn2"))
    made = random_network("hunyuan-video")
    refiner = "context_embedder.token_refiner.refiner_blocks.0.attn"
    refused(made, "refiner_blocks.0.attn' attends over 5 tokens", layers=also(made, refiner))


def test_layers_that_never_run():
    made = random_network("wan")
    refused(made, "none of the model's 2 attention layers fired", layers=find_layers(copy.deepcopy(made.denoiser)))
    idle = AttentionLayer("idle", nn.Identity())
    refused(
        made,
        r"1 of 3 layers never ran at sigma=\[0.7\]: idle",
        layers=replace(made.layers, layers=(*made.layers.layers, idle)),
    )
    refused(made, "2 layers were fused in one evaluation.*\n?.*expected 3", expected=3)
    made = random_network("wan-2.2")
    refused(made, r"(?s)2 of 4 layers never ran at sigma=\[2.0\].*sigma=\(8.0, 0.5\)", sigma=2.0)


@pytest.mark.parametrize("name", ["flux-kontext", "qwen-image-edit", "ltx-guided", "framepack"])
def test_tokens_without_a_declaration(name):
    made = random_network(name)
    before, after = made.layers.extra
    match = rf"If {before + after} tokens are reference frames or guides"
    if name == "ltx-guided":
        match = rf"(?s)attends over 36 tokens; expected the mask's 24.*with_extra\(after={after}\)"
    refused(made, match, layers=replace(made.layers, extra=(0, 0)))
    elsewhere = "comes first.*with_extra.after" if name == "ltx-guided" else "another order"
    refused(made, f"(?s)moves position.*{elsewhere}", layers=replace(made.layers, extra=(after, before)))


class Changed(nn.Module):
    """A network whose input and output are changed by the way."""

    def __init__(self, inner_model, before=lambda x: x, after=lambda x: x) -> None:
        super().__init__()
        self.inner_model, self.before, self.after = inner_model, before, after

    def forward(self, x, sigma, cond):
        turned = {name: self.before(value) for name, value in cond.items()}
        return self.after(self.inner_model(self.before(x), sigma, cond=turned))


def test_rows_in_another_order():
    made = random_network("wan")
    flipped = Changed(made.denoiser, before=lambda x: x.flip(0), after=lambda x: x.flip(0))
    refused(made, "(?s)moves position.*rows of its batch are in another order", flipped)


def test_clips_that_are_mixed():
    made = random_network("wan")
    refused(made, "gives clip 0 alone another answer", Changed(made.denoiser, after=lambda x: x - x.mean(0)))


def test_a_model_that_draws_its_own_noise():
    made = random_network("wan")
    noisy = Changed(made.denoiser, after=lambda x: x + 0.1 * torch.randn_like(x))
    refused(made, "the same call gave another answer", noisy)


def test_a_network_in_which_attention_has_no_say():
    made = random_network("wan")
    for block in made.denoiser.inner_model.network.blocks:
        block.attn1.to_out[0].weight.zero_()
    refused(made, r"(?s)lock 1 to another clip changed the output by .*Attention has no say")


def test_a_model_that_leaves_hooks_behind():
    made = random_network("wan")

    def leave(x):
        made.denoiser.inner_model.network.blocks[0].register_forward_hook(lambda *_: None)
        return x

    refused(made, "something stayed behind on WanTransformerBlock", Changed(made.denoiser, after=leave))


def test_a_token_flow_that_leaves_something_out():
    made = random_network("wan")
    assert made.layers.narrows
    refused(made, "leaving fully locked tokens out.* fails", layers=replace(made.layers, flow=TokenFlow("norm_out")))
    flow = replace(made.layers.flow, leave="patch_embedding")  # where only a pass of the source's own comes by
    refused(made, "leaving fully locked tokens out.* fails", layers=replace(made.layers, flow=flow))


def test_arguments_that_tell_nothing():
    made = random_network("wan")
    with pytest.raises(AttentionError, match="expected floating latents of two clips or more"):
        check_layers(made.denoiser, made.x[:1], made.extra_args)
    one = random_network("wan", grid=(1, 1, 1))
    with pytest.raises(AttentionError, match=r"has 1 token of .* expected two or more"):
        check_layers(one.denoiser, one.x, one.extra_args)
    kandinsky = random_network("kandinsky5")
    with pytest.raises(AttentionError, match=r"(?s)a copy of the denoiser in torch.bfloat16 fails: .*half=None"):
        check_layers(kandinsky.denoiser, kandinsky.x, kandinsky.extra_args)
    with pytest.raises(KVLockError, match="no random network is called 'wann'"):
        random_network("wann")


def test_a_first_call_that_fails_is_not_reported_as_a_broken_promise():
    made = random_network("wan")
    network = made.denoiser.inner_model.network
    for denoiser, x, arguments, message in (
        (made.denoiser, made.x, None, r"\(x, sigma\), x of shape .* raised TypeError.*extra_args"),
        (network, made.x, None, r"raised TypeError: .*missing.*kv\.FlowDenoiser\(network"),
        (
            made.denoiser,
            made.x[:, :, 0],
            made.extra_args,
            r"\(x, sigma, cond=\), x of shape \(\d+, \d+, \d+, \d+\), .*raised",
        ),
        (Changed(made.denoiser, after=lambda x: (x,)), made.x, made.extra_args, "returned something of type tuple"),
        (Changed(made.denoiser, after=lambda x: x[:, :1]), made.x, made.extra_args, r"returned something of shape"),
    ):
        with pytest.raises(AttentionError, match=f"(?s){message}.*") as caught:
            check_layers(denoiser, x, arguments)
        assert "x0-hat, shaped like x" in str(caught.value)


def test_the_arguments_of_a_whole_run_are_welcome():
    made = random_network("wan")
    whole = {**made.extra_args, "uncond": made.extra_args["cond"], "cond_scale": 5.0}
    check_layers(made.denoiser, made.x, whole, layers=made.layers, half=None)


# What the library itself might do wrong is seen as well.


def test_a_fusion_that_is_not_exact(monkeypatch):
    made = random_network("cogvideox")
    fuse = context.fuse_rows
    monkeypatch.setattr(context, "fuse_rows", lambda own, kept, ratio, *rest: fuse(own, kept, ratio * 0.999, *rest))
    refused(made, "keys of background tokens are not exactly the source's")
    least = 0.01
    monkeypatch.setattr(
        context, "fuse_rows", lambda own, kept, ratio, *rest: fuse(own, kept, ratio.clamp(least), *rest)
    )
    refused(made, "keys of edited or text tokens are not exactly the edit's own")


def test_a_lockstep_that_takes_the_wrong_rows(monkeypatch):
    made = random_network("cogvideox")
    process = FusionContext.process

    def wrong(self, layer, key, value, start, ratio):
        if self.mode == "lockstep":
            order = torch.arange(len(key)).view(-1, len(self.ratio)).flip(1).flatten()
            process(self, layer, key, value, start, ratio)
            swapped = process(self, layer, key[order], value[order], start, ratio)
            return swapped[0][order], swapped[1][order]
        return process(self, layer, key, value, start, ratio)

    monkeypatch.setattr(FusionContext, "process", wrong)
    refused(made, "the source as rows of the same call, and in a pass of its own, gave two answers")


# -- models without a declaration --------------------------------------------------------------------------------------


class Foreign(nn.Module):
    """Joint attention, text first, rows of h, then w; one cross-attention."""

    def __init__(self, window: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(4, 4, generator=generator) for _ in range(3))
        self.window = window

    def forward(self, x, sigma, cond):
        tokens = x.flatten(2).transpose(1, 2)
        joint = torch.cat([cond, tokens], 1)
        for weight in self.weights:
            q = k = (joint @ weight).unsqueeze(1)
            joint = joint + F.scaled_dot_product_attention(q, k, joint.unsqueeze(1))[:, 0]
            if self.window:
                F.scaled_dot_product_attention(q[..., :3, :], k[..., :3, :], k[..., :3, :])
        return joint[:, 2:].transpose(1, 2).reshape(x.shape)


def test_any_module_that_calls_attention():
    model, x = Foreign(window=True).requires_grad_(False), torch.randn(2, 4, 2, 3, 3)
    cond = {"cond": torch.randn(2, 2, 4)}
    check_layers(model, x, cond, layers=kv.sdpa_layers(model, patch=(1, 1, 1), start=2), expected=3, sigma=0.2)
    check_layers(
        model, x, cond, layers=kv.sdpa_layers(model, patch=(1, 1, 1), start=2, calls=[2]), expected=1, sigma=0.2
    )
    with pytest.raises(AttentionError, match=r'(?s)video comes last: declare text="first"'):
        check_layers(model, x, cond, layers=kv.sdpa_layers(model, patch=(1, 1, 1), start=0, trailing=2))
    with pytest.raises(AttentionError, match="no attention call fitted"):
        check_layers(model, x, cond, layers=kv.sdpa_layers(model, patch=(1, 1, 1), start=1))


def test_a_declaration_is_checked_where_it_is_made():
    with pytest.raises(AttentionError, match=r"layers='blocks.\*.attn' is one string; expected a tuple"):
        Architecture("mine", ("a:B",), layers="blocks.*.attn", patch=(1, 1, 1))
    with pytest.raises(AttentionError, match=r'text=\'before\'; expected "none", "first" or "last"'):
        Architecture("mine", ("a:B",), layers=("x", LayerPattern("y", text="before")), patch=(1, 1, 1))


class Mine(nn.Module):
    def __init__(self, kinds=(nn.Linear, nn.Bilinear)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": k(2, 2) if k is nn.Linear else k(2, 2, 2)}) for k in kinds)


def test_patterns_say_more_than_a_name():
    def layers(*patterns):
        return [
            (s.name, s.text) for s in Architecture("mine", ("a:B",), patterns, (1, 1, 1), "last").find(Mine()).layers
        ]

    assert layers("blocks.*.attn") == [("blocks.0.attn", "last"), ("blocks.1.attn", "last")]
    assert layers(LayerPattern("blocks.1.*", text="none")) == [("blocks.1.attn", "none")]
    assert layers("blocks.1.attn", LayerPattern("more.*.attn", optional=True)) == [("blocks.1.attn", "last")]
    with pytest.raises(AttentionError, match=r"(?s)is named 'more.\*.attn'.*last name: blocks.0.attn \(Linear\)"):
        layers("more.*.attn")
    with pytest.raises(AttentionError, match=r"is named 'more.\*.attn'"):
        layers(LayerPattern("more.*.attn", optional=True))


def test_a_class_is_known_by_where_it_was_defined():
    class Derived(Mine):
        pass

    def matches(*classes):
        return Architecture("mine", classes, ("blocks.*.attn",), (1, 1, 1)).matches(Derived())

    assert matches(f"{__name__}:Mine")  # a subclass is of the family
    assert matches(f"*{__name__[-4:]}:Mine")
    assert not matches("elsewhere:Mine")
    assert not matches(f"{__name__}:Min")


def test_kandinsky_in_blocks_is_refused():
    made = random_network("kandinsky5")
    made.denoiser.inner_model.network.register_to_config(attention_type="nabla")
    with pytest.raises(AttentionError, match="attention_type='nabla', which puts tokens in the order of 8 x 8 blocks"):
        find_layers(made.denoiser)
