"""A run's folder: one run at a time, from what it was begun with; what its figures warn of."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_files import hold
from test_grpo import metrics, quick

import grpo
import measure
from engine import folder
from engine.watch import say_what_taught, watcher
from settings import TrainSettings, UserError
from tasks import TASKS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(small, tiny, tmp_path_factory):
    """The settings of a run of 2 steps, with files of its own."""
    files = tmp_path_factory.mktemp("files")
    shutil.copytree(tiny, files / "model")
    for path in (*small, TASKS["listwise"].prompt):
        shutil.copy(path, files)
    for path in small:
        shutil.copy(path, files / f"eval-{path.name}")
    data = [files / path.name for path in small]
    settings = quick(
        data, files / "model", files / "out", prompt=str(files / "listwise.toml"), draws=1,
        eval_candidates=str(files / "eval-candidates.jsonl"), allow_overlap=True,
        eval_qrels=str(files / "eval-qrels.txt"), max_new_tokens=8,
    )  # fmt: skip
    grpo.train(settings)
    return settings


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it that may be hurt."""
    out = shutil.copytree(finished.output_dir, tmp_path / "out")
    return replace(finished, output_dir=str(out))


def snapshot(path: Path) -> dict[Path, tuple[int, bytes]]:
    files = [file for file in path.rglob("*") if file.is_file()]
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def no_model(*_):
    raise AssertionError("a model is loaded")


def test_a_finished_run_has_nothing_left_to_do(run, monkeypatch, capsys):
    before = snapshot(Path(run.output_dir))
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "load_policy", no_model)
        grpo.train(replace(run, max_in_flight=7))
    assert "nothing is left to do" in capsys.readouterr().out
    assert snapshot(Path(run.output_dir)) == before
    # Where its model is gone it is written again, from the last checkpoint.
    (Path(run.output_dir) / "model.safetensors").unlink()
    grpo.train(run)
    name = Path(run.output_dir) / "model.safetensors"
    assert name.read_bytes() == before[name][1]


def test_what_it_was_made_from_is_written_down(run):
    record = json.loads((Path(run.output_dir) / "provenance.json").read_text())
    names = {"model", "prompt", "candidates", "qrels", "eval_candidates", "eval_qrels"}
    assert set(record["inputs"]) == names and record["finished"] == 2
    assert {"model.safetensors", "chat_template.jinja"} <= set(record["inputs"]["model"])
    (start,) = record["starts"]
    assert start["step"] == 0 and "torch" in start["versions"] and len(start["source"]) == 64


def test_fewer_steps_than_were_done_are_refused(run):
    before = snapshot(Path(run.output_dir))
    with pytest.raises(UserError, match="has done 2 steps, more than --steps 1"):
        grpo.train(replace(run, steps=1))
    assert snapshot(Path(run.output_dir)) == before
    shutil.rmtree(Path(run.output_dir) / "checkpoints")
    with pytest.raises(UserError, match="2 steps, and no checkpoint to go on from"):
        grpo.train(replace(run, steps=3))
    assert len(metrics(Path(run.output_dir))) == 2


@pytest.mark.parametrize(
    "file, named",
    [
        ("model/model.safetensors", r"model/model\.safetensors"),
        ("model/chat_template.jinja", r"model/chat_template\.jinja"),
        ("candidates.jsonl", r"candidates \(.*candidates\.jsonl"),
        ("qrels.txt", r"qrels \(.*qrels\.txt"),
        ("listwise.toml", "prompt"),
        ("eval-candidates.jsonl", "eval_candidates"),
        ("eval-qrels.txt", "eval_qrels"),
    ],
)
def test_a_run_goes_on_only_from_what_it_was_begun_with(run, monkeypatch, file, named):
    path = Path(run.candidates).parent / file
    content = path.read_bytes()
    try:
        path.write_bytes(content + b"\n")
        monkeypatch.setattr(grpo, "load_policy", no_model)
        before = snapshot(Path(run.output_dir))
        for steps in (2, 3):
            with pytest.raises(UserError, match=f"begun with other contents of .*{named}"):
                grpo.train(replace(run, steps=steps))
        assert snapshot(Path(run.output_dir)) == before
    finally:
        path.write_bytes(content)


