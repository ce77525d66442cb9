"""Flags, presets and settings files: how a program's settings are given, read, and held to their
ranges."""

import json
import re
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import Field, fields
from functools import wraps
from io import TextIOWrapper
from pathlib import Path
from signal import SIGINT
from typing import Any, NoReturn, get_args, get_origin

import yaml

from settings import UserError

Given = dict[str, tuple[str, str | list[str]]]  # by name: where it stands, and its text or texts
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def program(main: Callable[[], None]) -> Callable[[], None]:
    """`main` as a program: what a user did, or can mend, ends it with one message, no traceback;
    a character that the terminal lacks is printed as its escape, and ends nothing."""

    @wraps(main)
    def run() -> None:
        if isinstance(sys.stdout, TextIOWrapper):
            with suppress(OSError):  # what cannot be written to is not the program's end
                sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is
        try:
            main()
        except (UserError, OSError) as error:
            raise SystemExit(str(error)) from None
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            raise SystemExit(128 + SIGINT) from None

    return run


def parse_settings(
    doc: str | None,
    *kinds: type,
    presets: dict[str, dict[str, Any]] | None = None,
    others: dict[str, dict[str, Any]] | None = None,
) -> tuple:
    """An instance of each of the dataclasses `kinds`; then, where there are `others`, arguments
    and flags that are no settings (name -> what argparse wants to know), a namespace of those.

    A preset (--preset NAME) comes first, a settings file (a first argument that ends in .yaml,
    .yml or .json) over it, flags over both. What no dataclass holds is an error, and so is a value
    out of its range, in all three.
    """
    parser = ArgumentParser(description=(doc or "").split("\n")[0], allow_abbrev=False)
    parser.error = refuse
    parser._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)")  # -1e-3, -inf: no flags
    known = {field.name: field for kind in kinds for field in fields(kind)}
    for field in known.values():
        add_flag(parser, field)
    for name, how in (others or {}).items():
        parser.add_argument(name, **how)

    args = sys.argv[1:]
    in_file: Given = {}
    if args and Path(args[0]).suffix in (".yaml", ".yml", ".json"):
        path, *args = args
        in_file = read_settings(path)
    inputs, unknown = parser.parse_known_args(args)
    if unknown:
        refuse(f"unknown flag {unknown[0]}")
    flags = {name: vars(inputs).pop(name) for name in known if name in inputs}
    given = in_file | {name: ("", value) for name, value in flags.items()}
    if presets and "preset" in given:
        given = preset_values(presets, read_setting(known["preset"], *given["preset"])) | given

    for name, (where, _) in given.items():
        if name not in known:
            refuse(f"{where}unknown setting {name!r:.60}")
    values = {name: read_setting(known[name], *given[name]) for name in given}
    parsed = [
        kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values}) for kind in kinds
    ]
    return (*parsed, inputs) if others else tuple(parsed)


def refuse(message: str) -> NoReturn:
    raise UserError(message)


def add_flag(parser: ArgumentParser, field: Field) -> None:
    """What is given stays text, and is read as a file's values are."""
    default = field.default_factory() if is_list(field) else field.default
    meaning = field.metadata["help"]
    if field.metadata["within"]:
        meaning += f"; {expected(field)}"
    if default not in ("", []):
        meaning += f" (default: {default})"
    how: dict[str, Any] = {"nargs": "+"} if is_list(field) else {}
    if field.type is bool:
        how = {"nargs": "?", "const": "true"}
    if choices := field.metadata["choices"]:
        how["metavar"] = "{" + ",".join(filter(None, choices)) + "}"
    parser.add_argument(f"--{field.name}", default=SUPPRESS, help=meaning.replace("%", "%%"), **how)


def preset_values(presets: dict[str, dict[str, Any]], name: str) -> Given:
    """A preset's settings, as a file would hold them."""

    def text(value: Any) -> str | list[str]:
        return [str(item) for item in value] if isinstance(value, list) else str(value)

    return {k: (f"--preset {name}: ", text(v)) for k, v in presets.get(name, {}).items()}


# --------------------------------------------------------------------------------- one setting


