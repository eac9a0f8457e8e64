"""Entry point of the command `kvlock`; imports the command line only if its packages are installed."""

import signal
import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line. Exits with status 1 if typer or rich is missing."""
    for package in ("typer", "rich"):
        if find_spec(package) is None:
            sys.exit(f"kvlock needs {package}, which is not installed: pip install 'kvlock-sampling[all]'")
    from .cli import app

    for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) is signal.SIG_DFL:  # which would leave half-written files
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    app()


if __name__ == "__main__":
    main()
