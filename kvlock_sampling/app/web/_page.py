"""The page: its layout, and what happens on each event. Every tab has a session of its own."""

import functools
import re
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import Any

import numpy as np

from ...presets import describe, load_preset, preset_names, to_toml
from ...samplers import names as sampler_names
from ...types import KVLockError
from ...utils.extras import require
from ..batch import fitting_scale
from ..jobs import message
from ..models import VideoModel
from ._commands import command_line, python_lines
from ._run import CancelledError, Settings, run
from ._session import EXAMPLES, Session, Sessions, to_clips
from ._views import EDITED, files_view, frame_view, numbers_view, tokens_view
from ._words import CANCELLED, HINT, LEAD, RESULT, TOKENS, TRACE

CANVAS = 512  # least width in pixels of the frame to draw on; smaller ones are enlarged by a whole factor
OPACITY = 0.6  # of the brush


def page(video: VideoModel, sessions: Sessions, model: Mapping[str, Any]) -> Any:
    """Build the page, a `gradio.Blocks`.

    Args:
        video: The model that edits.
        sessions: Keeps what each tab works on.
        model: The options of `open_model` that made `video`, for the command lines.
    """
    gr = require("gradio", "web")
    tiny = video.frames is not None

    def plain(text: str) -> str:
        """A message as HTML, without the names of the server's folders."""
        return escape(re.sub(rf"{re.escape(str(sessions.root))}/([\w-]+/)*", "", text)).replace("\n", "<br>")

    @contextmanager
    def busy() -> Iterator[None]:
        """One call of the model at a time, also while a cancelled one ends. Shows its warnings."""
        with sessions.model, warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", UserWarning)
            yield
            for text in dict.fromkeys(str(warning.message) for warning in found):
                gr.Warning(plain(text), duration=None)

    def in_tab(handler: Callable[..., Any]) -> Callable[..., Any]:
        """A handler of the session of the tab that the event comes from. An error is shown as one message."""

        @functools.wraps(handler)
        def shown(request: Any, *args: Any) -> Any:
            try:
                return handler(sessions.of(request.session_hash), *args)
            except gr.Error:
                raise
            except Exception as error:
                if not isinstance(error, KVLockError):
                    traceback.print_exc()
                raise gr.Error(plain(message(error)), duration=None, print_exception=False) from None

        shown.__annotations__ = {"session": gr.Request}  # gradio passes the request where it finds this type
        return shown

    def opened(session: Session) -> list[Any]:
        """The page after a clip was loaded: note, frame, canvas, no results and nothing to say of them."""
        last = len(session.frames) - 1
        slider = gr.update(maximum=max(last, 1), value=0, interactive=last > 0)
        return [escape(session.note), slider, canvas(session, 0), 0, gr.update(visible=False), said()]

    def canvas(session: Session, frame: int) -> dict[str, Any]:
        session.clip_file()  # raises if there is none
        picture = session.frames[frame]
        factor = max(1, CANVAS // picture.shape[1])
        layers = []
        if frame in session.drawn:
            layer = session.drawn[frame][..., None] * np.array([*EDITED, 255 * OPACITY], np.uint8)
            layers.append(layer.repeat(factor, 0).repeat(factor, 1))
        picture = picture.repeat(factor, 0).repeat(factor, 1)
        return {"background": picture, "layers": layers, "composite": None}

    def tokens(session: Session, frame: int, width: float) -> str:
        try:
            return tokens_view(session, video, int(frame), band(width))
        except KVLockError as error:  # nothing is drawn yet
            return f'<p class="kv-note">{escape(str(error))}</p>'

    def band(width: float) -> tuple[float, float] | None:
        return (float(width), 0.5) if width > 0 else None

    @in_tab
    def pick(session: Session, name: str, width: float) -> list[Any]:
        prompts = session.load_example(name, video)  # the embedded model has no codec, so this needs no turn
        return [*opened(session), tokens(session, 0, width), *prompts]

    @in_tab
    def upload(session: Session, path: str, width: float) -> list[Any]:
        with busy():
            session.load_clip(path, video)
            return [*opened(session), tokens(session, 0, width), None, "", ""]

    @in_tab
    def upload_mask(session: Session, path: str, frame: int, width: float) -> list[Any]:
        with busy():
            session.load_mask(path, video)
            return [canvas(session, int(frame)), tokens(session, frame, width)]

    @in_tab
    def move(session: Session, frame: int, drawn: Any, before: int, width: float) -> list[Any]:
        keep(session, drawn, before)
        return [canvas(session, int(frame)), frame, tokens(session, frame, width)]

    @in_tab
    def draw(session: Session, drawn: Any, before: int, width: float) -> list[Any]:
        keep(session, drawn, before)
        # Undoing more than was drawn, and clearing the canvas, take away the frame that one draws on.
        whole = drawn is not None and drawn["background"] is not None and drawn["background"][..., -1].any()
        return [tokens(session, before, width), gr.skip() if whole else canvas(session, int(before))]

    def keep(session: Session, drawn: Any, frame: int) -> None:
        if drawn is not None and 0 <= int(frame) < len(session.frames):
            session.draw(int(frame), drawn["layers"])

    @in_tab
    def forget(session: Session, frame: int, width: float) -> list[Any]:
        session.drawn.clear()
        session.given = None
        return [canvas(session, int(frame)), tokens(session, frame, width)]

    @in_tab
    def edit(
        session: Session,
        drawn: Any,
        before: int,
        width: float,
        policy: str,
        parameters: str,
        others: list[str],
        prompt: str,
        source_prompt: str,
        sampler: str,
        steps: int,
        cfg_scale: float,
        strength: float,
        seed: int,
        candidates: int,
        progress: Any = gr.Progress(),  # noqa: B008 - gradio finds it by its default
    ) -> list[Any]:
        settings = Settings(
            prompt,
            source_prompt or None,
            sampler,
            int(steps),
            None if cfg_scale == video.cfg_scale else cfg_scale,
            float(strength),
            int(seed or 0),
            int(candidates),
            band(width),
        )
        # A line break makes it text, where a name or a path would be read from disk.
        policies = {policy: f"{parameters}\n"}
        policies |= {name: to_toml(load_preset(name)) for name in others if name != policy}
        order = list(policies)

        def advance(name: str, step: int) -> None:
            done = order.index(name) * settings.steps + step + 1
            text = f"{name}: step {step + 1} of {settings.steps}"
            progress((min(done, len(order) * settings.steps), len(order) * settings.steps), desc=text)

        cancel = session.cancel = threading.Event()  # of this press: an earlier run may still be in its last step
        with busy(), session.running():
            keep(session, drawn, before)
            try:
                run(session, video, settings, policies, advance, cancel)
            except CancelledError:
                return [said(CANCELLED), *[gr.skip()] * (len(shown) - 1)]
            except KVLockError as error:
                session.trouble = plain(str(error))
                raise
        assert session.results is not None
        mask, folder = session.results.mask, session.results.folder
        scale = fitting_scale(None, video, to_clips(session.frames)[0])
        lines = [command_line(settings, name, mask.name, dict(model)) for name in order]
        programs = [python_lines(settings, name, mask.name, dict(model), scale) for name in order]
        pictures = {f"Trace of {name}": folder / f"{name}-trace.png" for name in order}
        sheets = {f"Seeds tried by {name}": folder / f"{name}-candidates.png" for name in order}
        pictures = {**(sheets if settings.candidates > 1 else {}), **pictures}
        files = [folder / f"{name}.{kind}" for name in order for kind in ("mp4", "toml")]
        last = len(session.frames) - 1
        at_frame = min(max(int(before), 0), last)
        seconds = sum(edit.seconds for edit in session.results.edits.values())
        return [
            said(f"Done in {seconds:.1f} s of sampling."),
            gr.update(visible=True),
            str(folder / "together.mp4"),
            numbers_view(session, video),
            gr.update(choices=order, value=policy),
            gr.update(maximum=max(last, 1), value=at_frame, interactive=last > 0),
            frame_view(session, video, policy, at_frame),
            files_view(pictures),
            [str(path) for path in (*files, *pictures.values(), session.clip_file(), mask)],
            "\n\n".join(lines),
            "\n".join(programs),
        ]

    @in_tab
    def look(session: Session, name: str, frame: int) -> str:
        known = session.results is not None and name in session.results.edits
        return frame_view(session, video, name, min(int(frame), len(session.frames) - 1)) if known else ""

    @in_tab
    def begin(session: Session) -> str:
        session.trouble = ""
        return said()

    @in_tab
    def failed(session: Session) -> str:
        return said(session.trouble)

    @in_tab
    def cancel(session: Session) -> str:
        session.cancel.set()
        return said(CANCELLED)

    def close(request: gr.Request) -> None:  # type: ignore[name-defined]
        sessions.close(request.session_hash)

    with gr.Blocks(title="kvlock", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.Markdown(f"# Edit a region of a clip, and keep the rest\n{LEAD}")
        with gr.Row():
            with gr.Column(min_width=320):
                gr.Markdown("## Clip")
                names = list(EXAMPLES)
                example = gr.Dropdown(names, value=names[0], label="Example", visible=tiny)
                clip_file = gr.UploadButton("Upload a clip or an image", size="md")
                note = gr.HTML(elem_classes="kv-note")
                gr.Markdown(f"## Mask\n{HINT}")
                frame = gr.Slider(0, 7, value=0, step=1, label="Frame to draw on")
                editor = gr.ImageEditor(
                    label="Canvas",
                    sources=(),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(colors=[(f"rgb{EDITED}", OPACITY)], default_size=40, color_mode="fixed"),
                    canvas_size=(CANVAS, CANVAS),
                    height=480,
                    buttons=[],
                    format="png",
                    elem_id="editor",
                )
                before = gr.Number(0, visible=False)
                with gr.Row():
                    clear = gr.Button("Clear the mask", size="md", min_width=120)
                    mask_file = gr.UploadButton("Upload a mask", size="md", min_width=120)
            with gr.Column(min_width=320):
                gr.Markdown(f"## Tokens\n{TOKENS}")
                grid = gr.HTML(elem_id="tokens")
                width = gr.Slider(0, 4, value=0, step=0.5, label="Width of the transition band in tokens")
        with gr.Row():
            with gr.Column(min_width=320):
                gr.Markdown("## Edit")
                prompt = gr.Textbox(label="Prompt: what the region should show", max_length=2000)
                source_prompt = gr.Textbox(label="Source prompt: what the clip shows now", max_length=2000)
                policies = [(f"{name}: {about}", name) for name, _, about in describe()]
                policy = gr.Dropdown(policies, value="default", label="Policy")
                with gr.Accordion("Parameters of the policy", open=False):
                    text = to_toml(load_preset("default"))
                    parameters = gr.Textbox(text, lines=6, max_lines=24, label="TOML", elem_classes="kv-text")
                others = gr.Dropdown(preset_names(), multiselect=True, max_choices=2, label="Compare with two others")
                with gr.Accordion("Sampling", open=False):
                    sampler = gr.Dropdown(list(sampler_names()), value="dpmpp_2m", label="Sampler")
                    steps = gr.Slider(1, 100, value=30, step=1, label="Steps")
                    cfg_scale = gr.Number(video.cfg_scale, label="Guidance scale")
                    strength = gr.Slider(0.05, 1, value=1, step=0.05, label="Strength: 1 is from noise")
                    seed = gr.Number(0, minimum=0, precision=0, label="Seed")
                    candidates = gr.Slider(1, 8, value=1, step=1, label="Seeds to try; the best is finished")
                with gr.Row():
                    start = gr.Button("Edit", variant="primary", min_width=120, elem_id="edit")
                    stop = gr.Button("Cancel", min_width=120, elem_id="cancel")
                status = gr.HTML(said(), elem_id="status")
            with gr.Column(min_width=320):
                gr.Markdown(f"## Result\n{RESULT}")
                with gr.Column(visible=False) as results:
                    together = gr.Video(show_label=False, autoplay=True, loop=True, elem_id="together")
                    numbers = gr.HTML(elem_id="numbers")
                    gr.Markdown("### Frame by frame")
                    chosen = gr.Radio([], label="Policy")
                    at = gr.Slider(0, 7, value=0, step=1, label="Frame")
                    view = gr.HTML(elem_id="view")
                    gr.Markdown(f"### What the lock did\n{TRACE}")
                    figures = gr.HTML(elem_id="figures")
                    gr.Markdown("### Take it with you")
                    files = gr.File(label="Files", file_count="multiple", interactive=False)
                    shell = gr.Textbox(label="In a shell", elem_classes="kv-text", buttons=["copy"], elem_id="shell")
                    program = gr.Textbox(label="In Python", elem_classes="kv-text", buttons=["copy"], elem_id="program")

        opening = [note, frame, editor, before, results, status, grid]
        shown = [status, results, together, numbers, chosen, at, view, figures, files, shell, program]
        quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        slow: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "model"}
        if tiny:
            blocks.load(pick, [example, width], [*opening, prompt, source_prompt], **quick)  # nothing runs in a new tab
            example.input(pick, [example, width], [*opening, prompt, source_prompt], show_progress_on=note, **slow)
        loaded = [*opening, example, prompt, source_prompt]
        clip_file.upload(upload, [clip_file, width], loaded, show_progress_on=note, **slow)
        mask_file.upload(upload_mask, [mask_file, frame, width], [editor, grid], show_progress_on=grid, **slow)
        moved = [editor, before, grid]
        frame.input(move, [frame, editor, before, width], moved, trigger_mode="always_last", **quick)
        editor.input(draw, [editor, before, width], [grid, editor], trigger_mode="always_last", **quick)
        width.input(draw, [editor, before, width], [grid, editor], trigger_mode="always_last", **quick)
        clear.click(forget, [frame, width], [editor, grid], **quick)
        policy.input(in_tab(lambda session, name: to_toml(load_preset(name))), policy, parameters, **quick)
        options = [prompt, source_prompt, sampler, steps, cfg_scale, strength, seed, candidates]
        inputs = [editor, before, width, policy, parameters, others, *options]
        start.click(begin, None, status, **quick)
        running = start.click(edit, inputs, shown, show_progress_on=status, **slow)
        running.failure(failed, None, status, **quick)
        stop.click(cancel, None, status, cancels=[running], queue=False, api_visibility="private")
        for look_event in (chosen.input, at.input):
            look_event(look, [chosen, at], view, trigger_mode="always_last", **quick)
        blocks.unload(close)
    return blocks


def said(html: str = "") -> str:
    """What screen readers announce."""
    return f'<div role="status">{html}</div>'
