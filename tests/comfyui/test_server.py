"""The node pack over HTTP: stock loaders, checkpoints from disk, and what ComfyUI caches, bypasses and interrupts."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest
import torch
from conftest import box
from serving import ROOT, serving
from workflows import WORKFLOWS

import kvlock_sampling as kv


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("comfyui")) as made:
        yield made


def node(kind: str, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph(*, lock: dict | None = None, sampler: str = "euler", seed: int = 1, steps: int = 4, model=("unet", 0)):
    """A masked edit; `lock` are the inputs of the lock's node, None leaves it out."""
    made = {
        "unet": node("UNETLoader", unet_name="tiny.safetensors", weight_dtype="default"),
        "vae": node("VAELoader", vae_name="tiny_vae.safetensors"),
        "clip": node("TestClip", seed=1, frames=9),
        "box": node("TestBox", frames=9),
        "positive": node("TestText", seed=5),
        "negative": node("TestText", seed=6),
        "encode": node("VAEEncode", pixels=["clip", 0], vae=["vae", 0]),
        "sample": node(
            "KSampler",
            model=list(model),
            seed=seed,
            steps=steps,
            cfg=4.0,
            sampler_name=sampler,
            scheduler="simple",
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["encode", 0],
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="out"),
        "latent": node("SaveLatent", samples=["sample", 0], filename_prefix="latent"),
    }
    if lock is not None:
        inputs = {"model": list(model), "source": ["encode", 0], "mask": ["box", 0], "preset": "full", **lock}
        made["lock"] = node("KVLock", **inputs)
        made["sample"]["inputs"]["model"] = ["lock", 0]
        made["trace"] = node("KVLockTrace", lock=["lock", 1], after=["sample", 0])
    return made


def test_every_node_says_what_its_inputs_are(server):
    known = server.get("/object_info")
    nodes = {name: about for name, about in known.items() if name.startswith("KVLock")}
    assert len(nodes) == 17
    for name, about in nodes.items():
        assert about["description"], name
        for part in about["input"].values():
            for field, (kind, *rest) in part.items():
                socket = isinstance(kind, str) and kind not in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")
                assert socket or rest[0].get("tooltip"), (name, field)


def test_combos_are_the_librarys_own(server):
    from kvlock_sampling.tiny.world import EDITS

    def options(name, field):
        kind, *rest = server.get(f"/object_info/{name}")[name]["input"]["required"][field]
        return kind if isinstance(kind, list) else rest[0]["options"]

    presets = {path.stem for path in (ROOT / "policies").glob("*.toml")}
    assert set(options("KVLock", "preset")) == presets
    assert set(options("KVLockExample", "edit")) == set(EDITS)


def test_defaults_of_policy_nodes_are_the_librarys_own(server):
    for name, about in server.get("/object_info").items():
        kind = name.removeprefix("KVLockPolicy")
        if kind in (name, "Preset", "Window"):
            continue
        policy = getattr(kv.policy, kind)()
        for field, (_, said) in about["input"]["required"].items():
            ends = field.rpartition("_")
            mine = getattr(policy, field, None)
            if ends[2] in ("from", "to"):
                mine = getattr(policy, ends[0])[ends[2] == "to"]
            if kind == "Constant":  # which is of no use with the library's defaults, no lock and no weight
                continue
            assert said["default"] == pytest.approx(mine), (name, field)


@pytest.fixture(scope="module")
def plain(server):
    return server.pixels(server.run(graph()))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "uni_pc", "res_multistep", "dpmpp_2m_sde"])
def test_off_is_plain_png_for_png(server, sampler):
    expected = server.pixels(server.run(graph(sampler=sampler)))
    assert server.pixels(server.run(graph(sampler=sampler, lock={"preset": "off"}))) == expected
    locked = server.run(graph(sampler=sampler, lock={"preset": "full"}))
    assert server.pixels(locked) != expected
    assert locked["outputs"]["trace"]["images"]


def saved(server) -> torch.Tensor:
    from safetensors.torch import load_file

    newest = max((server.folder / "output").glob("latent*"), key=lambda path: path.stat().st_mtime_ns)
    return load_file(newest)["latent_tensor"]


