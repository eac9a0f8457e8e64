"""ComfyUI's server with the node pack, small checkpoints on disk, and a client."""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]


def checkpoints(folder: Path) -> None:
    """A Wan and its VAE with few weights, and a LoRA, as the stock loaders read them."""
    import comfy.sd
    from comfy.ldm.wan.vae import WanVAE
    from conftest import wan

    sizes = {"dim": 128, "num_heads": 1, "freq_dim": 256, "text_dim": 4096, "text_len": 512}
    for name, layers in (("tiny", 3), ("tiny_low", 2)):
        network = wan(**sizes, num_layers=layers).model.diffusion_model
        save(network.state_dict(), folder / f"models/diffusion_models/{name}.safetensors")
    any_size = "decoder.head.0.gamma" in inspect.getsource(comfy.sd)  # else the loader expects the full width
    vae = WanVAE(dim=8 if any_size else 96, z_dim=16, temperal_downsample=[False, True, True])
    g = torch.Generator().manual_seed(1)
    for weight in vae.state_dict().values():  # ComfyUI leaves them as the memory was
        weight.copy_(torch.randn(weight.shape, generator=g) * 0.1)
    save(vae.state_dict(), folder / "models/vae/tiny_vae.safetensors")
    for name in ("one", "two"):
        key = f"diffusion_model.blocks.{name == 'two':d}.self_attn.q"
        parts = {f"{key}.lora_A.weight": (4, 128), f"{key}.lora_B.weight": (128, 4)}
        lora = {part: torch.randn(shape, generator=g) for part, shape in parts.items()}
        save(lora, folder / f"models/loras/{name}.safetensors")


def save(weights: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, path)


class Server:
    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return json.loads(reply.read() or b"null")

    def post(self, path: str, data: dict | None = None):
        request = urllib.request.Request(self.url + path, json.dumps(data or {}).encode(), method="POST")
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.loads(reply.read() or b"null")
        except urllib.error.HTTPError as error:
            return {"status": error.code, **json.loads(error.read() or b"{}")}

    def queue(self, graph: dict) -> str:
        reply = self.post("/prompt", {"prompt": graph, "client_id": uuid.uuid4().hex})
        assert "prompt_id" in reply, reply
        return reply["prompt_id"]

    def wait(self, prompt: str, seconds: float = 120) -> dict:
        for _ in range(int(seconds / 0.1)):
            history = self.get(f"/history/{prompt}")
            if history.get(prompt, {}).get("status", {}).get("status_str"):
                return history[prompt]
            time.sleep(0.1)
        raise TimeoutError(prompt)

    def run(self, graph: dict) -> dict:
        done = self.wait(self.queue(graph))
        assert done["status"]["status_str"] == "success", done["status"]["messages"][-1][1].get("exception_message")
        return done

    def error(self, graph: dict) -> str:
        done = self.wait(self.queue(graph))
        assert done["status"]["status_str"] == "error"
        return next(m["exception_message"] for kind, m in done["status"]["messages"] if kind == "execution_error")

    def pixels(self, done: dict, node: str = "save") -> list[bytes]:
        """The decoded PNGs of a SaveImage node."""
        from PIL import Image

        found = []
        for image in done["outputs"][node]["images"]:
            kind = {"output": "output", "temp": "temp"}[image["type"]]
            with Image.open(self.folder / kind / image["subfolder"] / image["filename"]) as picture:
                found.append(picture.convert("RGB").tobytes())
        return found


@contextmanager
def serving(folder: Path):
    """A server whose base directory is `folder`."""
    (folder / "custom_nodes").mkdir(parents=True)
    (folder / "custom_nodes/kvlock").symlink_to(ROOT / "comfyui")
    (folder / "custom_nodes/kvlock_tests").symlink_to(ROOT / "tests/comfyui/pack")
    checkpoints(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.environ["COMFYUI_PATH"]
    command = [sys.executable, "main.py", "--cpu", "--port", str(port), "--base-directory", str(folder)]
    command += ["--database-url", "sqlite:///:memory:", *os.environ.get("COMFYUI_ARGS", "").split()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    log = folder / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=path, stdout=out, stderr=subprocess.STDOUT, env=environment)
        server = Server(f"http://127.0.0.1:{port}", folder)
        try:
            for _ in range(1800):
                try:
                    server.get("/system_stats")
                    break
                except OSError:
                    if process.poll() is not None:
                        raise AssertionError(log.read_text()[-4000:]) from None
                    time.sleep(0.1)
            yield server
        finally:
            process.kill()
            process.wait()
