"""Flags, presets and settings files: every number has its range, and what is wrong is named."""

import sys
from dataclasses import fields

import pytest

import analyses
import data
import evaluate
import first_stage
import grpo
import rearank
import settings
import sft
from agent import load_agent
from engine import flags
from presets import PRESETS
from settings import TrainSettings, UserError

KINDS = {
    grpo: [settings.TrainSettings, settings.DryRunSettings],
    evaluate: [settings.SourceSettings, settings.EvaluateSettings, settings.AgentSettings],
    rearank: [settings.AgentSettings, settings.SourceSettings],
    sft: [settings.SftSettings],
    analyses: [
        *(settings.SourceSettings, settings.AnalysisSettings),
        *(settings.EvaluateSettings, settings.AgentSettings),
    ],
    data: [settings.SourceSettings, settings.DataSettings],
    first_stage: [settings.SourceSettings, settings.FirstStageSettings],
}
NUMBERS = [
    (program, field)
    for program, kinds in KINDS.items()
    for kind in kinds
    for field in fields(kind)
    if field.type in (int, float, list[float], list[int])
]


def named(case) -> str:
    return getattr(case, "__name__", getattr(case, "name", None))


def train(monkeypatch, *args, presets=PRESETS) -> TrainSettings:
    monkeypatch.setattr(sys, "argv", ["grpo.py", *map(str, args)])
    return flags.parse_settings("", TrainSettings, presets=presets)[0]


def test_a_program_that_is_interrupted_says_so_in_a_line(capsys):
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        flags.program(main)()
    assert stop.value.code == 130 and capsys.readouterr().err == "\ninterrupted\n"


def test_every_settings_class_is_some_programs():
    every = {kind for kind in vars(settings).values() if hasattr(kind, "__dataclass_fields__")}
    every -= {settings.RunSettings}  # of which others are made
    assert every == {kind for kinds in KINDS.values() for kind in kinds}


@pytest.mark.parametrize("program, field", NUMBERS, ids=named)
def test_every_number_has_a_range_and_what_is_outside_is_refused(program, field, monkeypatch):
    low, high = field.metadata["within"]
    below = low - 1 if field.type is int else low / 2 if low else -1e-9
    outside = [below, high + 1, high * 1.01 + 1, 2**70, -(2**70), "nan", "inf", "-inf", "", "1,0"]
    outside += ["0.5"] if field.type is int else ["1e999"]
    for value in outside:
        values = [value] * (field.metadata["count"] or 1)
        others = {rearank: ["q", "nosuch"], analyses: ["passes"]}.get(program, [])
        argv = ["", *others, f"--{field.name}", *values]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        with pytest.raises(SystemExit) as stop:
            program.main()
        bounds = f"from {low:,.15g} to {high:,.15g}"
        assert str(stop.value).startswith(f"--{field.name} "), stop.value
        assert str(stop.value).endswith(bounds) and "\n" not in str(stop.value)


@pytest.mark.parametrize("program, field", NUMBERS, ids=named)
def test_the_bounds_themselves_and_the_default_are_inside(program, field):
    default = field.default_factory() if flags.is_list(field) else field.default
    for value in field.metadata["within"]:
        texts = [str(value)] * (field.metadata["count"] or 1)
        assert flags.read_setting(field, "", texts) in (value, [value] * len(texts))
    texts = [str(value) for value in (default if flags.is_list(field) else [default])]
    assert flags.read_setting(field, "", texts) == default


