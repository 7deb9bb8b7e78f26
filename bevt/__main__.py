"""`bevt` and `python -m bevt`."""

import atexit
import signal
import sys


def main() -> None:
    """The command line; Ctrl-C during the second in which it is imported ends it as later."""
    atexit.register(_deaf)  # before any other is, so that it is called last
    try:
        from bevt.cli import main as command
    except KeyboardInterrupt:
        sys.exit(130)
    command()


def _deaf() -> None:
    """From here on only the interpreter ends. It would put the default handlers back while it does, and a signal that
    comes then would replace the exit status.
    """
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)


if __name__ == "__main__":
    main()
