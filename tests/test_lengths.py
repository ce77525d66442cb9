"""Prompts that are too long for the model are found before training, and end no run."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_flags import KINDS

import evaluate
import grpo
import rearank
from agent import load_agent
from data import TrainingWindow
from engine.model import NEED_LESS
from rollout import drop_too_long, encode_prompt
from settings import AgentSettings, TrainSettings, UserError
from sources.formats import Passage, read_candidates, write_candidates

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def agent(tiny):
    return load_agent(AgentSettings(model=str(tiny)))


def windows_of(lengths: dict[str, int]) -> list[TrainingWindow]:
    """Two windows of each query, which is so many words long."""
    passages = (Passage("d1", "the tide", 1.0), Passage("d2", "the \U0001f30a moon", 0.0))
    return [
        TrainingWindow(qid, "tide " * words, passages, (1, 0), (1,))
        for qid, words in lengths.items()
        for _ in range(2)
    ]


def test_windows_that_do_not_fit_are_left_out_by_qid(agent, process_group, capsys):
    windows = windows_of({"q1": 9, "q2": 9000, "q3": 20, "q4": 5000})
    kept, longest = drop_too_long(agent, windows, TrainSettings(max_new_tokens=50))
    assert kept == windows[:2] + windows[4:6]
    assert longest == len(encode_prompt(agent, windows[4]))
    said = capsys.readouterr().err
    assert "4 of 8 windows are left out" in said and "They are of 2 queries: q2, q4" in said


def test_a_window_fits_to_the_very_last_token(agent, process_group):
    window = windows_of({"q1": 9})[0]
    room = agent.policy.lm.config.max_position_embeddings - len(encode_prompt(agent, window))
    assert drop_too_long(agent, [window], TrainSettings(max_new_tokens=room))[0] == [window]
    with pytest.raises(
        UserError, match=r"no window is left: .* lower --window_size, --max_new_tok"
    ):
        drop_too_long(agent, [window], TrainSettings(max_new_tokens=room + 1))


def test_a_window_that_cannot_be_encoded_is_named(agent, process_group):
    windows = windows_of({"q1": 1, "q2": 1})
    windows[3] = replace(windows[3], query="tide \udcff")
    with pytest.raises(UserError, match=r"query q2: .* a lone surrogate"):
        drop_too_long(agent, windows, TrainSettings())


def test_what_is_advised_are_flags_of_every_program_that_asks_a_model():
    flags = {word.strip(",") for word in NEED_LESS.split() if word.startswith("--")}
    assert flags == {"--window_size", "--max_new_tokens"}
    for program in (grpo, evaluate, rearank):
        names = {f"--{name}" for kind in KINDS[program] for name in kind.__dataclass_fields__}
        assert flags <= names


def test_two_processes_train_and_measure_without_the_query_that_is_too_long(small, tiny, tmp_path):
    candidates = read_candidates(small[0])
    candidates[2] = replace(candidates[2], query="tide " * 9000)
    write_candidates(candidates, tmp_path / "long.jsonl")
    files = ["--candidates", tmp_path / "long.jsonl", "--qrels", small[1], "--model", tiny]
    held_out = ["--eval_candidates", tmp_path / "long.jsonl", "--eval_qrels", small[1]]
    flags = ["--window_size", 4, "--draws", 2, "--steps", 1, "--batch_size", 2, "--group_size", 2,
             "--max_new_tokens", 50, "--allow_overlap"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "grpo.py"]
    argv = [*command, *files, *held_out, *flags, "--output_dir", tmp_path / "out"]
    done = subprocess.run(list(map(str, argv)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("windows are left out") == 3  # to train on; held out, before and after
    assert "They are of 1 queries: q2" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