@pytest.mark.parametrize("preset", ["full", "half", "release", "static"])
def test_the_result_over_http_is_the_librarys_own(server, preset):
    """The same edit in this process, by the library's own denoiser around ComfyUI's network and VAE."""
    import comfy.samplers
    import comfy.sd
    import comfy.utils
    from test_sampling import ByTheLibrary

    server.run(graph(lock={"preset": preset}))
    found = saved(server)
    files = server.folder / "models"
    patcher = comfy.sd.load_diffusion_model(str(files / "diffusion_models/tiny.safetensors"))
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(files / "vae/tiny_vae.safetensors")))
    inner = patcher.model
    clip = torch.rand(9, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    source = inner.process_latent_in(vae.encode(clip))
    mask = box(3)
    text = [torch.randn(1, 12, 4096, generator=torch.Generator().manual_seed(seed)) * 0.3 for seed in (5, 6)]
    own = kv.KVLock(ByTheLibrary(inner.diffusion_model), source=source, mask=mask, policy=preset)
    sigmas = comfy.samplers.KSampler(patcher, 4, "cpu", "euler", "simple").sigmas
    noise = torch.randn(source.shape, generator=torch.manual_seed(1))
    extra = {"cond": text[0], "uncond": text[1], "cond_scale": 4.0}
    with own:
        out = comfy.k_diffusion.sampling.sample_euler(own, noise, sigmas, extra_args=extra, disable=True)
    expected = inner.process_latent_out(out)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def test_a_seed_alone_serves_the_cached_node_and_still_locks(server):
    first, kept = server.run(graph(lock={"preset": "full"}, seed=11)), saved(server)
    second = server.run(graph(lock={"preset": "full"}, seed=12))
    cached = next(m["nodes"] for kind, m in second["status"]["messages"] if kind == "execution_cached")
    assert "lock" in cached
    assert "sample" not in cached
    assert server.pixels(first) != server.pixels(second)
    assert torch.equal(kept[..., 4:, :], saved(server)[..., 4:, :])


@pytest.mark.parametrize("names", [("one", "two"), ("two", "one")])
def test_loras_before_and_after_the_lock(server, names):
    def chain(order):
        made, last = graph(lock={}), ("unet", 0)
        for step in order:
            if step == "lock":
                made["lock"]["inputs"]["model"] = list(last)
                last = ("lock", 0)
            else:
                made[step] = node(
                    "LoraLoaderModelOnly", model=list(last), lora_name=f"{step}.safetensors", strength_model=1.0
                )
                last = (step, 0)
        made["sample"]["inputs"]["model"] = list(last)
        return server.pixels(server.run(made))

    results = [chain(order) for order in ((*names, "lock"), (names[0], "lock", names[1]), ("lock", *names))]
    assert results[0] == results[1] == results[2]
    assert results[0] != server.pixels(server.run(graph(lock={})))


@pytest.mark.parametrize("lock_first", [True, False])
def test_another_packs_override_in_either_order(server, lock_first):
    made = graph(lock={})
    made["other"] = node("TestOverride", model=["lock", 0] if lock_first else ["unet", 0])
    if lock_first:
        made["sample"]["inputs"]["model"] = ["other", 0]
    else:
        made["lock"]["inputs"]["model"] = ["other", 0]
    assert server.pixels(server.run(made)) == server.pixels(server.run(graph(lock={})))


@pytest.mark.parametrize("preset", ["off", "full", "half"])
@pytest.mark.parametrize("how", ["windows", "split", "batch"])
def test_windows_memory_and_batches(server, how, preset):
    """Context windows, conditions split by memory, and two clips: off is plain, a lock keeps the background."""

    def chain(lock):
        made = graph(lock=lock)
        last = made["sample"]["inputs"]["model"]
        if how == "windows":
            settings = {"context_length": 5, "context_overlap": 4, "context_schedule": "standard_static"}
            settings |= {"context_stride": 1, "closed_loop": False, "fuse_method": "pyramid", "freenoise": False}
            settings |= {"retain_first_frame": False, "split_conds_to_windows": False}
            made["windows"] = node("WanContextWindowsManual", model=last, **settings)
        elif how == "split":
            made["windows"] = node("TestNoMemory", model=last)
        else:
            made["twice"] = node("RepeatLatentBatch", samples=["encode", 0], amount=2)
            made["sample"]["inputs"]["latent_image"] = ["twice", 0]
        if "windows" in made:
            made["sample"]["inputs"]["model"] = ["windows", 0]
        return made

    locked = server.run(chain({"preset": preset}))
    found = saved(server)
    plain = server.run(chain(None))
    if preset == "off":
        assert server.pixels(locked) == server.pixels(plain)
        return
    bare = saved(server)
    server.run(graph(lock={"preset": preset}))
    whole = saved(server)
    assert not torch.equal(found[..., :4, :4], bare[..., :4, :4])
    kept = whole[..., 4:].expand_as(found[..., 4:])  # the source's
    assert float((found[..., 4:] - kept).abs().max()) <= 1e-5
    if how == "split":
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-4)


