"""How the programs read their settings: a dataclass each, flags, a YAML or JSON file, presets."""

import json
import sys
from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def setting(default: Any, meaning: str, choices: Sequence[str] | None = None) -> Any:
    """A field of a settings dataclass, with the line that --help shows for it."""
    metadata = {"help": meaning.replace("%", "%%")}
    if choices:
        metadata["choices"] = list(choices)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a .yaml, .yml or .json file: one mapping, names as on the command line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        loaded = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SystemExit(f"{path}: cannot read settings: {error}") from None
    if not isinstance(loaded, dict):
        raise SystemExit(f"{path}: expected a mapping of settings, like 'steps: 160'")
    return loaded


def parse_settings(
    parser: HfArgumentParser, presets: dict[str, dict[str, Any]] | None = None
) -> tuple:
    """One instance of each of the parser's dataclasses (then a namespace of other arguments).

    A preset (--preset NAME) comes first, a settings file (a first argument that ends in .yaml,
    .yml or .json) over it, flags over both. What no dataclass holds is an error, in all three.
    """
    args = sys.argv[1:]
    if args and Path(args[0]).suffix in (".yaml", ".yml", ".json"):
        path, *args = args
        known = {f.name for settings in parser.dataclass_types for f in fields(settings)}
        for name, value in read_settings(path).items():
            if name not in known:
                parser.error(f"{path}: unknown setting {name!r}")
            flag = f"--{name}"
            values = [str(item) for item in value] if isinstance(value, list) else [str(value)]
            # In front of the command line's own, so that those win; parsed alike, so checked alike.
            args = [flag, *values, *args]
    for arg in args:
        # Before argparse takes the value of a misspelt flag for a positional argument.
        if arg.startswith("--") and arg.partition("=")[0] not in parser._option_string_actions:
            parser.error(f"unknown flag {arg}")
    if presets:
        chooser = HfArgumentParser((), add_help=False, allow_abbrev=False)
        chooser.add_argument("--preset", choices=sorted(presets))
        chosen, _ = chooser.parse_known_args(args)
        parser.set_defaults(**presets.get(chosen.preset, {}))
    *parsed, unknown = parser.parse_args_into_dataclasses(
        args, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return tuple(parsed)
