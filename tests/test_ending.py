"""The source is computed as far as its last keys and values, and no further; the edit is the same."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kvlock_sampling as kv
from kvlock_sampling.attention import ending
from kvlock_sampling.testing import check_sites, random_network
from kvlock_sampling.testing.networks import FAMILIES, wan
from kvlock_sampling.testing.networks.base import Called, build, enliven
from kvlock_sampling.types import KVLockError, SiteError
from kvlock_sampling.utils.torchvision import broken_torchvision_hidden

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast", "ignore:.*deprecated")

WHOLE = {"anyflow", "mochi", "qwen-image-edit-2511", "k-diffusion-v2"}
"""Whose rows do not come first, or stand in a mapping, or whose attention is computed row by row."""


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """Whatever other tests have compiled in this process."""
    monkeypatch.setattr(ending, "anything_compiled", lambda: False)
    monkeypatch.setattr("kvlock_sampling.attention.hooks.anything_compiled", lambda: False)


@contextmanager
def rows_of(module: nn.Module):
    """How many rows each call of a module was given, without a hook."""
    seen, forward = [], module.forward

    def counting(*args, **kwargs):
        first = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
        seen.append(len(first))
        return forward(*args, **kwargs)

    module.forward = counting
    try:
        yield seen
    finally:
        del module.forward


def options(made, **more):
    generator = torch.Generator().manual_seed(1)
    source, noise = (torch.randn(made.x.shape, generator=generator) for _ in range(2))
    mask = torch.zeros_like(made.x[:, :1])
    mask[..., : made.x.shape[-1] // 2] = 1
    return {"source": source, "noise": noise, "mask": mask, "composite": False, "sites": made.sites, **more}


def evaluated(made, lock=0.6, extra_args=None, **more):
    with kv.KVLock(made.denoiser, policy=kv.Constant(lock=lock), **options(made, **more)) as locked:
        return locked(made.x, torch.ones(len(made.x)), **made.extra_args, **(extra_args or {}))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sources_rows_leave_after_the_last_site(name, monkeypatch):
    try:
        made = random_network(name, grid=(3, 3, 5))
    except KVLockError as error:
        pytest.skip(str(error).splitlines()[0])
    padded, left = ending._padded, []
    monkeypatch.setattr(ending, "_padded", lambda out, edit, rows: left.append((edit, rows)) or padded(out, edit, rows))
    early = evaluated(made)
    assert set(left) == (set() if name in WHOLE else {(2, 4)})
    whole = evaluated(made, sites=replace(made.sites, rows_first=False))
    torch.testing.assert_close(early, whole, rtol=0, atol=1e-5 * float(whole.std()))


def deep(layers=4):
    """A Wan of several layers, as `random_network` makes them."""
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8,
        "freq_dim": 8, "ffn_dim": 16, "num_layers": layers, "cross_attn_norm": True,
    }  # fmt: skip
    made = random_network("wan", grid=(3, 3, 5))
    network = enliven(build("WanTransformer3DModel", **settings), 0)
    denoiser = kv.FlowDenoiser(Called(network, wan.FAMILIES["wan"].call)).eval()
    return made._replace(denoiser=denoiser, sites=kv.find_sites(denoiser)), network


def test_blocks_after_the_last_locked_layer_run_on_the_edit_alone():
    made, network = deep()
    with rows_of(network.blocks[0].ffn) as first, rows_of(network.blocks[2].ffn) as last:
        early = evaluated(made, layers=[0, 2])
    assert (first, last) == ([4], [2])
    with rows_of(network.blocks[3].ffn) as after:
        evaluated(made, layers=[0, 2])
    assert after == [2]
    whole = evaluated(made, sites=replace(made.sites, rows_first=False), layers=[0, 2])
    torch.testing.assert_close(early, whole, rtol=0, atol=1e-6)


def test_guided_rows_of_several_clips():
    made, _ = deep(3)
    more = {"uncond": {"text": made.extra_args["cond"]["text"].flip(0)}, "cond_scale": 3.0}
    early = evaluated(made, extra_args=more)
    whole = evaluated(made, extra_args=more, sites=replace(made.sites, rows_first=False))
    torch.testing.assert_close(early, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", [{"batched": False}, {"bank": True}])
def test_a_pass_of_the_source_by_itself_is_whole(way):
    """A wrapper around the network may have more to do after it than the lock can know."""
    made, network = deep(3)
    if "bank" in way:
        way = {"bank": kv.Bank(format=None)}
    with rows_of(network.blocks[2].ffn) as last:
        evaluated(made, lock=1.0, **way)
    assert len(last) == 2


class Guides(nn.Module):
    """Does its own guidance, in calls one after the other, the unconditional one first."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x, sigma, cond, cond_scale, empty=None):
        out = []
        for text in (empty or cond, cond):
            self.calls += 1
            out.append(self.inner(x, sigma, cond=text))
        return out[0] + cond_scale * (out[1] - out[0])