def test_the_prompt_that_is_exported_is_the_one_it_was_trained_with(run, monkeypatch):
    path, sample = Path(run.prompt), grpo.sample_batch
    content = path.read_bytes()

    def edited_meanwhile(*args):
        path.write_bytes(content.replace(b"passages", b"texts"))
        return sample(*args)

    monkeypatch.setattr(grpo, "sample_batch", edited_meanwhile)
    try:
        grpo.train(replace(run, steps=3))
    finally:
        path.write_bytes(content)
    assert (Path(run.output_dir) / "prompt.toml").read_bytes() == content


def test_or_from_what_changed_where_it_is_told_to(run):
    path = Path(run.qrels)
    content = path.read_bytes()
    try:
        path.write_bytes(content + b"\n")
        grpo.train(replace(run, steps=3, allow_changed=True))
    finally:
        path.write_bytes(content)
    record = json.loads((Path(run.output_dir) / "provenance.json").read_text())
    assert [start.get("changed") for start in record["starts"]] == [None, ["qrels"]]
    assert [start["step"] for start in record["starts"]] == [0, 2] and record["finished"] == 3
    with pytest.raises(UserError, match="other contents of qrels"):  # it is as it was before
        grpo.train(replace(run, steps=4))


def test_a_model_that_is_downloaded_later_is_no_change(run, monkeypatch):
    inputs = folder.read_record(Path(run.output_dir))["inputs"]
    assert folder.changed_inputs(Path(run.output_dir), inputs | {"model": {}}, run) == []
    other = inputs | {"model": inputs["model"] | {"config.json": "0"}}
    with pytest.raises(UserError, match=r"model/config\.json"):
        folder.changed_inputs(Path(run.output_dir), other, run)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("settings.json", "{", r"settings\.json: damaged"),
        ("settings.json", "[]", r"settings\.json: damaged"),
        ("provenance.json", '{"inputs": 3}', r"provenance\.json: damaged"),
        ("provenance.json", '{"inputs": {"model": []}, "starts": []}', "damaged, expected inputs"),
        ("provenance.json", '{"inputs": {}, "starts": [], "finished": "x"}', "what is finished is"),
        ("before/held_out.json", "nonsense", r"held_out\.json: damaged"),
        ("before/held_out.json", '{"ndcg@10": 1}', "held_out.json: damaged, it has no first_stage"),
        ("metrics.jsonl", '{"step": 0}\n{"st\x00ep"\n{"step": 1}\n', r"metrics\.jsonl:2: damaged"),
        ("metrics.jsonl", '{"step": 0}\n{"loss": 1}\n', r"metrics\.jsonl:2: damaged, it has no"),
    ],
)
def test_a_damaged_file_is_named(run, file, content, message):
    (Path(run.output_dir) / file).write_text(content)
    with pytest.raises(UserError, match=message):
        grpo.train(replace(run, steps=3))


def test_without_the_figures_from_before_it_goes_on_and_says_so(run, capsys):
    (Path(run.output_dir) / "before" / "held_out.json").unlink()
    grpo.train(replace(run, steps=3))
    assert "held_out.json is gone" in capsys.readouterr().err
    assert len(metrics(Path(run.output_dir))) == 3


# ------------------------------------------------------------------------------ whose folder


def test_a_folder_that_holds_something_else_is_not_written_into(finished):
    before = snapshot(Path(finished.model))
    with pytest.raises(UserError, match=r"holds something else .*give another"):
        grpo.train(replace(finished, output_dir=finished.model))
    assert snapshot(Path(finished.model)) == before


