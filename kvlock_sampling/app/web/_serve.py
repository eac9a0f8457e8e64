"""Serve the page on this machine alone, from a folder that is deleted at the end."""

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...utils.extras import require
from ..models import open_model
from ._page import page
from ._session import Sessions
from ._uploads import LARGEST_FILE
from ._views import CSS


def serve(model: str = "tiny", port: int = 7860, *, on_start: Callable[[str], None] = print, **options: Any) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C or SIGTERM.

    Args:
        model: As in `open_model`.
        port: Of TCP; 0 takes a free one.
        on_start: Called with the address of the page.
        options: Other options of `open_model`.

    Raises:
        KVLockError: The model cannot be opened, or the extra `web`, `video` or `plot` is not installed.
        OSError: The port is taken.
    """
    for module, extra in (("av", "video"), ("matplotlib", "plot")):
        require(module, extra)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    gr = require("gradio", "web")
    given = {name: value for name, value in {"model": model, **options}.items() if value not in (None, "none", "tiny")}
    video = open_model(model, **options)
    ended = threading.Event()
    with tempfile.TemporaryDirectory(prefix="kvlock-web-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads, and what the page shows
        sessions = Sessions(Path(folder))
        blocks = page(video, sessions, given)
        blocks.queue(max_size=20)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            _, address, _ = blocks.launch(
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
            on_start(address)
            ended.wait()
        finally:
            sessions.close_all()
            blocks.close(verbose=False)
