"""Serve the page on this machine alone, from a folder that is deleted at the end."""

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ...types import KVLockError
from ...utils.extras import require
from ..models import VideoModel, open_model
from ._page import page
from ._session import Sessions
from ._uploads import LARGEST_FILE
from ._views import CSS

LAST_STEP = 60.0  # seconds that the end of the server waits for the step of a run


def serve(model: str = "tiny", port: int = 7860, *, on_start: Callable[[str], None] = print, **options: Any) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C or SIGTERM.

    Args:
        model: As in `open_model`.
        port: Of TCP.
        on_start: Called with the address of the page.
        options: Other options of `open_model`.

    Raises:
        KVLockError: The port is taken, the model cannot be opened, or the extra `web`, `video` or `plot` is missing.
    """
    model = str(Path(model).absolute()) if model != "tiny" and Path(model).exists() else model
    given = {name: value for name, value in {"model": model, **options}.items() if value not in (None, "none", "tiny")}
    with _signals_interrupt(), served(lambda: open_model(model, **options), port, given) as (address, _):
        on_start(address)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


@contextmanager
def served(open_video: Callable[[], VideoModel], port: int, model: Mapping[str, Any]) -> Iterator[tuple[str, Sessions]]:
    """Serve the page inside the block. Yields its address, and what its tabs work on."""
    with (
        tempfile.TemporaryDirectory(prefix="kvlock-web-", ignore_cleanup_errors=True) as folder,
        # What gradio reads when it is imported, and when it builds a page. What lies in its folder it deletes in time.
        patch.dict(
            os.environ, GRADIO_TEMP_DIR=f"{folder}/gradio", GRADIO_ANALYTICS_ENABLED="False", no_proxy="127.0.0.1"
        ),
    ):
        _check_free(port)
        gr, *_ = (require(*needed) for needed in (("gradio", "web"), ("av", "video"), ("matplotlib", "plot")))
        # Without this check a page of another site could reach the server under a name of its own.
        trusted = require("starlette.middleware.trustedhost", "web").TrustedHostMiddleware
        only_here = require("starlette.middleware", "web").Middleware(trusted, allowed_hosts=["127.0.0.1", "localhost"])
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
                app_kwargs={"middleware": [only_here]},
                max_file_size=LARGEST_FILE,
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                css=CSS,
            )
            yield address, sessions
        finally:
            sessions.close_all()
            if sessions.model.acquire(timeout=LAST_STEP):  # a thread in the model would abort the process at its end
                sessions.model.release()
            blocks.close(verbose=False)


def _check_free(port: int) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError as error:
            hint = f"kvlock web --port {port + 1}"
            raise KVLockError(f"port {port} cannot be used: {error.strerror}. Give another: {hint}") from error


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, where Python allows it: in the main thread."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    main = threading.current_thread() is threading.main_thread()
    before = {name: signal.signal(getattr(signal, name), signal.default_int_handler) for name in names if main}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
