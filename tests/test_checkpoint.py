"""Checkpoints: what is written is read back bit for bit, or it is refused by name."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from test_grpo import GROUPS, metrics, rollouts_of, run_grpo
from test_packed import tiny_lm

import grpo
from engine import checkpoint, folder, lora
from engine.files import append_lines
from engine.packed import pack_row, response_logprobs
from engine.parallel import shard
from engine.policy import Policy
from settings import TrainSettings, UserError

SETTINGS = {"learning_rate": 0.01, "seed": 3}


@pytest.fixture(autouse=True)
def group(process_group):
    pass


def trainer(steps: int = 0, lm=None, rank: int = 0):
    """A policy and its optimizer, after so many updates."""
    lm = lm or tiny_lm()
    if rank:
        lora.add_fresh(lm, rank, 2 * rank, seed=0)
    policy = shard(Policy(lm), torch.device("cpu"))
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.01)
    for _ in range(steps):
        update(policy, optimizer)
    return policy, optimizer


def update(policy, optimizer) -> None:
    grpo.update(policy, None, optimizer, rollouts_of(GROUPS), TrainSettings(beta=0.0))


def weights(policy) -> list[torch.Tensor]:
    return [p.full_tensor().clone() for p in policy.parameters()]


def save(folder: Path, state, step: int, keep: int = 2) -> None:
    checkpoint.save(folder, *state, {"step": step, "settings": SETTINGS}, keep)


@pytest.mark.parametrize("rank", [0, 2])
def test_training_goes_on_bit_for_bit(tmp_path, rank):
    first = trainer(3, rank=rank)
    save(tmp_path, first, 3)
    update(*first)
    second = trainer(rank=rank)
    assert checkpoint.resume(tmp_path, *second, SETTINGS)["step"] == 3
    update(*second)
    assert all(torch.equal(a, b) for a, b in zip(weights(first[0]), weights(second[0])))


def test_an_optimizer_that_made_no_step_is_kept_so(tmp_path):
    """As where every update so far was skipped."""
    first = trainer()
    save(tmp_path, first, 1)
    second = trainer()
    checkpoint.resume(tmp_path, *second, SETTINGS)
    update(*first)
    update(*second)
    assert all(torch.equal(a, b) for a, b in zip(weights(first[0]), weights(second[0])))


def test_it_holds_safetensors_and_json_alone(tmp_path):
    save(tmp_path, trainer(1, rank=2), 1)
    (folder,) = tmp_path.iterdir()
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    (shard_file,) = folder.glob("*.safetensors")
    with safe_open(shard_file, framework="pt") as file:
        names = list(file.keys())
    assert names and all("lora_" in name for name in names)  # the frozen base is not copied


def test_the_last_ones_stay(tmp_path):
    state = trainer(1)
    for step in (5, 10, 15, 20):
        save(tmp_path, state, step, keep=2)
    assert [path.name for path in checkpoint.whole_checkpoints(tmp_path)] == [
        "step-000015", "step-000020",
    ]  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 2


def flip_a_bit(folder: Path) -> None:
    path = next(folder.glob("shard-*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_settings(folder: Path) -> None:
    facts = json.loads((folder / "checkpoint.json").read_text())
    facts["settings"]["seed"] = 4
    del facts["own_sha256"]
    facts["own_sha256"] = checkpoint.hash_record(facts)
    (folder / "checkpoint.json").write_text(json.dumps(facts))


def other_step(folder: Path) -> None:
    text = (folder / "checkpoint.json").read_text()
    (folder / "checkpoint.json").write_text(text.replace('"step": 10', '"step": 11'))


def stray(folder: Path) -> None:
    """Tensors of the same names, which would be read."""
    shutil.copy(next((folder.parent / "step-000005").glob("shard-*")), folder / "z.safetensors")


def renamed(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "step-000005", folder)


def other_model(folder: Path) -> None:
    shutil.rmtree(folder)
    save(folder.parent, trainer(1, tiny_lm(kv_heads=1)), 10, keep=9)


def other_layers(folder: Path) -> None:
    shutil.rmtree(folder)
    save(folder.parent, trainer(1, rank=2), 10, keep=9)


@pytest.mark.parametrize(
    "hurt, why",
    [
        (flip_a_bit, "is not what was written"),
        (lambda folder: next(folder.glob("shard-*")).unlink(), "shard-.* is missing"),
        (lambda folder: (folder / "checkpoint.json").unlink(), "no checkpoint"),
        (lambda folder: (folder / "checkpoint.json").write_text("[]"), "no checkpoint"),
        (other_step, "checkpoint.json is not what was written"),
        (stray, "z.safetensors does not belong to it"),
        (renamed, "its name is not that of its step, 5"),
        (other_settings, "of another run .seed is 4 there"),
        (other_model, r"of another model .* is \[8"),
        (other_layers, "of another model"),
    ],
)
def test_one_that_cannot_be_used_is_named_and_the_one_before_is(tmp_path, capsys, hurt, why):
    first = trainer(1)
    save(tmp_path, first, 5)
    before = weights(first[0])
    update(*first)
    save(tmp_path, first, 10)
    hurt(tmp_path / "step-000010")
    second = trainer()
    assert checkpoint.resume(tmp_path, *second, SETTINGS)["step"] == 5
    assert all(torch.equal(a, b) for a, b in zip(before, weights(second[0])))
    said = capsys.readouterr().out
    assert f"{tmp_path / 'step-000010'}: not used, now step-000010.unusable: " in said
    assert re.search(why, said)
    # It stays to be looked at, and is in nobody's way.
    save(tmp_path, second, 10)
    assert checkpoint.resume(tmp_path, *trainer(), SETTINGS)["step"] == 10


def test_whatever_happens_to_its_facts_is_found(tmp_path):
    save(tmp_path, trainer(1), 7)
    whole, rng = tmp_path / "step-000007", random.Random(0)
    content = (whole / "checkpoint.json").read_bytes()
    expected, refused = checkpoint.check(whole, SETTINGS), 0
    for _ in range(300):
        hurt = bytearray(content)
        for _ in range(rng.choice([1, 1, 3])):
            hurt[rng.randrange(len(hurt))] = rng.choice(b'{}[]",:0123456789e-.\\ \xff\x00')
        (whole / "checkpoint.json").write_bytes(hurt[: rng.choice([len(hurt), len(hurt) // 2])])
        try:
            assert checkpoint.check(whole, SETTINGS) == expected  # another blank, say
        except UserError:
            refused += 1
    assert refused > 250


def test_the_newest_is_that_of_most_steps(tmp_path):
    for step in (999_999, 1_000_000, 5):
        (tmp_path / checkpoint.folder_name(step)).mkdir()
    (tmp_path / "step-2000000 (copy)").mkdir()
    assert [path.name for path in checkpoint.whole_checkpoints(tmp_path)] == [
        "step-000005", "step-999999", "step-1000000",
    ]  # fmt: skip


def test_without_a_usable_one_training_starts_anew(tmp_path):
    assert checkpoint.resume(tmp_path / "none", *trainer(), SETTINGS) is None
    (tmp_path / "step-000003").mkdir()
    assert checkpoint.resume(tmp_path, *trainer(), SETTINGS) is None


def test_what_cannot_be_written_leaves_the_old_one(monkeypatch, tmp_path):
    state = trainer(1)
    save(tmp_path, state, 5)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for where, name in ((dcp, "save"), (checkpoint, "checksums"), (checkpoint.json, "dumps")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, full)
            with pytest.raises(OSError, match=r"step-000010 could not be written: .*No space left"):
                save(tmp_path, state, 10)
        assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]
    assert checkpoint.resume(tmp_path, *trainer(), SETTINGS)["step"] == 5


def test_logs_are_cut_to_the_steps_that_stay(tmp_path):
    for name in folder.LOGS:
        append_lines(tmp_path / name, [{"step": i, "text": "\u2028é"} for i in (0, 0, 1, 2)])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "tex')  # killed there
    folder.cut_logs(tmp_path, 2)
    for name in folder.LOGS:
        lines = (tmp_path / name).read_text().split("\n")
        assert [json.loads(line)["step"] for line in lines[:-1]] == [0, 0, 1]


def test_a_run_goes_on_with_another_number_of_processes(small, tiny, tmp_path):
    flags = [
        "--model", tiny, "--candidates", small[0], "--qrels", small[1], "--window_size", 4,
        "--draws", 4, "--batch_size", 4, "--group_size", 4, "--max_new_tokens", 50,
        "--learning_rate", 1e-3, "--checkpoint_every", 1,
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, steps, processes in ((whole, 3, 0), (parts, 2, 2), (parts, 3, 0)):
        done = run_grpo(*flags, "--output_dir", out, "--steps", steps, processes=processes)
        assert done.returncode == 0, done.stderr
    assert "going on from step 2" in done.stdout
    assert (whole / "responses.jsonl").read_text() == (parts / "responses.jsonl").read_text()
    for one, other in zip(metrics(whole), metrics(parts), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3, abs=1e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_what_a_pass_has_gathered_is_given_back_before_it_is_saved(tmp_path):
    """As where a signal comes while pi_old is written down: the embeddings, the norm and the head
    stood in for others then, and their moments were not found."""
    first = trainer(2)
    with torch.no_grad():
        first[0](response_logprobs, pack_row(GROUPS))
    save(tmp_path, first, 2)
    second = trainer()
    assert checkpoint.resume(tmp_path, *second, SETTINGS)["step"] == 2
    for state in (first, second):
        update(*state)
    assert all(torch.equal(a, b) for a, b in zip(weights(first[0]), weights(second[0])))


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    policy, optimizer = trainer(1)
    save(tmp_path, (policy, optimizer), 1)
    next(policy.parameters()).data.to_local()[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"step-000002 is not written: .*embed_tokens.* not finite"):
        save(tmp_path, (policy, optimizer), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
