"""An end to what a stranger's files can make last for ever."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from settings import UserError

SECONDS = 10


@contextmanager
def limited(what: str) -> Iterator[None]:
    """UserError, naming `what`, where what is inside takes more than SECONDS. It is for Python's
    own code and its regular expressions; only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_) -> None:
        raise UserError(f"{what} took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