def test_of_a_model_that_guides_itself_the_last_call_is_the_sources():
    """Which prompt its first call has nobody knows."""
    made, _ = deep(2)
    generator = torch.Generator().manual_seed(2)
    other = {"text": torch.randn(made.extra_args["cond"]["text"].shape, generator=generator)}
    answers = []
    for empty in (other, None):
        model = Guides(made.denoiser)
        model.sigma_data = 1.0
        own = made._replace(denoiser=model, extra_args={**made.extra_args, "cond_scale": 1.0, "empty": empty})
        answers.append(evaluated(own, sites=kv.find_sites(model)))
        assert model.calls == 4
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-5)  # at scale 1 only the second call counts


def test_gradients_are_those_of_the_whole_call():
    made, _ = deep(2)
    grads = []
    for rows_first in (True, False):
        x = made.x.clone().requires_grad_()
        evaluated(made._replace(x=x), sites=replace(made.sites, rows_first=rows_first)).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_a_hook_inside_the_last_block_sees_whole_calls():
    made, network = deep(2)
    seen = []
    handle = network.blocks[1].ffn.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    evaluated(made)
    handle.remove()
    assert seen == [4]


def test_a_step_cache_that_was_taken_away_is_no_hook():
    with broken_torchvision_hidden():
        from diffusers.hooks import FirstBlockCacheConfig
    _, network = deep(2)
    network.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert not ending.may_end(network)
    network.disable_cache()
    assert ending.may_end(network)


def test_what_cannot_be_cut_is_left_whole():
    class Rows:
        pass

    plain = [torch.ones(4, 2), torch.ones(3), None, {}, [], (torch.ones(4, 2), "b", True), torch.float16]
    assert all(ending.is_plain(each, 4) for each in plain)
    others = [Rows(), torch.ones(4), [torch.ones(4, 2)], {"rows": torch.ones(4, 2)}, (1.0, 2.0, 3.0, 4.0), (Rows(),)]
    assert not any(ending.is_plain(each, 4) for each in others)
    table = torch.ones(5, 3)
    args, kwargs = ending.cut_call(
        (((torch.arange(8).view(4, 2), (table, 4)),), {"b": torch.ones(4, 1)}), 4, slice(0, 3)
    )
    assert args[0][0].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert args[0][1][0] is table
    assert args[0][1][1] == 4
    assert len(kwargs["b"]) == 3


@pytest.mark.parametrize("grid", [(4, 2, 3), (2, 4, 3), (2, 3, 4), (1, 2, 2)])
@pytest.mark.parametrize("name", ["allegro", "qwen-image", "cosmos"])
def test_rows_that_are_as_many_as_tokens_along_an_axis_stay(name, grid):
    """A table of positions could be taken for rows: Allegro's are one along each axis."""
    made = random_network(name, grid=grid)
    whole = evaluated(made, sites=replace(made.sites, rows_first=False))
    torch.testing.assert_close(evaluated(made), whole, rtol=0, atol=1e-5 * float(whole.std()))


