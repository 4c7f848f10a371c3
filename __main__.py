"""Where the command line starts, as `revprobe` and as `python -m revprobe`: Ctrl-C is one line from here on."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; it is imported here, so that Ctrl-C during that leaves no traceback."""
    try:
        from .cli.main import main as run

        run()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
