"""A pipeline from a folder, through the library and the command: placed as asked, refused in time, equal results."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from toy_pipelines import tiny_pipeline
from typer.testing import CliRunner

import kvlock_sampling as kv
from kvlock_sampling.app.cli import app
from kvlock_sampling.app.models import read_pair
from kvlock_sampling.integrations.diffusers import PipelineError
from kvlock_sampling.integrations.diffusers.models import load
from kvlock_sampling.presets import load_preset
from kvlock_sampling.video import read_clip, write_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Saved pipelines, a clip of 12 frames of 48 x 72, and its mask."""
    root = tmp_path_factory.mktemp("models")
    for name in ("wan", "ltx"):
        tiny_pipeline(name).save_pretrained(root / name)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 3, 6, 9, generator=generator) * 2 - 1
    clip = torch.nn.functional.interpolate(coarse, size=(12, 48, 72), mode="trilinear")[0]
    write_clip(root / "clip.mp4", clip, fps=8)
    mask = torch.full((3, 1, 48, 72), -1.0)
    mask[:, :, 16:40, 16:48] = 1
    write_clip(root / "mask.png", mask)
    return root


def plain(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def edit(folder: Path, output: str, *options: object, model: str = "wan", code: int = 0) -> str:
    """Run `kvlock edit` in this process; its output."""
    words = ["edit", folder / "clip.mp4", "--mask", folder / "mask.png", "--prompt", "a red square", "-o"]
    words += [folder / output, "--model", folder / model, "--steps", 3, *options]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return plain(result.output)


@pytest.mark.parametrize("model", ["wan", "ltx"])
def test_a_saved_pipeline_edits_a_film_with_offloading_on_and_off(folder, model):
    sides = ("--size", "96x128") if model == "ltx" else ()  # its tokens are 32 pixels wide: some must be left to lock
    films = {}
    for offload in ("none", "model", "group"):
        name = f"{model}-{offload}.png"  # lossless; the encoder of films may differ from run to run
        said = edit(folder, name, "--offload", offload, "--policy", "half", *sides, model=model)
        assert re.search(r"9 model passes .* background PSNR: \S+ dB \(ceiling of the codec: \S+ dB\)", said)
        films[offload] = (folder / name).read_bytes()
    assert films["none"] == films["model"] == films["group"]
    edit(folder, "edited.mp4", "--policy", "half", *sides, model=model)
    pixels = read_clip(folder / "edited.mp4").pixels
    assert pixels.shape == ((3, 9, 48, 64) if model == "wan" else (3, 9, 96, 128))


@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_offloading_changes_no_bit_and_its_hooks_are_there(folder, offload):
    video = kv.diffusers.load_pipeline(folder / "wan", offload=offload)
    transformer = video.pipe.transformer
    hooked = {
        "none": False,
        "model": hasattr(transformer, "_hf_hook"),
        "group": any(hasattr(m, "_diffusers_hook") for m in transformer.modules()),
    }
    assert hooked[offload] == video.offloaded == (offload != "none")
    modes = []
    transformer.blocks[0].register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    memory = kv.from_pipeline(tiny_pipeline("wan"))
    source, mask = read_pair(video, folder / "clip.mp4", folder / "mask.png")
    options = {"steps": 3, "policy": "half", "source_prompt": "noise"}
    theirs, ours = (kv.edit_video(source.pixels, mask, "a red square", model=m, **options) for m in (video, memory))
    assert torch.equal(theirs.pixels, ours.pixels)
    assert [s.fused_layers for s in theirs.trace.steps] == [2, 2, 2]
    assert set(modes) == {offload == "none"}  # weights moved in inference mode would be of no other use afterwards


@pytest.mark.parametrize("offload", ["none", "group"])
def test_where_weights_begin_in_memory_changes_no_bit_either(tmp_path, offload):
    pipe = tiny_pipeline("mochi")  # its kernels round by the alignment of their operands
    pipe.save_pretrained(tmp_path)
    loaded = kv.diffusers.load_pipeline(tmp_path, offload=offload)
    assert all(p.data_ptr() % 64 == 0 for p in loaded.pipe.transformer.parameters())
    x, sigma = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor(1.0)
    with torch.no_grad():
        one, other = (m.denoiser(x, sigma, cond=m.prompt("a red square")) for m in (loaded, kv.from_pipeline(pipe)))
    assert torch.equal(one, other)


def test_edit_video_takes_the_folder_itself(folder):
    source, mask = read_pair(kv.diffusers.load_pipeline(folder / "wan"), folder / "clip.mp4", folder / "mask.png")
    edited = kv.edit_video(source.pixels, mask, "a red square", model=str(folder / "wan"), steps=2)
    assert edited.pixels.shape == (1, 3, 9, 48, 64)


def test_dtype_is_of_the_weights_and_not_of_the_vae_or_the_state(folder):
    video = kv.diffusers.load_pipeline(folder / "wan", dtype="bfloat16")
    assert video.pipe.transformer.dtype == video.pipe.text_encoder.dtype == torch.bfloat16
    assert video.pipe.vae.dtype == torch.float32
    full = kv.diffusers.load_pipeline(folder / "wan")
    source, mask = read_pair(video, folder / "clip.mp4", folder / "mask.png")
    options = {"steps": 3, "policy": "half", "paste": False}
    half, exact = (kv.edit_video(source.pixels, mask, "a red square", model=m, **options) for m in (video, full))
    assert half.pixels.dtype == torch.float32
    assert 0 < float((half.pixels - exact.pixels).abs().mean()) < 0.02
    assert torch.equal(half.ceiling_psnr, exact.ceiling_psnr)
    edit(folder, "half.mp4", "--dtype", "bfloat16")


def test_frames_and_size_are_the_clips_as_far_as_the_model_can(folder, monkeypatch):
    video = kv.diffusers.load_pipeline(folder / "wan")
    own, mask = read_pair(video, folder / "clip.mp4", folder / "mask.png")
    assert own.pixels.shape == (3, 9, 48, 64)  # 12 frames and 72 columns do not divide
    assert mask.shape == (1, 9, 48, 64)
    assert own.fps == 8  # the first frames, not picked ones
    fewer, mask = read_pair(video, folder / "clip.mp4", folder / "mask.png", frames=5, size=(32, 32))
    assert fewer.pixels.shape == (3, 5, 32, 32)
    assert mask.shape == (1, 5, 32, 32)
    assert fewer.fps < 8  # picked evenly: the same seconds
    monkeypatch.setattr(type(video), "usual", property(lambda self: (5, 16, 32)))
    small, _ = read_pair(video, folder / "clip.mp4", folder / "mask.png")
    assert small.pixels.shape == (3, 5, 16, 16)
    with pytest.raises(kv.KVLockError, match=r"edits e\.g\. frames=5, size=\(32, 48\)"):
        read_pair(video, folder / "clip.mp4", folder / "mask.png", frames=6, size=(40, 50))


WRONG = {
    "size without x": (("--size", "480"), "expected HEIGHTxWIDTH"),
    "size that does not divide": (("--size", "40x40"), "this model edits e.g. frames=9, size=(32, 32)"),
    "frames": (("--frames", 4), "this model edits e.g. frames=1"),
    "dtype": (("--dtype", "fp8"), "expected one of float32, bfloat16, float16"),
    "offload": (("--offload", "disk"), "expected one of none, model, group"),
    "shift": (("--shift", 0), "shift=0.0; expected a finite number > 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_refused_with_the_fix(folder, name):
    options, message = WRONG[name]
    assert message in edit(folder, "never.mp4", *options, code=2)
    assert not (folder / "never.mp4").exists()


def test_options_of_pipelines_are_not_swallowed_by_the_embedded_model(folder):
    words = ["edit", folder / "clip.mp4", "--mask", folder / "mask.png", "--prompt", "a red circle"]
    words += ["-o", folder / "never.mp4", "--dtype", "bfloat16"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2
    assert "dtype='bfloat16' is for a pipeline of diffusers" in plain(result.output)


def test_out_of_memory_is_no_traceback(folder, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr("kvlock_sampling.app.cli.edit_video", full)
    said = edit(folder, "never.mp4", code=2)
    assert "out of memory: tried to allocate 20 GiB" in said
    assert "--offload model" in said


@pytest.fixture
def unread(monkeypatch):
    """Reading weights is a failure from here on."""

    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", read)


def test_weights_that_exceed_the_devices_free_memory_are_warned_of(monkeypatch):
    pipe, cuda = tiny_pipeline("wan"), torch.device("cuda")
    parts = [sum(p.numel() for p in part.parameters()) * 4 for part in (pipe.text_encoder, pipe.transformer, pipe.vae)]

    def warned(free: int, offload: str) -> bool:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load.warn_if_too_large(pipe, cuda, offload)
        assert all("offload=" in str(w.message) for w in caught)
        return bool(caught)

    assert warned(sum(parts) - 1, "none")
    assert not warned(sum(parts), "none")
    assert warned(max(parts) - 1, "model")
    assert not warned(max(parts), "model")
    assert not warned(1, "group")


def test_a_family_that_is_not_known_is_refused_before_its_weights_are_read(folder, tmp_path, unread):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "AllegroPipeline"}))
    with pytest.raises(PipelineError, match=r"(?s)AllegroPipeline is of no known family; there are WanPipeline"):
        kv.diffusers.load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "LTXConditionPipeline"}))
    with pytest.raises(PipelineError, match=r"LTXPipeline\.from_pipe"):
        kv.diffusers.load_pipeline(tmp_path)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 1.5])
