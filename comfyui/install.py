"""Install what the nodes need into ComfyUI's environment:  python install.py

kvlock-sampling goes in without its dependencies: k-diffusion would pull NumPy below 2, and the nodes need neither it
nor diffusers. Of the rest ComfyUI lacks only what requirements.txt lists.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def library() -> str:
    """The checkout that this folder belongs to, or the published package."""
    project = HERE.parent / "pyproject.toml"
    inside = project.is_file() and 'name = "kvlock-sampling"' in project.read_text(encoding="utf-8")
    return str(HERE.parent) if inside else "kvlock-sampling"


def main() -> None:
    pip = [sys.executable, "-m", "pip", "install"]
    subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)
    subprocess.run([*pip, "--no-deps", library()], check=True)


if __name__ == "__main__":
    main()
