"""The example workflows, as ComfyUI's API takes them:  python workflows.py [--ui]

Writes comfyui/api_workflows/. With --ui also the form of the browser, comfyui/example_workflows/, and the pictures in
docs/images/, from a server with the small checkpoint; that needs what `test_browser.py` needs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
Graph = dict[str, dict]


def node(kind: str, title: str | None = None, /, **inputs) -> dict:
    made = {"class_type": kind, "inputs": inputs}
    return {**made, "_meta": {"title": title}} if title else made


def sampler(model, positive, negative, latent, **changes) -> dict:
    settings = {"seed": 1, "steps": 20, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    wires = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
    return node("KSampler", **wires, **{**settings, **changes})


def example(steps: int = 16) -> Graph:
    """One edit of the embedded model, which needs no files."""
    return {
        "1": node("KVLockExample", edit="remove", scene=1003, prompt=""),
        "2": node("VAEEncode", "Encode the source", pixels=["1", 2], vae=["1", 1]),
        "3": node("KVLock", model=["1", 0], source=["2", 0], mask=["1", 3], source_prompt=["1", 6], preset="default"),
        "4": sampler(["3", 0], ["1", 4], ["1", 5], ["2", 0], steps=steps),
        "5": node("VAEDecode", samples=["4", 0], vae=["1", 1]),
        "6": node("ImageScaleBy", image=["5", 0], upscale_method="nearest-exact", scale_by=4.0),
        "7": node("SaveAnimatedWEBP", "The edit", images=["6", 0], **webp("kvlock/edit")),
        "8": node("KVLockTrace", lock=["3", 1], after=["4", 0]),
        "9": node("KVLockMask", model=["1", 0], source=["2", 0], mask=["1", 3], image=["1", 2], grow=0, transition=0.0),
    }


def webp(prefix: str) -> dict:
    return {"filename_prefix": prefix, "fps": 8.0, "lossless": True, "quality": 90, "method": "default"}


def compare(steps: int = 16) -> Graph:
    """The clip, its background pasted, let go where the edit's effects are firm, and what is right, side by side."""
    made = {
        "1": node("KVLockExample", edit="remove", scene=1003, prompt=""),
        "2": node("VAEEncode", "Encode the source", pixels=["1", 2], vae=["1", 1]),
        "3": node("KVLockPolicyConstant", "Pasted: the source throughout", lock=0.0, composite=1.0),
        "4": node("KVLockPolicyPreset", "Released where effects are firm", preset="release"),
    }
    columns = [["1", 2]]
    for number, policy in ((10, "3"), (20, "4")):
        lock, sample, decode = (str(number + i) for i in range(3))
        wires = {"model": ["1", 0], "source": ["2", 0], "mask": ["1", 3], "source_prompt": ["1", 6]}
        made[lock] = node("KVLock", **wires, policy=[policy, 0], preset="default")
        made[sample] = sampler([lock, 0], ["1", 4], ["1", 5], ["2", 0], steps=steps)
        made[decode] = node("VAEDecode", samples=[sample, 0], vae=["1", 1])
        columns.append([decode, 0])
    columns.append(["1", 7])
    left = columns[0]
    for i, right in enumerate(columns[1:]):
        look = {"direction": "right", "match_image_size": True, "spacing_width": 2, "spacing_color": "white"}
        made[str(30 + i)] = node("ImageStitch", image1=left, image2=right, **look)
        left = [str(30 + i), 0]
    made["40"] = node("ImageScaleBy", image=left, upscale_method="nearest-exact", scale_by=3.0)
    made["41"] = node("ImageFromBatch", "One frame", image=["40", 0], batch_index=4, length=1)
    made["42"] = node("PreviewImage", "Clip | pasted | released | what is right", images=["41", 0])
    made["43"] = node("KVLockTrace", lock=["20", 1], after=["21", 0])
    return made


