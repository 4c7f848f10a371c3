"""Let `python -m revprobe` do what the `revprobe` command does."""

from .cli.main import main

if __name__ == "__main__":
    main()
