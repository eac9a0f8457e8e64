"""Applications built on the library: `edit_video`, calibration, and the command `kvlock`."""