def test_a_site_that_does_not_act_keeps_the_source_to_the_end(monkeypatch):
    """Say, a layer that is skipped for some rows: then nothing is known to be the last."""
    made, network = deep(2)
    forward, calls = network.blocks[1].attn1.forward, []

    def skipping(hidden_states, *args, **kwargs):
        calls.append(len(hidden_states))
        return hidden_states if len(hidden_states) == 2 else forward(hidden_states, *args, **kwargs)

    network.blocks[1].attn1.forward = skipping
    out = evaluated(made)
    assert calls == [2, 4]  # tried alone, then whole
    whole = evaluated(made, sites=replace(made.sites, rows_first=False))
    assert torch.equal(out, whole)


def test_an_error_inside_leaves_nothing_behind():
    made, network = deep(2)
    forward = network.blocks[1].ffn.forward

    def failing(x, *args, **kwargs):
        if len(x) == 2:
            raise ValueError("out of luck")
        return forward(x, *args, **kwargs)

    network.blocks[1].ffn.forward = failing
    own = options(made)
    with kv.KVLock(made.denoiser, policy=kv.Constant(lock=0.6), **own) as locked:
        with pytest.raises(ValueError, match="out of luck"):
            locked(made.x, torch.ones(2), **made.extra_args)
        del network.blocks[1].ffn.forward
        again = locked(made.x, torch.ones(2), **made.extra_args)
    torch.testing.assert_close(again, evaluated(made), rtol=0, atol=0)


def test_a_wrong_declaration_is_told():
    made = random_network("qwen-image-edit-2511", grid=(3, 3, 5))
    with pytest.raises(SiteError, match="letting the source's rows leave after the last site fails"):
        check_sites(made.denoiser, made.x, made.extra_args, sites=replace(made.sites, rows_first=True), half=None)


# -- networks that are called, or whose layers act, more than once -----------------------------------------------------


def twice(made, how):
    """A denoiser that calls its network twice, with other latents, in each evaluation."""
    inner = made.denoiser
    call = {"chained": lambda x, s, c: inner(inner(x, s, cond=c), s, cond=c),
            "beside": lambda x, s, c: 0.5 * (inner(x, s, cond=c) + inner(x.flip(-1), s, cond=c))}[how]  # fmt: skip

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x, sigma, cond):
            return call(x, sigma, cond)

    return made._replace(denoiser=Twice())


def tied(made, network):
    network.blocks[3] = network.blocks[2] = network.blocks[1]
    return made._replace(sites=kv.find_sites(made.denoiser))


def again(made, network):
    """The last block's attention acts twice within the block."""
    attention = network.blocks[3].attn1
    forward = attention.forward
    attention.forward = lambda x, *args, **kwargs: forward(forward(x, *args, **kwargs), *args, **kwargs)
    return made


@pytest.mark.parametrize("how", ["chained", "beside", "tied", "again"])
@pytest.mark.parametrize("way", [{}, {"batched": False}, {"foreground": True, "composite": True}])
def test_what_acts_again_is_locked_again(how, way):
    made, network = deep(4)
    made = twice(made, how) if how in ("chained", "beside") else {"tied": tied, "again": again}[how](made, network)
    whole = {**way, "foreground": False, "batched": True, "sites": replace(made.sites, rows_first=False)}
    dense = evaluated(made, lock=1.0, **whole)
    out = evaluated(made, lock=1.0, **way)
    torch.testing.assert_close(out, dense, rtol=0, atol=2e-5 * float(dense.std()))
    off = evaluated(made, lock=0.0, **{k: v for k, v in way.items() if k == "composite"})
    assert (off - dense).abs().max() > 0.01


def test_what_acts_again_is_seen_also_where_its_block_could_not_be_called_apart(monkeypatch):
    """Say, a tool hangs its hooks between two calls of the network: the rows that stand for the source are not it."""
    made = twice(deep(3)[0], "chained")
    asked, may_end = [], ending.may_end
    monkeypatch.setattr(ending, "may_end", lambda block: asked.append(block) or (len(asked) == 1 and may_end(block)))
    out = evaluated(made)
    assert len(asked) > 0
    monkeypatch.setattr(ending, "may_end", may_end)
    torch.testing.assert_close(out, evaluated(made, sites=replace(made.sites, rows_first=False)), rtol=0, atol=1e-5)