def test_a_deleted_node_leaves_nothing(server, plain):
    server.run(graph(lock={"preset": "half"}))
    assert server.pixels(server.run(graph())) == plain


def test_an_interrupt_leaves_nothing(server, plain):
    made = graph(lock={"preset": "half"}, steps=20, seed=77)
    made["slow"] = node("TestSlow", model=["lock", 0])
    made["sample"]["inputs"]["model"] = ["slow", 0]
    prompt = server.queue(made)
    time.sleep(3)
    server.post("/interrupt")
    done = server.wait(prompt)
    assert any(kind == "execution_interrupted" for kind, _ in done["status"]["messages"])
    assert server.pixels(server.run(graph(seed=1))) == plain
    server.run(graph(lock={"preset": "half"}, seed=78))


def test_two_stages_keep_their_background(server):
    made = graph(lock={"preset": "full"})
    del made["decode"], made["save"], made["sample"]
    common = {"noise_seed": 3, "steps": 6, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple"}
    common |= {"positive": ["positive", 0], "negative": ["negative", 0]}
    made["low"] = node("UNETLoader", unet_name="tiny_low.safetensors", weight_dtype="default")
    made["next"] = node("KVLockContinue", model=["low", 0], lock=["lock", 1])
    made["first"] = node(
        "KSamplerAdvanced",
        model=["lock", 0],
        add_noise="enable",
        latent_image=["encode", 0],
        start_at_step=0,
        end_at_step=3,
        return_with_leftover_noise="enable",
        **common,
    )
    made["second"] = node(
        "KSamplerAdvanced",
        model=["next", 0],
        add_noise="disable",
        latent_image=["first", 0],
        start_at_step=3,
        end_at_step=1000,
        return_with_leftover_noise="disable",
        **common,
    )
    made["latent"]["inputs"]["samples"] = ["second", 0]
    made["trace"]["inputs"] = {"lock": ["next", 1], "after": ["second", 0]}
    made["source"] = node("SaveLatent", samples=["encode", 0], filename_prefix="source")
    server.run(made)
    from safetensors.torch import load_file

    newest = max((server.folder / "output").glob("source*"), key=lambda path: path.stat().st_mtime_ns)
    gap = (saved(server) - load_file(newest)["latent_tensor"]).abs()
    gap[..., :4, :4] = 0
    assert float(gap.max()) <= 1e-5


def test_the_sampler_node_gives_the_same(server):
    made = graph(lock={})
    made["sample"] = node(
        "SamplerCustom",
        model=["unet", 0],
        add_noise=True,
        noise_seed=1,
        cfg=4.0,
        positive=["positive", 0],
        negative=["negative", 0],
        sampler=["lock", 0],
        sigmas=["sigmas", 0],
        latent_image=["encode", 0],
    )
    made["euler"] = node("KSamplerSelect", sampler_name="euler")
    made["sigmas"] = node("BasicScheduler", model=["unet", 0], scheduler="simple", steps=4, denoise=1.0)
    inputs = {"sampler": ["euler", 0], "source": ["encode", 0], "mask": ["box", 0], "preset": "full"}
    made["lock"] = node("KVLockSampler", **inputs)
    assert server.pixels(server.run(made)) == server.pixels(server.run(graph(lock={})))


def test_mask_and_composite(server):
    made = graph(lock={})
    made["map"] = node(
        "KVLockMask",
        model=["unet", 0],
        source=["encode", 0],
        mask=["box", 0],
        image=["clip", 0],
        grow=3,
        transition=1.0,
    )
    made["paste"] = node(
        "KVLockComposite", edited=["decode", 0], original=["clip", 0], mask=["box", 0], feather=0.0, lock=["lock", 1]
    )
    made["save"]["inputs"]["images"] = ["paste", 0]
    made["original"] = node("SaveImage", images=["clip", 0], filename_prefix="original")
    done = server.run(made)
    pasted, original = server.pixels(done), server.pixels(done, "original")
    frames = torch.frombuffer(bytearray(b"".join(pasted + original)), dtype=torch.uint8).view(2, 9, 64, 64, 3)
    differs = (frames[0] != frames[1]).any(-1)
    assert differs[:, :32, :32].any()
    assert not differs[:, 32:].any()
    assert not differs[:, :, 32:].any()
    assert done["outputs"]["map"]["images"]


def test_the_example_needs_no_files(server):
    made = {
        "example": node("KVLockExample", edit="remove", scene=1003, prompt=""),
        "encode": node("VAEEncode", pixels=["example", 2], vae=["example", 1]),
        "lock": node("KVLock", model=["example", 0], source=["encode", 0], mask=["example", 3], preset="default"),
        "sample": copy.deepcopy(graph()["sample"]),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["example", 1]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="example"),
    }
    wires = {"model": ["lock", 0], "positive": ["example", 4], "negative": ["example", 5]}
    made["sample"]["inputs"] |= {**wires, "latent_image": ["encode", 0], "steps": 2, "cfg": 3.0}
    assert len(server.pixels(server.run(made))) == 8
    made["example"]["inputs"]["prompt"] = "a purple dog"
    assert "purple" in server.error(made)


