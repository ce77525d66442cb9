"""Printing that never ends a program: stdout and stderr may be a full disk, or a closed pipe."""

import os
import sys
from contextlib import suppress
from typing import Any, TextIO


class Unbreakable:
    """A text stream whose `write` and `flush` raise nothing: what it cannot take is lost."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: it is closed, or cannot encode
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def make_unbreakable() -> None:
    """From here on, sys.stdout and sys.stderr are so."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), Unbreakable):
            # None where it was closed before the program began.
            stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
            setattr(sys, name, Unbreakable(stream))