def test_a_network_that_is_called_twice_keeps_every_promise():
    made = twice(deep(2)[0], "chained")
    check_sites(made.denoiser, made.x, made.extra_args, half=None)


class Mix(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, generator=generator))

    def forward(self, h):
        q = k = (h @ self.weight).unsqueeze(1)
        return F.scaled_dot_product_attention(q, k, h.unsqueeze(1))[:, 0]


class Layer(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.mix = Mix(generator)

    def forward(self, h, table):
        return h + self.mix(h) * table.mean()


class Tabled(nn.Module):
    """Hands its layers a table with three rows, which are not those of the batch."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(Layer(generator) for _ in range(3))
        self.table = nn.Parameter(torch.tensor([[0.05], [0.1], [0.3]]))

    def forward(self, x, sigma, cond):
        h = x.flatten(2).transpose(1, 2) + cond.mean(1, keepdim=True)
        for layer in self.layers:
            h = layer(h, self.table)
        return h.transpose(1, 2).reshape(x.shape)


def test_a_table_of_three_is_found_by_three_rows():
    """With two clips it would pass for what it is."""
    generator = torch.Generator().manual_seed(0)
    model, x = Tabled().requires_grad_(False), torch.randn(2, 4, 4, 5, 6, generator=generator)
    arguments = {"cond": torch.randn(2, 3, 4, generator=generator)}
    for rows_first in (False, True):
        mine = kv.Architecture("mine", (f"{__name__}:Tabled",), ("layers.*.mix",), (1, 1, 1), rows_first=rows_first)
        given = {"sites": mine.find(model), "half": None, "sigma": 0.2}
        if not rows_first:
            check_sites(model, x, arguments, **given)
            continue
        with pytest.raises(SiteError, match="source's rows leave after the last site changed the edit"):
            check_sites(model, x, arguments, **given)


def test_a_bank_refuses_what_acts_again():
    made = twice(deep(2)[0], "beside")
    with pytest.raises(SiteError, match="acts 2 times in one evaluation; expected once"):
        evaluated(made, lock=1.0, bank=kv.Bank(format=None))


def test_a_weaker_look_of_a_model_that_guides_itself_is_locked_to_the_sources_weaker_look():
    made, _ = deep(3)

    class Auto(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = made.denoiser

        def forward(self, x, sigma, cond, uncond=None, cond_scale=1.0):
            weak = self.inner(0.9 * x, sigma, cond=uncond or cond)
            return weak + cond_scale * (self.inner(x, sigma, cond=cond) - weak)

    text = {"text": made.extra_args["cond"]["text"].flip(0)}
    own = made._replace(denoiser=Auto(), extra_args={**made.extra_args, "uncond": text, "cond_scale": 2.0})
    own = own._replace(sites=kv.find_sites(own.denoiser))
    # Locked in full to what it is itself, under its own prompt, every look is what it was.
    generator = torch.Generator().manual_seed(1)
    source, noise = (torch.randn(made.x.shape, generator=generator) for _ in range(2))
    x = source + noise
    arguments = {**own.extra_args, "uncond": own.extra_args["cond"]}
    plain = own.denoiser(x, torch.ones(2), **arguments)
    mask = torch.zeros_like(x[:, :1])
    mask[..., :4] = 1
    with kv.KVLock(
        own.denoiser, policy=kv.Constant(lock=1.0), source=source, noise=noise, mask=mask, composite=False
    ) as lock:
        out = lock(x, torch.ones(2), **arguments)
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-4)


def test_gradients_do_not_meet_rows_without_a_direction():
    made, network = deep(2)
    norm = network.norm_out.forward
    network.norm_out.forward = lambda x, *args, **kwargs: norm(x / x.norm(dim=-1, keepdim=True), *args, **kwargs)
    network.proj_out.weight.requires_grad_()
    for way in ({}, {"foreground": True, "composite": True}):
        network.proj_out.weight.grad = None
        evaluated(made, lock=1.0, **way).square().sum().backward()
        assert network.proj_out.weight.grad.isfinite().all()