def test_an_output_folder_that_cannot_be_one_is_named(finished, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(grpo, "load_policy", no_model)
    for path in ("file", "file/below"):
        with pytest.raises((UserError, OSError), match=str(tmp_path / "file")):
            grpo.train(replace(finished, output_dir=str(tmp_path / path)))
    with pytest.raises(OSError, match="/proc/none"):
        grpo.train(replace(finished, output_dir="/proc/none"))


def test_a_disk_that_is_full_at_the_first_measurement_is_named(finished, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measure, "write_run", full)
    with pytest.raises(UserError, match=r"out cannot be written: .*No space .*goes on"):
        grpo.train(replace(finished, output_dir=str(tmp_path / "out")))


def test_a_disk_that_is_full_while_it_trains_ends_nothing(run, monkeypatch, capsys):
    write = measure.write_run

    def full(rankings, path, tag):
        if path.parent.name == "during":
            raise OSError(28, "No space left on device")
        write(rankings, path, tag)

    monkeypatch.setattr(measure, "write_run", full)
    grpo.train(replace(run, steps=4, eval_every=3))
    assert len(metrics(Path(run.output_dir))) == 4
    assert "not measured at step 3: [Errno 28] No space left" in capsys.readouterr().err


def test_two_runs_never_share_a_folder(run, monkeypatch):
    monkeypatch.setattr(grpo, "load_policy", no_model)
    process = hold(Path(run.output_dir))
    try:
        with pytest.raises(UserError, match=f"in use by process {process.pid}"):
            grpo.train(replace(run, steps=3))
    finally:
        process.kill()
        process.wait()


JOIN = """
import sys, time
from engine.files import locked
with locked(sys.argv[1], joining=True):
    print("held", flush=True)
    time.sleep(60)
"""


def test_it_is_in_use_as_long_as_any_process_of_the_run_lives(tmp_path):
    first = hold(tmp_path)
    other = subprocess.Popen(
        [sys.executable, "-c", JOIN, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    for process in (first, other):
        with pytest.raises(UserError, match="is in use"), folder.locked(tmp_path):
            pass
        process.kill()
        process.wait()
    with folder.locked(tmp_path):
        pass


def test_what_killed_writers_left_is_removed(run, monkeypatch):
    out = Path(run.output_dir)
    left = [out / f"{name}.123.tmp" for name in ("metrics.jsonl", "before/run.txt")]
    for path in left:
        path.write_text("half")
    for name in ("export.tmp", "checkpoints/step-000009.tmp"):
        left.append(out / name)
        left[-1].mkdir()
        (left[-1] / "half").touch()
    (out / "mine.tmp").touch()
    grpo.train(run)
    assert not [path for path in left if path.exists()] and (out / "mine.tmp").exists()


# --------------------------------------------------------------------------- what teaches nothing

FIGURES = {"equal_groups": 1.0, "mismatch": 1e-4, "cut_off": 0.0, "malformed": 0.0}


@pytest.mark.parametrize(
    "figures, cause",
    [
        ({"cut_off": 0.9, "malformed": 0.9}, "90% of .* cut off by --max_new_tokens 2048: raise"),
        ({"malformed": 1.0}, "100% of the responses hold no answer .*--prompt and --model"),
        ({}, ".*too much alike.* raise --temperature 1 or --group_size 32"),
    ],
)
def test_steps_that_teach_nothing_are_said_with_their_cause(process_group, capsys, figures, cause):
    watch = watcher(TrainSettings())
    steps = [1, 1, 1, 1, 0.9, 1, 1, 1, 1]
    for equal in steps:
        watch(FIGURES | figures | {"equal_groups": equal})
    assert capsys.readouterr().err == ""
    for _ in range(20):
        watch(FIGURES | figures)
    (said,) = capsys.readouterr().err.strip().split("\n")
    assert re.search(f"for 5 steps .*teaches nothing: {cause}", said)


def test_sampling_that_is_not_what_is_trained_is_said_once(process_group, capsys):
    watch = watcher(TrainSettings())
    for mismatch in (0.01, 0.049, 0.2, 0.3):
        watch(FIGURES | {"equal_groups": 0.0, "mismatch": mismatch})
    assert capsys.readouterr().err.count("differ by 0.2 nats a token") == 1


def test_a_run_that_learned_nothing_says_so(process_group, capsys):
    for steps in ([], [1.0, 0.9], [None]):
        say_what_taught({"equal_groups": equal} for equal in steps)
    assert capsys.readouterr().err == ""
    say_what_taught({"equal_groups": 1.0} for _ in range(3))
    assert "in none of the 3 steps" in capsys.readouterr().err
