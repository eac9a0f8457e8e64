"""The lines that make a result of the page again, in a shell and in Python, from the downloaded files."""

import shlex
from typing import Any

from ._run import Settings


def command_line(settings: Settings, policy: str, mask: str, model: dict[str, Any]) -> str:
    """`kvlock edit` with the downloaded clip, mask and policy."""
    words = ["kvlock", "edit", "clip.mkv", "--mask", mask, "--policy", f"{policy}.toml", "-o", f"{policy}.mp4"]
    for name, value in ({"prompt": settings.prompt} | model | settings.options()).items():
        flag = f"--{'seeds' if name == 'candidates' else name.replace('_', '-')}"
        texts = [str(part) for part in (value if isinstance(value, tuple) else (value,))]
        words += [f"{flag}={texts[0]}"] if texts[0].startswith("-") else [flag, *texts]
    return shlex.join(words)


def python_lines(settings: Settings, policy: str, mask: str, model: dict[str, Any], scale: int) -> str:
    """The same as a program."""
    given = [f"{name}={value!r}" for name, value in model.items() if name != "model"]
    options = [f"{name}={value!r}" for name, value in settings.options().items()]
    options = ["model=model", f"policy={policy + '.toml'!r}", *options]
    return f"""from kvlock_sampling.app import edit_video, open_model, read_pair
from kvlock_sampling.video import write_clip

model = open_model({", ".join([repr(model.get("model", "tiny")), *given])})
clip, mask = read_pair(model, "clip.mkv", {mask!r})
edit = edit_video(clip.pixels, mask[None], {settings.prompt!r}, {", ".join(options)})
write_clip({policy + ".mp4"!r}, edit.pixels[0], clip.fps, scale={scale})
edit.trace.plot({policy + "-trace.png"!r})
"""
