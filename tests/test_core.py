"""The small rooms: timeline, rows, guidance, source, control, region, trace, plot, imports."""

from __future__ import annotations

import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvlock_sampling as kv
from kvlock_sampling.app.edit import start_noise
from kvlock_sampling.batching import join_calls
from kvlock_sampling.guidance import guide, guide_rescaled
from kvlock_sampling.masks.fitted import FittedMask
from kvlock_sampling.run import Timeline, steps_left
from kvlock_sampling.source import Source
from kvlock_sampling.trace import Trace
from kvlock_sampling.types import KVLockError, MaskError, SourceError, StepInfo
from kvlock_sampling.utils.files import atomic, check_writable, write_atomically
from kvlock_sampling.variance.dropout import dropout_hooks

PACKAGE = Path(kv.__file__).parent


@given(st.lists(st.floats(1e-3, 1e3), max_size=40))
def test_a_timeline_is_always_falling_and_continues_from_the_nearest_above(levels):
    timeline: Timeline[float] = Timeline(depth=100)
    reference: list[float] = []
    for level in levels:
        reference = [r for r in reference if r > level * (1 + 1e-4)]
        assert timeline.rewind(level) == (reference[-1] if reference else None)
        timeline.append(level, level)
        reference.append(level)
        assert [sigma for sigma, _ in timeline._entries] == reference


def test_a_timeline_keeps_a_bounded_past():
    timeline: Timeline[int] = Timeline(depth=3)
    for i in range(10):
        timeline.rewind(2.0**-i)
        timeline.append(2.0**-i, i)
    assert [sigma for sigma, _ in timeline._entries] == [2.0**-7, 2.0**-8, 2.0**-9]


def test_steps_left_counts_the_step_a_noise_level_belongs_to():
    schedule = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
    assert [steps_left(schedule, s) for s in (8.0, 6.0, 4.0, 1.5, 1.0, 0.5, 9.0)] == [4, 4, 3, 2, 1, 1, 4]
    assert steps_left(None, 1.0) is None


def test_rows_join_what_can_share_a_call():
    def join(values, batch):
        joined = join_calls([{"cond": value, "scale": 1.0} for value in values], batch)
        return None if joined is None else joined["cond"]

    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    assert torch.equal(join([a, b], 2), torch.cat([a, b]))
    assert torch.equal(join([a[:1], b], 2), torch.cat([a[:1], a[:1], b]))
    assert join([["x", "y"], ["p", "q"]], 2) == ["x", "y", "p", "q"]
    nested = join([{"t": (a, 1)}, {"t": (b, 1)}], 2)
    assert torch.equal(nested["t"][0], torch.cat([a, b]))
    assert nested["t"][1] == 1
    table = torch.zeros(7, 3)
    assert join([table, table], 2) is table
    for bad in ([a, b[:, :2]], [a, None], [1, 2], [["x"], ["y"]], [torch.zeros(7, 3), table]):
        assert join(bad, 2) is None
    assert join_calls([{"cond": None}, {"cond": None}], 2) == {"cond": None}
    assert join_calls([{"cond": a}, {"cond": a, "mask": b}], 2) is None


