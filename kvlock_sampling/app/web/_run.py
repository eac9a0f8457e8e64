"""The edits of one press of the button: the policies that are compared, on one clip, mask and seed."""

import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from ...presets import load_preset
from ...types import KVLockError
from ...video.write import side_by_side, write_clip
from ..batch import fitting_scale
from ..edit import edit_video
from ..models import VideoModel, read_pair
from ._session import Results, Session


@dataclass(frozen=True)
class Settings:
    """The options of an edit, named as in `edit_video`. Those that equal their defaults are left out of commands."""

    prompt: str
    source_prompt: str | None = None
    sampler: str = "dpmpp_2m"
    steps: int = 30
    cfg_scale: float | None = None
    strength: float = 1.0
    seed: int = 0
    candidates: int = 1
    transition: tuple[float, float] | None = None

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, without the prompt."""
        rest = fields(self)[1:]
        return {field.name: getattr(self, field.name) for field in rest if getattr(self, field.name) != field.default}


def run(
    session: Session,
    video: VideoModel,
    settings: Settings,
    policies: dict[str, str],
    on_step: Callable[[str, int], None],
    cancel: threading.Event,
) -> None:
    """Edit the session's clip with each policy, from the files that are offered for download.

    Args:
        session: Gets the results.
        video: The model.
        settings: The options that the policies share.
        policies: TOML of presets by name.
        on_step: Called after each step with the name of the policy and the index of the step.
        cancel: Set to end the run after its present step.

    Raises:
        KVLockError: As `edit_video`, no clip is loaded, or the prompt is empty.
        CancelledError: `cancel` was set. The results of the run before are kept.
    """
    beside = session.clip_file().parent  # goes with the clip
    if not settings.prompt.strip():
        raise KVLockError("the prompt is empty; expected what the masked region should show, e.g. a red ball.")
    # A folder of its own, because browsers keep what they have read under a name.
    folder = Path(tempfile.mkdtemp(dir=beside))

    def step(name: str, index: int) -> None:
        if cancel.is_set():
            raise CancelledError
        on_step(name, index)

    try:
        mask, found = session.write_mask(folder), {}
        source, region = read_pair(video, session.clip_file(), mask)
        weight = session.tokens(video, settings.transition, region[None])
        for name, text in policies.items():
            (folder / f"{name}.toml").write_text(text, encoding="utf-8")
            load_preset(folder / f"{name}.toml")
        for name in policies:
            step(name, -1)
            shared: dict[str, Any] = {"model": video, "policy": folder / f"{name}.toml", "on_step": partial(step, name)}
            found[name] = edit_video(source.pixels, region[None], settings.prompt, **shared, **settings.options())
        scale = fitting_scale(None, video, source.pixels)
        tiles = {"the clip": source.pixels}
        for name, edit in found.items():
            write_clip(folder / f"{name}.mp4", edit.pixels[0], source.fps, scale)
            edit.trace.plot(folder / f"{name}-trace.png", title=name)
            tiles[name] = edit.pixels[0]
            if edit.candidates is not None:
                seeds = range(settings.seed, settings.seed + settings.candidates)
                names = [f"seed {seed}{' (chosen)' * (seed == edit.seed)}" for seed in seeds]
                middle = edit.candidates[:, :, edit.candidates.shape[2] // 2].unsqueeze(2)
                write_clip(folder / f"{name}-candidates.png", side_by_side(list(middle), names, scale=scale))
        if session.truth is not None:
            tiles["what is right"] = session.truth[0]
        columns = len(tiles) if len(tiles) < 4 else -(-len(tiles) // 2)
        sheet = side_by_side(list(tiles.values()), list(tiles), scale=scale, columns=columns)
        write_clip(folder / "together.mp4", sheet, source.fps)
        if cancel.is_set():
            raise CancelledError
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if session.results is not None:
        shutil.rmtree(session.results.folder, ignore_errors=True)
    session.results = Results(found, region[None], weight, folder, mask)
