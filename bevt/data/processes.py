"""How helper processes are started, and how they end, in one place."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any


def context() -> BaseContext:
    """A start method that is safe beside threads and CUDA: `forkserver`, or `spawn` where that does not exist.

    A plain fork of a process that already runs OpenMP or CUDA threads can deadlock in the child. The fork server
    imports torch and the decoders once, so that further workers start in milliseconds. It is started with SIGTERM and
    SIGINT blocked, which its children inherit: a scheduler or a terminal that signals the whole process group must not
    take the workers away from a training process that still has a step to finish, nor end them with tracebacks.

    As with any such start method, a script that trains needs `if __name__ == "__main__":` around what it does.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver, resource_tracker

    ctx = multiprocessing.get_context("forkserver")
    ctx.set_forkserver_preload(["bevt.data.decoding", "av", "PIL.Image"])
    resource_tracker.ensure_running()  # the fork server starts it too, and that unblocks them
    with undisturbed():
        forkserver.ensure_running()
    return ctx


@contextmanager
def undisturbed() -> Iterator[None]:
    """SIGTERM and SIGINT wait for the end of the block: a process that is half started when its parent ends prints a
    traceback. Processes started in it have both blocked.

    The mask is the calling thread's; a signal that another thread takes runs its handler in the main thread all the
    same, so the handlers are set aside too.
    """
    both = (signal.SIGTERM, signal.SIGINT)
    waiting: list[int] = []
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {each: signal.signal(each, lambda number, _: waiting.append(number)) for each in both}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, both)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in waiting[:1]:
            signal.raise_signal(number)


def initialize(*_: object) -> None:
    """First call in every helper process: leave signals to the parent, and end when the parent does, however it does.

    The parent's death has to be watched: a child of the fork server keeps the server alive, and is never orphaned.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where processes are spawned, nothing is blocked
    threading.Thread(target=_end_with_parent, daemon=True).start()


def pool(workers: int) -> ProcessPoolExecutor:
    """A pool of helper processes. Its semaphores would leak where a signal comes while they are made."""
    with undisturbed():
        return ProcessPoolExecutor(workers, mp_context=context(), initializer=_initialize_pool)


def _initialize_pool() -> None:
    """`initialize`, and SIGTERM as it was: by it a pool ends its processes when one of them has died."""
    initialize()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a helper process"
    parent.join()
    os._exit(1)


def stop_with_parent(patience: float = 300.0) -> None:
    """SIGTERM for this process once its parent has ended, however, and its end after `patience` seconds: processes of
    torchrun would outlive one that is killed, and hold their GPUs.

    One that waits for others inside a library, to join them, say, never gets to its handler.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(patience)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def end(children: Sequence[BaseProcess], patience: float = 1.0) -> None:
    """Kill the helper processes that have not ended by themselves after `patience` seconds.

    They do not react to SIGTERM (`context`), so nothing milder ends one that was never told to stop; without this the
    interpreter would wait for it at its exit, for ever.
    """
    deadline = time.monotonic() + patience
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        if child.is_alive():
            child.kill()
            child.join()


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
