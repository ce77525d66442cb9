"""What the figures of a training warn of, while it runs: that it may teach nothing, or something
else than it should."""

import sys
from collections.abc import Callable, Iterable

from engine.parallel import say
from settings import TrainSettings

PATIENCE = 5  # steps in a row whose groups are all equal
MOST_APART = 0.05  # nats a token between update and sampling, on average


def watcher(settings: TrainSettings) -> Callable[[dict[str, float]], None]:
    """A function that is given each step's figures, and says each warning once."""
    equal_steps, said = 0, set()

    def warn(about: str, words: str) -> None:
        if about not in said:
            say(f"\nwarning: {words}", file=sys.stderr)
        said.add(about)

    def watch(figures: dict[str, float]) -> None:
        nonlocal equal_steps
        equal_steps = equal_steps + 1 if figures["equal_groups"] == 1 else 0
        if equal_steps == PATIENCE:
            warn(
                "equal",
                f"for {PATIENCE} steps all responses to each window earned the same reward, which "
                f"teaches nothing: {likely_cause(figures, settings)}",
            )
        if figures["mismatch"] > MOST_APART:
            warn(
                "apart",
                f"update and sampling differ by {figures['mismatch']:.2g} nats a token (mismatch): "
                "the responses are hardly those of the policy that is trained on them; look for a "
                "fault in --model or its kernels, or compute with --dtype float32 on a CPU",
            )

    return watch


def likely_cause(figures: dict[str, float], settings: TrainSettings) -> str:
    """Why all groups are equal, and what to change."""
    if figures["cut_off"] > 0.5:
        return (
            f"{figures['cut_off']:.0%} of the responses are cut off by --max_new_tokens "
            f"{settings.max_new_tokens}: raise it"
        )
    if figures["malformed"] > 0.5:
        return (
            f"{figures['malformed']:.0%} of the responses hold no answer that can be read: see "
            "responses.jsonl, and whether --prompt and --model fit together"
        )
    return (
        "the responses are too much alike, or the windows too easy or too hard: see "
        f"responses.jsonl; raise --temperature {settings.temperature:g} or --group_size "
        f"{settings.group_size}, or sample equal groups again with --resample"
    )


def say_what_taught(records: Iterable[dict]) -> None:
    """At the end of a run: where no group of any step was unequal, that it learned nothing."""
    equal = [record.get("equal_groups") for record in records]
    if equal and set(equal) == {1}:
        say(
            f"warning: in none of the {len(equal)} steps did any two responses to a window earn "
            "different rewards: this training has learned nothing from its reward",
            file=sys.stderr,
        )
