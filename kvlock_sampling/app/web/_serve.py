"""Serve the page on this machine alone, from a folder that is deleted at the end."""

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...utils.extras import require
from ..models import VideoModel, open_model
from ._page import page
from ._session import Sessions
from ._uploads import LARGEST_FILE
from ._views import CSS


def serve(model: str = "tiny", port: int = 7860, *, on_start: Callable[[str], None] = print, **options: Any) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C or SIGTERM.

    Args:
        model: As in `open_model`.
        port: Of TCP.
        on_start: Called with the address of the page.
        options: Other options of `open_model`.

    Raises:
        KVLockError: The model cannot be opened, or the extra `web`, `video` or `plot` is not installed.
        OSError: The port is taken.
    """
    model = str(Path(model).absolute()) if Path(model).exists() else model
    given = {name: value for name, value in {"model": model, **options}.items() if value not in (None, "none", "tiny")}
    with _until_stopped() as stopped, served(lambda: open_model(model, **options), port, given) as (address, _):
        on_start(address)
        stopped.wait()


@contextmanager
def served(open_video: Callable[[], VideoModel], port: int, model: Mapping[str, Any]) -> Iterator[tuple[str, Sessions]]:
    """Serve the page inside the block. Yields its address, and what its tabs work on."""
    with tempfile.TemporaryDirectory(prefix="kvlock-web-", ignore_cleanup_errors=True) as folder, _environment(folder):
        gr, *_ = (require(*needed) for needed in (("gradio", "web"), ("av", "video"), ("matplotlib", "plot")))
        video = open_video()
        sessions = Sessions(Path(folder))
        blocks = page(video, sessions, model)
        try:
            _, address, _ = blocks.queue(max_size=20).launch(
                server_name="127.0.0.1",
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                footer_links=[],
                max_file_size=LARGEST_FILE,
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                css=CSS,
            )
            yield address, sessions
        finally:
            sessions.close_all()
            blocks.close(verbose=False)


@contextmanager
def _environment(folder: str) -> Iterator[None]:
    """What gradio reads when it is imported, and when it builds a page."""
    wanted = {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
    before = {name: os.environ[name] for name in wanted if name in os.environ}
    os.environ |= wanted
    try:
        yield
    finally:
        for name in wanted:
            del os.environ[name]
        os.environ |= before


@contextmanager
def _until_stopped() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, where Python allows it: in the main thread."""
    stopped, before = threading.Event(), {}
    if threading.current_thread() is threading.main_thread():
        before = {s: signal.signal(s, lambda *_: stopped.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