def test_a_device_that_is_not_there_is_told_before_weights_are_read(folder, unread, device):
    with pytest.raises(PipelineError, match=rf"device={device!r}; expected e\.g\. 'cuda', 'cuda:1' or 'cpu': "):
        kv.diffusers.load_pipeline(folder / "wan", device=device)


def test_a_folder_that_is_no_pipeline(folder, tmp_path):
    with pytest.raises(PipelineError, match=r"(?s)does not exist.*save_pretrained.*hf download"):
        kv.diffusers.load_pipeline(tmp_path / "nowhere")
    with pytest.raises(PipelineError, match=r"holds no model_index\.json"):
        kv.diffusers.load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(PipelineError, match="names no pipeline class"):
        kv.diffusers.load_pipeline(tmp_path)
    index = json.loads((folder / "wan" / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(PipelineError, match=r'(?s)could not be loaded as WanPipeline.*from_pretrained.*variant="fp16"'):
        kv.diffusers.load_pipeline(tmp_path)
    with pytest.raises(kv.KVLockError, match=r"(?s)no model at.*model_index\.json.*hf download"):
        kv.edit_video(torch.zeros(3, 8, 32, 32), torch.zeros(32, 32), "x", model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")


def test_packages_that_are_missing_are_named_with_the_command(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(kv.KVLockError, match=r"(?s)needs transformers.*pip install 'kvlock-sampling\[diffusers\]'"):
        kv.diffusers.load_pipeline(folder / "wan")


def test_calibrating_on_a_folder_of_clips(folder, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("one", "two"):
        (clips / f"{name}.mp4").write_bytes((folder / "clip.mp4").read_bytes())
        (clips / f"{name}.mask.png").write_bytes((folder / "mask.png").read_bytes())
        (clips / f"{name}.txt").write_text("noise")
    words = ["calibrate", "-o", tmp_path / "mine.toml", "--model", folder / "wan", "--clips", clips, "--steps", 12]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert load_preset(tmp_path / "mine.toml").threshold is not None
    words[words.index(clips)] = "8"
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2
    assert "needs --clips FOLDER" in plain(result.output)


def test_a_first_frame_from_a_file(folder, tmp_path):
    tiny_pipeline("wan-image-ti2v").save_pretrained(tmp_path / "image")
    write_clip(tmp_path / "red.png", torch.tensor([1.0, -1, -1]).view(3, 1, 1, 1).expand(3, 1, 48, 72))
    words = ("--image", tmp_path / "red.png", "--policy", "half")
    said = edit(folder, "moved.mp4", *words, model=tmp_path / "image")
    assert "9 model passes" in said
    assert "image-to-video" in edit(folder, "never.mp4", *words, code=2)
    video = kv.diffusers.load_pipeline(tmp_path / "image")
    picture = read_clip(tmp_path / "red.png", size=(48, 64)).pixels[:, 0]
    clip = read_pair(video, folder / "clip.mp4", folder / "mask.png")[0].pixels
    frame = kv.from_pipeline(video.pipe, image=picture).given(clip).prompt("x")["frame"]
    assert torch.equal(frame, video.encode(picture[None, :, None]))
    assert not torch.equal(frame, video.given(clip).prompt("x")["frame"])


def test_the_vae_may_work_in_tiles(folder):
    assert kv.diffusers.load_pipeline(folder / "wan", tile_vae=True).pipe.vae.use_tiling
    assert not kv.diffusers.load_pipeline(folder / "wan").pipe.vae.use_tiling
    edit(folder, "tiled.mp4", "--tile-vae")


def test_an_expert_that_is_done_leaves_the_device_also_on_the_way_back_up():
    pipe = tiny_pipeline("wan-2.2")
    load.place_pipeline(pipe, "cpu", "model")
    video = kv.from_pipeline(pipe)
    moved = []
    for name in ("transformer", "transformer_2"):
        part = getattr(pipe, name)
        inner = part.to
        part.to = lambda *a, name=name, inner=inner, **k: (moved.append(name), inner(*a, **k))[1]
    x, cond = torch.randn(1, 16, 3, 8, 8), video.prompt("a red square")
    moved.clear()
    with torch.no_grad():
        for sigma, gone in ((20.0, "transformer_2"), (1.0, "transformer"), (20.0, "transformer_2")):
            video.denoiser(x * sigma, torch.tensor(sigma), cond=cond)
            assert gone in moved
            moved.clear()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5676070424\n"


@pytest.mark.parametrize("damage", ["header", "data", "empty", "pointer", "index"])
def test_weights_that_did_not_arrive_are_named(folder, tmp_path, damage):
    broken = tmp_path / "wan"
    shutil.copytree(folder / "wan", broken)
    (file,) = (broken / "transformer").glob("*.safetensors")
    whole = file.read_bytes()
    if damage == "index":
        file = file.with_name("diffusion_pytorch_model.safetensors.index.json")
        whole = b"{}"
    file.write_bytes({"header": whole[:100], "data": whole[:-1], "empty": b"", "pointer": POINTER}.get(damage, whole))
    with pytest.raises(PipelineError, match=r"is the download complete\?") as caught:
        load.load_pipeline(broken)
    assert str(broken) in str(caught.value)
