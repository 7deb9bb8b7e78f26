"""SIGTERM as Ctrl-C: a scheduler's ends the processes of a command, too."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def terminable() -> Iterator[None]:
    """Within it SIGTERM raises KeyboardInterrupt, at which `subprocess.run` ends what it waits for."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