def wan(*, stages: bool = False, windows: bool = False) -> Graph:
    """A masked edit of a video file, for released checkpoints of Wan 2.1 or 2.2."""
    names = ("wan2.2_t2v_high_noise_14B_fp8_scaled", "wan2.2_t2v_low_noise_14B_fp8_scaled")
    high = names[0] if stages else "wan2.1_t2v_1.3B_fp16"
    shift, cfg, steps, seed = (8.0, 3.5, 20, 1) if stages else (8.0, 6.0, 30, 1)
    made = {
        "1": node("LoadVideo", "The clip (832 x 480, 81 frames)", file="clip.mp4"),
        "2": node("GetVideoComponents", video=["1", 0]),
        "3": node("LoadImageMask", "White = edit", image="mask.png", channel="red"),
        "4": node("VAELoader", vae_name="wan_2.1_vae.safetensors"),
        "5": node("CLIPLoader", clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors", type="wan", device="default"),
        "6": node("CLIPTextEncode", "What the mask should show", text="a red flower", clip=["5", 0]),
        "7": node("CLIPTextEncode", "Negative", text="", clip=["5", 0]),
        "8": node("CLIPTextEncode", "What the clip shows now", text="a blue flower", clip=["5", 0]),
        "9": node("VAEEncode", "Encode the source", pixels=["2", 0], vae=["4", 0]),
        "10": node("UNETLoader", unet_name=unet(high), weight_dtype="default"),
        "11": node("ModelSamplingSD3", model=["10", 0], shift=shift),
    }
    model = ["11", 0]
    if windows:
        settings = {"context_length": 81, "context_overlap": 29, "context_schedule": "standard_static"}
        settings |= {"context_stride": 1, "closed_loop": False, "fuse_method": "pyramid", "freenoise": False}
        settings |= {"retain_first_frame": False, "split_conds_to_windows": False}
        made["12"] = node("WanContextWindowsManual", "Windows of a long clip", model=model, **settings)
        model = ["12", 0]
    wires = {"model": model, "source": ["9", 0], "mask": ["3", 0], "source_prompt": ["8", 0]}
    made["13"] = node("KVLock", **wires, preset="default")
    lock, last = ["13", 1], ["14", 0]
    if stages:
        made["15"] = node("UNETLoader", unet_name=unet(names[1]), weight_dtype="default")
        made["16"] = node("ModelSamplingSD3", model=["15", 0], shift=shift)
        made["17"] = node("KVLockContinue", model=["16", 0], lock=["13", 1])
        common = {"noise_seed": seed, "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple"}
        common |= {"positive": ["6", 0], "negative": ["7", 0]}
        half = {"start_at_step": 0, "end_at_step": steps // 2, "return_with_leftover_noise": "enable"}
        rest = {"start_at_step": steps // 2, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
        made["14"] = node(
            "KSamplerAdvanced",
            "High noise",
            model=["13", 0],
            latent_image=["9", 0],
            add_noise="enable",
            **common,
            **half,
        )
        made["18"] = node(
            "KSamplerAdvanced",
            "Low noise",
            model=["17", 0],
            latent_image=["14", 0],
            add_noise="disable",
            **common,
            **rest,
        )
        lock, last = ["17", 1], ["18", 0]
    else:
        made["14"] = sampler(["13", 0], ["6", 0], ["7", 0], ["9", 0], steps=steps, cfg=cfg, seed=seed)
    made["20"] = node("VAEDecode", samples=last, vae=["4", 0])
    wires = {"edited": ["20", 0], "original": ["2", 0], "mask": ["3", 0], "lock": lock}
    made["21"] = node("KVLockComposite", "The original's pixels outside", **wires, feather=4.0)
    made["22"] = node("CreateVideo", images=["21", 0], fps=16.0)
    made["23"] = node("SaveVideo", video=["22", 0], filename_prefix="kvlock/edit", format="mp4", codec="h264")
    made["24"] = node("KVLockTrace", lock=lock, after=last)
    return made


def unet(name: str) -> str:
    return f"{name}.safetensors"


WORKFLOWS = {
    "kvlock_example": example,
    "kvlock_compare_policies": compare,
    "kvlock_wan2.1_edit": wan,
    "kvlock_wan2.2_two_stages": lambda: wan(stages=True),
    "kvlock_long_clip_windows": lambda: wan(windows=True),
}


def write(folder: Path, name: str, content: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ui", action="store_true", help="also the browser's form and the pictures")
    given = parser.parse_args()
    for name, make in WORKFLOWS.items():
        write(ROOT / "comfyui/api_workflows", name, make())
    if given.ui:
        from browser import opened
        from serving import serving

        with tempfile.TemporaryDirectory() as base, serving(Path(base) / "base") as server, opened(server) as page:
            folder = ROOT / "comfyui/example_workflows"
            for name, make in WORKFLOWS.items():
                write(folder, name, page.workflow(make(), name))
            for name in ("kvlock_example", "kvlock_compare_policies"):
                page.load(folder / f"{name}.json")
                page.run()
                page.picture(ROOT / f"docs/images/comfyui-{name.removeprefix('kvlock_')}.png")
                page.picture(folder / f"{name}.jpg")  # which ComfyUI shows among its templates


if __name__ == "__main__":
    import conftest  # noqa: F401 - the arguments that ComfyUI reads at import

    main()
