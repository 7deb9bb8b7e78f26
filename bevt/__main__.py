"""`bevt` and `python -m bevt`."""

import sys


def main() -> None:
    """The command line; Ctrl-C during the second in which it is imported ends it as later."""
    try:
        from bevt.cli import main as command
    except KeyboardInterrupt:
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
