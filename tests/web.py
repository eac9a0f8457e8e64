"""A client of the page of `kvlock web`, and files that no page should trust."""

from __future__ import annotations

import io
import json
import socket
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

PARTS = "/gradio_api"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Tab:
    """What a browser tab does, over HTTP."""

    def __init__(self, address: str, name: str) -> None:
        import httpx

        self.http, self.name = httpx.Client(base_url=address.rstrip("/"), timeout=60), name
        config = self.http.get("/config").json()
        self.functions = {entry["api_name"]: entry["id"] for entry in config["dependencies"]}

    def upload(self, name: str, content: bytes) -> dict[str, Any]:
        answer = self.http.post(f"{PARTS}/upload", files=[("files", (name, content))])
        assert answer.status_code == 200, answer.text
        return {"path": answer.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def call(self, function: str, *data: Any) -> Any:
        """What a function of the page returns. Raises RuntimeError with the page's message."""
        body = {"data": data, "fn_index": self.functions[function], "session_hash": self.name}
        joined = self.http.post(f"{PARTS}/queue/join", json=body)
        assert joined.status_code == 200, joined.text
        done: dict[str, Any] | None = None
        with self.http.stream("GET", f"{PARTS}/queue/data", params={"session_hash": self.name}) as events:
            for line in events.iter_lines():  # to its end: the server drops the events of a tab that leaves before it
                event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                done = event if event.get("msg") == "process_completed" else done
        if done is None:
            raise AssertionError("the server ended the stream")
        if not done["success"]:
            raise RuntimeError(done["output"]["error"])
        return done["output"]["data"]


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says it is of this size; its pixels are those of an image of 8 x 8."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(bytes(8 * 25))), (b"IEND", b"")]
    found = b"\x89PNG\r\n\x1a\n"
    for kind, data in parts:
        found += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return found


def gif(width: int, height: int, frames: int) -> bytes:
    """A GIF whose frames are single pixels of a canvas of this size."""
    frame = (
        b"\x21\xf9\x04\x00\x0a\x00\x00\x00" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    )
    palette = b"\x00\x00\x00\xff\xff\xff"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + palette + frame * frames + b";"


def film(kind: str = "mp4", codec: str = "libx264", frames: int = 8, size: int = 64) -> bytes:
    """A film of a moving square."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=8)
        stream.height = stream.width = size
        stream.pix_fmt = "yuv420p"
        for index in range(frames):
            page = np.full((size, size, 3), 60, np.uint8)
            page[20:40, 5 * index : 5 * index + 20] = (200, 40, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(page, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode())
    return out.getvalue()


def sound() -> bytes:
    """An mp4 with sound alone."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def huge_avi() -> bytes:
    """An avi of raw pixels whose headers say 5,000 x 5,000."""
    small, large = struct.pack("<II", 64, 64), struct.pack("<II", 5000, 5000)
    return film("avi", "rawvideo").replace(small, large)


def archive(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr(name, b"x" * 1000)
    return out.getvalue()


def floats() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.ones((8, 8), np.float32)).save(out, format="TIFF")
    return out.getvalue()


def hostile(folder: Path) -> dict[str, tuple[str, bytes, str]]:
    """By what is wrong: the name of a file, its content, and a part of the message."""
    secret = str(folder / "secret.png")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n".encode()
    no_film = "is no film: its content is not that of mp4, mov, webm, mkv or avi"
    return {
        "text": ("clip.mp4", b"once upon a time", no_film),
        "an empty film": ("clip.webm", b"\x00", no_film),
        "an empty image": ("clip.png", b"\x00", "cannot read 'clip.png' as an image"),
        "a page": ("clip.png", b"<html><script>alert(1)</script>", "cannot read 'clip.png' as an image"),
        "a drawing with a script": ("clip.svg", b"<svg onload='alert(1)'/>", "unknown suffix '.svg'"),
        "an archive": ("clips.zip", archive("a.png"), "unknown suffix '.zip'"),
        "an archive called a film": ("clip.mp4", archive("../../a.png"), no_film),
        "a program": ("clip.mkv", b"\x7fELF\x02\x01\x01" + bytes(64), no_film),
        "a playlist that names a file": ("clip.mp4", playlist, no_film),
        "a list of films": ("clip.avi", f"ffconcat version 1.0\nfile {secret}\n".encode(), no_film),
        "half a film": ("clip.mp4", film()[:900], "cannot read 'clip.mp4' as a film"),
        "half an image": ("clip.png", png(64, 64)[:60], "cannot read 'clip.png' as an image"),
        "a huge image": ("clip.png", png(12000, 12000), "expected at most 16,777,216 pixels a frame"),
        "a larger image": ("clip.png", png(60000, 60000), "DecompressionBombError"),
        "a huge film": ("clip.avi", huge_avi(), "frames of 5000 x 5000; expected at most"),
        "many large frames": ("clip.gif", gif(4096, 4096, 200), "has 200 frames of 4096 x 4096; expected at most"),
        "text that unpacks to a lot": (
            "clip.png",
            png(8, 8, (b"zTXt", b"a\x00\x00" + zlib.compress(bytes(30_000_000)))),
            "cannot read 'clip.png' as an image",
        ),
        "sound alone": ("clip.mp4", sound(), "'clip.mp4' has no video stream"),
        "pixels without a range": ("clip.tiff", floats(), "its pixels are floats"),
        "a path in the name": ("../../../etc/passwd.mp4", b"root:x:0", no_film),
        "a script in the name": ("<img src=x onerror=alert(1)>.mp4", b"x", no_film),
        "no suffix": ("clip", film(), "unknown suffix ''"),
        "a long name": (f"{'a' * 300}.mp4", b"x", no_film),
    }