def test_guidance_per_sample_and_in_eps():
    g = torch.Generator().manual_seed(0)
    u, c, x = (torch.randn(2, 3, 4, generator=g, dtype=torch.float64) for _ in range(3))
    scale = torch.tensor([1.0, 5.0], dtype=torch.float64)
    sigma = 1.7
    eps_u, eps_c = (x - u) / sigma, (x - c) / sigma
    w = scale.view(-1, 1, 1)
    torch.testing.assert_close(guide(u, c, scale), x - sigma * ((1 - w) * eps_u + w * eps_c))
    star = (eps_c * eps_u).flatten(1).sum(1) / eps_u.square().flatten(1).sum(1)
    expected = x - sigma * ((1 - w) * star.view(-1, 1, 1) * eps_u + w * eps_c)
    torch.testing.assert_close(guide_rescaled(u, c, scale, x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(guide_rescaled(u, c, 1.0, x), c)
    assert torch.equal(guide(u.float(), c.float(), 7.3), u.float() + (c.float() - u.float()) * 7.3)
    on_device = [tensor.to("meta") for tensor in (u, c)]
    assert guide(*on_device, scale).device.type == "meta"  # the scale may be on the host
    assert guide_rescaled(*on_device, scale, on_device[0]).device.type == "meta"


def test_the_source_finds_the_runs_own_noise_for_any_affine_rule():
    g = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(1, 2, 3, generator=g), torch.randn(2, 2, 3, generator=g)
    for rule in (None, lambda x0, n, s: (1 - s) * x0 + s * n):
        source = Source(latents, add_noise=rule)
        x = source.at(torch.zeros(2, 2, 3), 0.6, noise)
        torch.testing.assert_close(source.noise_of_run(x, 0.6), noise)


def test_a_source_of_the_wrong_kind_is_refused():
    with pytest.raises(SourceError, match="source is a list"):
        Source([1, 2])  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=r"source is torch.uint8; expected .* a floating tensor"):
        Source(torch.zeros(1, 2, 3, dtype=torch.uint8))
    with pytest.raises(SourceError, match="1 non-finite"):
        Source(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(SourceError, match=r"shape \(1, 2, 3\), the sampler's x has \(1, 2, 4\)"):
        Source(torch.zeros(1, 2, 3)).matching(torch.zeros(1, 2, 4))


def test_a_region_takes_masks_at_any_whole_scale():
    latents = torch.zeros(1, 4, 3, 4, 6)
    pixel = torch.zeros(1, 1, 9, 32, 48)
    pixel[:, :, 3, 9, 17] = 1
    latent = FittedMask(pixel).latent(latents)
    assert latent.nonzero().tolist() == [[0, 0, 1, 1, 2]]
    still = torch.zeros(32, 48)
    still[0, 0] = 1
    assert FittedMask(still).latent(latents).sum() == 3
    assert FittedMask(latent).tokens(latents, (1, 2, 2)).nonzero().tolist() == [[0, 7]]
    with pytest.raises(MaskError, match="no whole compression factor"):
        FittedMask(pixel[:, :, :, :30]).latent(latents)
    with pytest.raises(MaskError, match="batch of 3"):
        FittedMask(pixel.repeat(3, 1, 1, 1, 1)).latent(torch.zeros(2, 4, 3, 4, 6))
    flat = torch.zeros(2, 5)
    flat[:, 0] = 1
    assert torch.equal(FittedMask(flat).latent(torch.zeros(2, 5)), flat)
    with pytest.raises(MaskError, match="does not broadcast"):
        FittedMask(flat).latent(torch.zeros(2, 4))


def svg_text(path: Path) -> str:
    """What a figure says: matplotlib notes each text beside its outlines."""
    return " ".join(re.findall(r"<!-- (.*?) -->", path.read_text()))


def a_trace() -> Trace:
    trace = Trace()
    for i in range(4):
        row = torch.tensor([0.1, 0.4]) * (i + 1)
        seen = row if i else row * float("nan")
        trace.steps.append(
            StepInfo(i, 10.0 / (i + 1), seen, seen * 10, seen, row / 4, row / 4, row + 1, row * 0 + 1, 3, 2, "lockstep")
        )
    return trace


def test_a_trace_reads_as_rows_csv_and_figure(tmp_path):
    trace = a_trace()
    rows = trace.rows()
    assert len(rows) == 8
    assert trace.nfe == 12
    assert rows[3]["clip"] == 1
    assert rows[3]["variance"] == pytest.approx(0.8)
    assert math.isnan(rows[0]["risk"])
    lines = trace.to_csv(tmp_path / "t.csv").splitlines()
    assert lines[0].startswith("call,clip,sigma,variance,risk,effect,lock")
    assert len(lines) == 9
    for suffix in ("png", "svg", "pdf"):
        trace.plot(tmp_path / f"t.{suffix}")
        assert (tmp_path / f"t.{suffix}").stat().st_size > 5000
    assert "not measured" not in svg_text(tmp_path / "t.svg")
    assert {"effect", "composite"} <= set(svg_text(tmp_path / "t.svg").split())
    for step in trace.steps:
        step.variance[:] = step.risk[:] = float("nan")
    trace.plot(tmp_path / "constant.svg")
    assert svg_text(tmp_path / "constant.svg").count("not measured") == 2
    assert "effect" not in svg_text(tmp_path / "constant.svg")
    Trace().plot(tmp_path / "empty.png")
    assert "4 evaluations" in repr(trace)


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(TypeError):
        write_atomically(target, 5)  # type: ignore[arg-type]
    (tmp_path / "dir").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "dir", "x")
    assert target.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "dir"]


