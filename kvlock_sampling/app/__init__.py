"""Applications built on the library: `edit_video`, calibration, and the command `kvlock`."""

from .calibration import Calibration, Example, calibrate, folder, scenes
from .edit import Edit, edit_video
from .models import VideoModel, open_model, read_pair

__all__ = [
    "Calibration",
    "Edit",
    "Example",
    "VideoModel",
    "calibrate",
    "edit_video",
    "folder",
    "open_model",
    "read_pair",
    "scenes",
]
