"""The figures of a run as event files, for those who watch theirs in TensorBoard."""

import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from engine.parallel import say
from settings import UserError


def require_tensorboard() -> None:
    if find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard")


def write_events(folder: Path, first: int, step: int, figures: dict[str, float]) -> None:
    """Add a step's figures. first: the step that this process began at; what an earlier one wrote
    of the steps from there on is no longer shown. What cannot be written is said, and no error."""
    try:
        writer = open_writer(folder, first)
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()
    except Exception as error:  # its writer passes on whatever its own thread met
        say(f"\nno TensorBoard events for step {step}: {error}", file=sys.stderr)


@cache
def open_writer(folder: Path, first: int):
    from torch.utils.tensorboard import SummaryWriter  # imported only where it is asked for

    return SummaryWriter(folder, purge_step=first)