def test_importing_the_library_is_light():
    code = (
        "import sys, kvlock_sampling; "
        "heavy = [m for m in ('diffusers', 'k_diffusion', 'av', 'matplotlib', 'skimage', 'typer', 'torchvision') "
        "if m in sys.modules]; print(heavy); sys.exit(bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", kv.__all__)
def test_every_public_name_has_a_docstring_that_names_its_arguments_and_errors(name):
    public = getattr(kv, name)
    words = inspect.getdoc(public) or ""
    assert words.strip()
    if inspect.ismodule(public) or public is KVLockError:
        return
    for argument in inspect.signature(public).parameters:
        assert re.search(rf"\b{argument}\b", words), f"{name}: nothing is said about {argument}"
    plain_values = {"Control", "Observation"}  # NamedTuples, which check nothing
    declared = {"Architecture", "register_architecture"}  # looked at when a network is
    if name not in plain_values | declared:
        assert re.search(r"Raises|raises|Error", words), f"{name}: nothing is said about errors"


def test_the_version_is_one():
    assert math.isclose(float(kv.__version__.split(".")[0]), 0)


def test_where_nothing_can_be_written_is_known_beforehand(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "clip.mp4")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    longest = tmp_path / f"{'a' * 237}.mp4"  # with the temporary name's 14 characters, all that file systems take
    check_writable(longest)
    write_atomically(longest, "x")
    for wrong in (tmp_path / "file" / "clip.mp4", tmp_path, longest.with_stem("a" * 238)):
        with pytest.raises(KVLockError, match="cannot be written"):
            check_writable(wrong)


def test_a_protected_file_is_not_replaced(tmp_path, monkeypatch):
    final = write_atomically(tmp_path / "final.txt", "x")
    monkeypatch.setattr(os, "access", lambda path, mode: (Path(path), mode) != (final, os.W_OK))  # root may write all
    with pytest.raises(KVLockError, match="it is write-protected"):
        check_writable(final)
    check_writable(tmp_path / "other.txt")


def test_the_home_folder_may_be_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    check_writable("~/new/a.txt")
    write_atomically("~/a.txt", "x")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["a.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("returned", [lambda x: None, lambda x: (x,), lambda x: x[:, :2], lambda x: x[:0]])
@pytest.mark.parametrize("policy", ["off", "sigmoid"])
@pytest.mark.parametrize("guided", [False, True])
def test_what_a_model_returns_is_the_models_fault(setup, returned, policy, guided):
    def own(x, sigma, cond):
        return returned(x)

    def whole(x, sigma, cond, uncond, cond_scale):
        return returned(x)

    lock = kv.KVLock(whole if guided else own, policy=policy)
    with pytest.raises(kv.KVLockError, match=r"the model returned .*; expected"):
        lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)


@pytest.mark.parametrize("given", [{"branch"}, set()])
def test_a_guided_model_counts_both_of_its_prompts(setup, given):
    """Its source pass has both too, unless the single-branch denoiser inside it is known."""
    options = {"branch": setup.model} if given else {}
    lock = kv.KVLock(kv.CFGDenoiser(setup.model), source=setup.source, mask=setup.mask, policy="half", **options)
    lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    assert [step.nfe for step in lock.trace] == [3 if given else 4] * 6


def test_seeded_noise_does_not_depend_on_the_default_device():
    """Seeded noise is drawn on the CPU, whatever torch.set_default_device says."""
    like, network = torch.zeros(2, 3, 4, 8, 8), torch.nn.Sequential(torch.nn.Linear(4, 4))

    def drawn():
        with dropout_hooks(network, 0.5, seed=1, select="0"):
            thinned = network(torch.ones(1, 4, device="cpu"))
        return start_noise(like, 1), Source(like, noise="fixed").noise, thinned

    with torch.device("meta"):
        found = drawn()
    assert all(torch.equal(*pair) for pair in zip(found, drawn(), strict=True))


def test_an_error_within_a_write_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.txt'"), atomic(tmp_path / "a.txt"):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError, match="'elsewhere'"), atomic(tmp_path / "a.txt"):
        raise FileNotFoundError(2, "No such file", "elsewhere")
    assert not list(tmp_path.iterdir())
