"""What a folder's JSON files tell, and how a page lists it."""

from collections.abc import Iterator

LONGEST = 40


def flat(facts: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The facts, nested ones under "outer inner", those of a list under its places. What is longer
    than LONGEST is only counted."""
    for name, value in facts.items():
        nested = isinstance(value, list) and value and isinstance(value[0], dict)
        inside = dict(enumerate(value, start=1)) if nested else value
        if isinstance(inside, dict | list) and len(inside) > LONGEST:
            yield prefix + name, f"({len(inside)} values)"
        elif isinstance(inside, dict):
            yield from flat(inside, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", plain(value)


def plain(value: object) -> str:
    """A setting as one would type it."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