def test_zero_is_inside_where_it_means_something_of_its_own(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--temperature", "0"])
    assert flags.parse_settings("", settings.AgentSettings)[0].temperature == 0
    with pytest.raises(UserError, match=r"--temperature 0: expected a number from 0.01 to 100"):
        train(monkeypatch, "--temperature", "0")


@pytest.mark.parametrize("task", ["", "listwise"])
def test_windows_that_would_skip_passages_are_refused_before_a_model_is_loaded(tmp_path, task):
    with pytest.raises(UserError, match=r"step_size must be 1 to window_size \(20\), not 30"):
        load_agent(settings.AgentSettings(model=str(tmp_path), task=task, step_size=30))
    (tmp_path / "settings.json").write_text('{"task": "setwise"}')  # which does not slide
    if not task:
        with pytest.raises(UserError, match=f"--model {tmp_path}: cannot be loaded"):
            load_agent(settings.AgentSettings(model=str(tmp_path), step_size=30))


@pytest.mark.parametrize("weights", [["1"], ["1"] * 4, ["1", "nan", "1"], ["-1e-3", "1", "1"]])
def test_weights_are_three(monkeypatch, weights):
    with pytest.raises(UserError, match="expected 3 numbers, each from 0 to 1,000"):
        train(monkeypatch, "--weights", *weights)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_what_flags_do_not(monkeypatch, name):
    got = train(monkeypatch, "--preset", name, "--draws", 7)
    expected = TrainSettings(**PRESETS[name] | {"preset": name, "draws": 7})
    assert got == expected


def test_presets_have_ranges_too(monkeypatch):
    with pytest.raises(UserError, match=r"--preset toy: --clip 3: expected a number from"):
        train(monkeypatch, "--preset", "toy", presets={"toy": {"clip": 3}})


# ------------------------------------------------------------------------------ settings files


@pytest.fixture
def from_file(monkeypatch, tmp_path):
    def read(content: str, *args, suffix: str = "yaml") -> TrainSettings:
        path = tmp_path / f"mine.{suffix}"
        path.write_text(content)
        return train(monkeypatch, path, *args)

    return read


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_flags_win_over_the_file_and_the_file_over_the_preset(from_file, suffix):
    content = '{"preset": "toy", "steps": 5, "draws": 6, "tensorboard": true, "weights": [1, 0, 0]}'
    got = from_file(content, "--draws", 7, suffix=suffix)
    assert (got.steps, got.draws, got.tensorboard, got.weights) == (5, 7, True, [1.0, 0.0, 0.0])
    assert got.batch_size == PRESETS["toy"]["batch_size"]


def test_yaml_values_are_what_is_written(from_file):
    content = (
        "steps: 012\nmodel: no\noutput_dir: 2026-01-02\nlearning_rate: 1e-5\ntask: 'setwise'\n"
    )
    got = from_file(content + "prompt: ''\nallow_overlap: yes\nseed: 1_000\ncandidates: 1.10\n")
    assert (got.steps, got.model, got.output_dir) == (12, "no", "2026-01-02")
    assert (got.learning_rate, got.prompt, got.allow_overlap) == (1e-5, "", True)
    assert (got.task, got.seed, got.candidates) == ("setwise", 1000, "1.10")


@pytest.mark.parametrize(
    "content, message",
    [
        ("draws: 3\nsteps: 1\nsteps: 2", "mine.yaml:3: 'steps' stands there twice"),
        ("steps:\n", "mine.yaml:1: 'steps' has no value"),
        ("\nprompt: null", "mine.yaml:2: 'prompt' has no value"),
        ("weights: [1, ~, 1]", "mine.yaml:1: 'weights' has no value"),
        ("steps: {a: 1}", "mine.yaml:1: 'steps' has no value, or one that is no setting's"),
        ("steps: 1:30", "mine.yaml:1: --steps 1:30: expected a whole number from 1"),
        ("steps: 0x10", "mine.yaml:1: --steps 0x10: expected a whole number"),
        ("steps: [1, 2]", "mine.yaml:1: --steps 1 2: expected a whole number"),
        ("weights: 1", "mine.yaml:1: --weights 1: expected 3 numbers"),
        ("task: pairwise", "mine.yaml:1: --task pairwise: expected one of listwise, setwise"),
        ("allow_overlap: maybe", "mine.yaml:1: --allow_overlap maybe: expected true or false"),
        ("clip: .nan", "mine.yaml:1: --clip .nan: expected a number from 1e-06 to 1"),
        ("stepz: 3", "mine.yaml:1: unknown setting 'stepz'"),
        ("steps: 3\n---\nsteps: 4", "mine.yaml:2: cannot read settings: "),
        ("steps: 3\n a: [", "mine.yaml:2: cannot read settings: "),
        ("- 3", "mine.yaml: expected a mapping of settings"),
        ("", "mine.yaml: expected a mapping of settings"),
    ],
)
def test_a_wrong_line_of_a_settings_file_is_named(from_file, content, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")) as error:
        from_file(content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"steps": 1, "steps": 2}', "mine.json: 'steps' stands there twice"),
        ('{"steps": null}', "mine.json: 'steps' has no value"),
        ('{"steps": true}', "mine.json: --steps true: expected a whole number"),
        ('{"clip": NaN}', "mine.json: --clip NaN: expected a number"),
        ('{"clip": ', "mine.json: cannot read settings: "),
    ],
)
def test_a_wrong_json_file_is_named(from_file, content, message):
    with pytest.raises(UserError, match=message):
        from_file(content, suffix="json")


def test_a_yaml_bomb_ends_at_once(from_file):
    """Each name is ten of the one before: 10^9 texts, were they ever counted."""
    lines = ["a0: &a0 [lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(UserError, match=r"mine.yaml:2: 'a1' has no value, or one that is no"):
        from_file("\n".join(lines))