def is_list(field: Field) -> bool:
    return get_origin(field.type) is list


def read_setting(field: Field, where: str, given: str | list[str]) -> Any:
    """A setting's value. UserError, naming where it stands and the flag, where it is another kind
    of value or out of its range."""
    texts = given if isinstance(given, list) else [given]
    try:
        values = [read_value(field, text) for text in texts]
        if not is_list(field):
            (value,) = values
            return value
        if field.metadata["count"] not in (0, len(values)):
            raise ValueError
        return values
    except (ValueError, KeyError):
        shown = f"{' '.join(texts):.60}" or "''"
        refuse(f"{where}--{field.name} {shown}: expected {expected(field)}")


def read_value(field: Field, text: str) -> Any:
    """One value. ValueError or KeyError where it is none, or out of its range."""
    kind = (*get_args(field.type), field.type)[0]
    value = BOOLEANS[text.lower()] if kind is bool else kind(text)
    if choices := field.metadata["choices"]:
        right = value in choices
    elif within := field.metadata["within"]:
        # A nan is in no range.
        right = within[0] <= value <= within[1] or (field.metadata["or_zero"] and value == 0)
    else:
        right = True
    if not right:
        raise ValueError
    return value


def expected(field: Field) -> str:
    """What a setting may be, in words."""
    if choices := field.metadata["choices"]:
        return f"one of {', '.join(filter(None, choices))}"
    if not field.metadata["within"]:
        return "true or false" if field.type is bool else "one text"
    low, high = field.metadata["within"]
    bounds = f"from {low:,.15g} to {high:,.15g}"
    if count := field.metadata["count"]:
        return f"{count} numbers, each {bounds}"
    kind = "a whole number" if field.type is int else "a number"
    return f"{'0 or ' if field.metadata['or_zero'] else ''}{kind} {bounds}"


# ------------------------------------------------------------------------------ a settings file


def read_settings(path: str | Path) -> Given:
    """The settings in a .yaml, .yml or .json file: one mapping, names as on the command line. Each
    value is taken as it is written, and not as what YAML makes of it (of 012, 1:30 or no)."""
    found: Given = {}
    try:
        text = Path(path).read_text(encoding="utf-8")
        entries = json_entries if str(path).endswith(".json") else yaml_entries
        for where, name, value in entries(text):
            where = f"{path}:{where} "
            if name in found:
                refuse(f"{where}{name!r:.60} stands there twice")
            if not all(isinstance(x, str) for x in (value if isinstance(value, list) else [value])):
                refuse(f"{where}{name!r:.60} has no value, or one that is no setting's")
            found[name] = where, value
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f"{error.problem_mark.line + 1}: " if error.problem_mark else " "
        raise UserError(f"{path}:{line}cannot read settings: {error.problem}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"{path}: cannot read settings: {words:.300}") from None
    if not found:
        raise UserError(f"{path}: expected a mapping of settings, like 'steps: 160'")
    return found


def yaml_entries(text: str) -> Iterator[tuple[str, Any, Any]]:
    """(line, name, value) of each line of a mapping; None for what is no text, or nothing."""

    def written(node: yaml.Node) -> str | None:
        empty = node.tag.endswith(":null")
        return node.value if isinstance(node, yaml.ScalarNode) and not empty else None

    root = yaml.compose(text, yaml.SafeLoader)
    for key, value in root.value if isinstance(root, yaml.MappingNode) else []:
        many = isinstance(value, yaml.SequenceNode)
        values = [written(node) for node in value.value] if many else written(value)
        yield f"{key.start_mark.line + 1}:", written(key), values


def json_entries(text: str) -> Iterator[tuple[str, Any, Any]]:
    """The same of a JSON object, without lines."""

    def written(value: Any) -> Any:
        return str(value).lower() if isinstance(value, bool) else value

    root = json.loads(
        text, object_pairs_hook=tuple, parse_int=str, parse_float=str, parse_constant=str
    )
    for name, value in root if isinstance(root, tuple) else []:
        yield "", name, [written(x) for x in value] if isinstance(value, list) else written(value)