def released_clip(server) -> None:
    """The files that the workflows for released checkpoints read."""
    import av
    import numpy as np
    from PIL import Image

    folder = server.folder / "input"
    folder.mkdir(exist_ok=True)
    with av.open(str(folder / "clip.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=16)
        stream.width = stream.height = 64
        for i in range(9):
            frame = np.roll(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3), i, 1)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())
    mask = np.zeros((64, 64, 3), dtype=np.uint8)
    mask[:32, :32] = 255
    Image.fromarray(mask).save(folder / "mask.png")


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if "wan" in name or "window" in name])
def test_the_workflows_for_released_checkpoints_run_on_the_small_one(server, name):
    released_clip(server)
    made = WORKFLOWS[name]()
    for number, part in list(made.items()):
        kind, inputs = part["class_type"], part["inputs"]
        if kind == "UNETLoader":
            inputs["unet_name"] = f"tiny{'_low' * ('low' in inputs['unet_name'])}.safetensors"
        elif kind == "VAELoader":
            inputs["vae_name"] = "tiny_vae.safetensors"
        elif kind == "CLIPTextEncode":
            made[number] = node("TestText", seed=int(number))
        elif kind == "WanContextWindowsManual":
            inputs |= {"context_length": 5, "context_overlap": 4}
        elif kind == "CLIPLoader":
            del made[number]
    done = server.run(made)
    assert done["outputs"]["24"]["images"]
    assert done["outputs"]["23"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lock": {"mask": ["empty", 0]}}, "the mask is 0 everywhere"),
        ({"lock": {"mask": ["nearly", 0]}}, "nothing can be locked"),
        ({"lock": {"layers": "a-b"}}, "expected all, or numbers and ranges"),
        ({"lock": {"layers": "99"}}, "99"),
        ({"lock": {"source": ["short", 0]}}, "expected the same"),
        ({"lock": {"model": ["lock2", 0]}}, "has a KV lock already"),
    ],
)
def test_errors_are_one_clear_line(server, change, message):
    made = graph(**change)
    made["nearly"] = node("TestBox", frames=9, speckled=True)
    made["empty"] = node("SolidMask", value=0.0, width=64, height=64)
    made["clip5"] = node("TestClip", seed=1, frames=5)
    made["short"] = node("VAEEncode", pixels=["clip5", 0], vae=["vae", 0])
    made["lock2"] = graph(lock={})["lock"]
    text = server.error(made).strip()
    assert message in text
    assert "KV Lock: " in text
    assert "\n" not in text


def test_an_unknown_value_is_refused(server):
    reply = server.post("/prompt", {"prompt": graph(lock={"preset": "nosuch"})})
    if "prompt_id" in reply:  # older servers let the node find out
        assert "nosuch" in server.error(graph(lock={"preset": "nosuch"}))
    else:
        assert reply["status"] == 400
        assert "lock" in reply["node_errors"]


def test_the_server_imports_the_pack_in_a_second(server):
    """ComfyUI prints the import time of each pack."""
    lines = Path(server.folder / "log.txt").read_text().splitlines()
    line = next(line for line in lines if line.rstrip().endswith("custom_nodes/kvlock"))
    assert float(line.split("seconds")[0].split()[-1]) <= 1.0
