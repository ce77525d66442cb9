"""Direct SFT: its loss against Hugging Face's, its gradient, its answers, and whole runs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_packed import tiny_lm

import presets
import sft
from agent import Agent
from batches import make_optimizer
from data import TrainingWindow
from engine.chat import decode_response, encode_response, reply_end
from engine.model import load_lm
from engine.packed import Group
from engine.parallel import Interrupted, StopSignal, shard
from engine.policy import Policy
from engine.sampler import Sample
from evaluate import evaluate
from lessons import as_rollout, best_response, encode_lessons, load_lessons
from rollout import Rollout
from settings import AgentSettings, EvaluateSettings, SftSettings, SourceSettings, UserError
from sources import formats
from sources.formats import Passage
from tasks import TASKS
from toy import make_tokenizer
from window import load_prompt

ROOT = Path(__file__).parents[1]
ANSWERS = [
    Group([1, 2, 3, 4], [[5, 6]]),
    Group([9] * 11, [[5] * 12]),
    Group([4, 4], [[1, 2, 3]]),
    Group([30, 31, 32], [[2]]),
]


def batch_of(groups: list[Group]) -> list[Rollout]:
    def rollout(place: int, group: Group) -> Rollout:
        sample, one = Sample(list(group.responses[0]), [0.0] * 99), torch.ones(1)
        sample.logprobs = [0.0] * len(sample.tokens)
        return Rollout(place, None, group.prompt, [sample], [], one, advantages=one)

    return [rollout(place, group) for place, group in enumerate(groups)]


def hugging_face_loss(lm, groups: list[Group]) -> torch.Tensor:
    """Of the plain model, over one padded batch with the prompts masked out."""
    rows = [(list(g.prompt), list(g.responses[0])) for g in groups]
    width = max(len(p) + len(r) for p, r in rows)
    pad = [(width - len(p) - len(r)) for p, r in rows]
    tokens = torch.tensor([p + r + [0] * n for (p, r), n in zip(rows, pad)])
    labels = torch.tensor([[-100] * len(p) + r + [-100] * n for (p, r), n in zip(rows, pad)])
    mask = torch.tensor([[1] * (width - n) + [0] * n for n in pad])
    return lm(input_ids=tokens, attention_mask=mask, labels=labels).loss


def after_one_step(settings: SftSettings, dtype=torch.float32):
    policy = shard(Policy(tiny_lm()), torch.device("cpu"), dtype)
    optimizer = torch.optim.SGD(policy.parameters(), 1e-3)
    figures, _ = sft.update(policy, optimizer, batch_of(ANSWERS), settings)
    return figures, [p.full_tensor().detach() for p in policy.parameters()]


@pytest.mark.parametrize("max_tokens", [1, 20, 10**6])
def test_the_loss_and_its_gradient_are_hugging_faces(process_group, max_tokens):
    settings = SftSettings(max_grad_norm=1e9, max_tokens_per_micro_batch=max_tokens)
    figures, got = after_one_step(settings)
    lm = tiny_lm()
    loss = hugging_face_loss(lm, ANSWERS)
    loss.backward()
    assert figures["nll"] == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.stack([p.grad.norm() for p in lm.parameters()]).norm()
    assert figures["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    for p, after in zip(lm.parameters(), got):
        torch.testing.assert_close(p.detach() - 1e-3 * p.grad, after, rtol=0, atol=1e-7)


def test_in_bfloat16_the_loss_is_right_within_its_rounding(process_group):
    exact = hugging_face_loss(tiny_lm(), ANSWERS).item()
    rounding = abs(hugging_face_loss(tiny_lm().bfloat16(), ANSWERS).item() - exact)
    figures, _ = after_one_step(SftSettings(), torch.bfloat16)
    assert abs(figures["nll"] - exact) <= max(2 * rounding, exact * 2**-8)
    assert figures["nll"] != pytest.approx(exact, rel=1e-7)  # it was computed in bfloat16


def test_a_step_that_is_not_finite_is_skipped_and_named(process_group):
    policy = shard(Policy(tiny_lm()), torch.device("cpu"))
    with torch.no_grad():
        policy.lm.base_model.embed_tokens.weight.to_local()[31] = float("nan")  # of one prompt
    before = [p.full_tensor().clone() for p in policy.parameters()]
    settings = SftSettings(max_tokens_per_micro_batch=8)
    figures, whose = sft.update(policy, make_optimizer(policy, 0.1), batch_of(ANSWERS), settings)
    assert figures["skipped_updates"] == 1 and [rollout.place for rollout in whose] == [3]
    for a, b in zip(before, policy.parameters()):
        assert torch.equal(a.nan_to_num(), b.full_tensor().nan_to_num())


# ------------------------------------------------------------------------------- the answers

GRADES = (0, 2, 0, 3, 2)
WINDOW = TrainingWindow("q", "rivers", (Passage("d", "a text", 0.0),) * 5, GRADES, (3, 2, 2))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("reasoning", [True, False])
def test_the_best_response_earns_the_most(task, reasoning):
    prompt = replace(load_prompt(task.prompt), reasoning=reasoning)
    parsed = task.parse(best_response(task, prompt, WINDOW), 5, reasoning)
    assert parsed.tags == reasoning and parsed.listed and not parsed.malformed
    assert parsed.order[0] == 3 and not parsed.reasoning
    if task is TASKS["listwise"]:
        assert parsed.order == [3, 1, 4, 0, 2]  # what ties stays as it was shown
    if reasoning:
        rewards = [r(parsed, GRADES, None, [0.8, 0.1, 0.1]) for r in task.rewards.values()]
        assert rewards[0] == pytest.approx(1.0)


def test_a_response_is_encoded_as_it_is_decoded():
    tokenizer = make_tokenizer()
    end, pad = tokenizer.convert_tokens_to_ids(["<|end|>", "<|pad|>"])
    text = "<think> [1] +2 </think> <answer> [1] </answer>"
    tokens = encode_response(tokenizer, text, [pad, end])
    assert tokens[-1] == end == reply_end(tokenizer, [pad, end])
    assert decode_response(tokenizer, Sample(tokens, finished=True)) == text
    opening = make_tokenizer()
    opening.chat_template += "{% if add_generation_prompt %} <think>{% endif %}"
    assert encode_response(opening, text, [end]) == tokens[1:]
    with pytest.raises(UserError, match=r"holds '<\|end\|>'"):
        encode_response(tokenizer, "[1] <|end|> [2]", [end])


def quick(small, tiny, out, **changes) -> SftSettings:
    defaults = {
        "window_size": 4, "draws": 4, "steps": 12, "batch_size": 4, "max_new_tokens": 50,
        "learning_rate": 3e-3, "checkpoint_every": 5,
    }  # fmt: skip
    files = {"model": str(tiny), "candidates": str(small[0]), "qrels": str(small[1])}
    return SftSettings(**files | defaults | changes, output_dir=str(out))


def lessons_of(small, tiny, tmp_path, *lines: dict | str):
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    settings = quick(small, tiny, tmp_path / "out", responses=str(path))
    task = TASKS["listwise"]
    return load_lessons(settings, task, load_prompt(task.prompt)), settings


def test_given_responses_belong_to_their_windows(process_group, small, tiny, tmp_path):
    answer = "<think> . </think> <answer> [2] > [1] </answer>"
    right = {"qid": "q1", "given": ["d1-3", "d1-0"], "response": answer, "cut_off": False}
    (lesson,), settings = lessons_of(
        *(small, tiny, tmp_path, right, right | {"cut_off": True}, right | {"malformed": True}),
        *(right | {"response": "I cannot tell"}, right | {"given": []}),
    )
    query = formats.read_candidates(small[0])[1]
    assert lesson.window.query == query.query and lesson.response == answer
    assert lesson.window.passages == (query.passages[3], query.passages[0])
    lm, tokenizer = load_lm(str(tiny), torch.float32)
    task = TASKS["listwise"]
    agent = Agent(Policy(lm), tokenizer, load_prompt(task.prompt), task)
    ((window, tokens),) = encode_lessons(agent, [lesson], settings)
    rollout = as_rollout(agent, 0, window, tokens)
    shown = tokenizer.decode([*rollout.prompt, *rollout.samples[0].tokens])
    first, second = (shown.index(query.passages[i].text) for i in (3, 0))
    assert first < second and shown.endswith(f"assistant\n{answer}<|im_end|>")
    for wrong, message in (
        (right | {"qid": "q9"}, "responses.jsonl:1: query q9 is not among the training queries"),
        (right | {"given": ["d2-0"]}, "responses.jsonl:1: query q1 has no candidate 'd2-0'"),
        (right | {"given": [["d1-3"], "d1-0"]}, r"jsonl:1: query q1 has no candidate \['d1-3'\]"),
        (right | {"given": ["d1-3", "d1-3"]}, "responses.jsonl:1: given holds a docid twice"),
        ({"qid": "q1"}, "responses.jsonl:1: field 'response' is missing"),
        (right | {"cut_off": True}, "no response is left"),
        ("[1", "bad JSON"),
    ):
        with pytest.raises(UserError, match=message):
            lessons_of(small, tiny, tmp_path, wrong)
    with pytest.raises(UserError, match=r"jsonl:1: a response of \d+ tokens, more than --max_new"):
        encode_lessons(agent, [lesson], replace(settings, max_new_tokens=3))


# ------------------------------------------------------------------------------- whole runs


def run_sft(*flags, processes: int = 0) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [sys.executable, *(launch if processes else []), "sft.py", *map(str, flags)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )  # fmt: skip


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(small, tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sft")
    held_out = {"eval_candidates": str(small[0]), "eval_qrels": str(small[1])}
    return sft.train(quick(small, tiny, out, **held_out, allow_overlap=True))


def test_a_run_lowers_the_loss_and_says_what_it_did(trained):
    nll = [m["nll"] for m in metrics(trained)]
    assert len(nll) == 12 and nll[-1] < 0.7 * nll[0]
    assert "Negative log-likelihood" in (trained / "report.html").read_text()
    card = (trained / "README.md").read_text()
    assert "trained with SFT" in card and "before training" not in card.split("Measured")[0]


def test_the_trained_model_can_be_evaluated(trained, small, tmp_path):
    (by_itself,) = evaluate(
        [], SourceSettings(candidates=str(small[0]), qrels=str(small[1])),
        EvaluateSettings(output_dir=str(tmp_path)),
        AgentSettings(model=str(trained), window_size=4, step_size=2, max_new_tokens=50),
    )  # fmt: skip
    while_training = json.loads((trained / "after" / "metrics.json").read_text())
    assert by_itself["after"] == while_training["after"]


def test_a_run_learns_given_responses(trained, small, tiny, tmp_path):
    """In an evaluation's own format, here in the form that the tiny model was taught."""
    response = "<think> Each was read. </think> <answer> [2] > [1] > [4] > [3] </answer>"
    windows = map(json.loads, (trained / "after" / "windows.jsonl").read_text().splitlines())
    lines = [json.dumps(w | {"response": response, "malformed": False}) + "\n" for w in windows]
    (tmp_path / "responses.jsonl").write_text("".join(lines))
    settings = quick(small, tiny, tmp_path / "out", responses=str(tmp_path / "responses.jsonl"))
    (step,) = metrics(sft.train(replace(settings, steps=1)))
    assert step["nll"] < 0.5 * metrics(trained)[0]["nll"]


def test_two_processes_train_as_one(trained, small, tiny, tmp_path):
    one = quick(small, tiny, tmp_path)
    flags = [f"--{name}={getattr(one, name)}" for name in (
        "model", "candidates", "qrels", "window_size", "draws", "steps", "batch_size",
        "max_new_tokens", "learning_rate", "output_dir")]  # fmt: skip
    done = run_sft(*flags, processes=2)
    assert done.returncode == 0, done.stderr
    for a, b in zip(metrics(trained), metrics(tmp_path), strict=True):
        assert b["nll"] == pytest.approx(a["nll"], rel=1e-3)
    a, b = (load_file(out / "model.safetensors") for out in (trained, tmp_path))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-3)  # of 12 Adam steps of 3e-3


def test_an_interrupted_run_goes_on_bit_for_bit(trained, small, tiny, tmp_path, monkeypatch):
    asked = []

    def check(self) -> None:
        asked.append(1)
        if len(asked) == 8:
            self.number = 15
            raise Interrupted

    settings = quick(small, tiny, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "check", check)
        with pytest.raises(SystemExit):
            sft.train(settings)
    assert [m["step"] for m in metrics(tmp_path)] == list(range(7))
    sft.train(settings)
    assert [m["nll"] for m in metrics(tmp_path)] == [m["nll"] for m in metrics(trained)]
    a, b = (load_file(out / "model.safetensors") for out in (trained, tmp_path))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_presets_and_flags_are_read(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(sft, "train", seen.append)
    monkeypatch.setattr(sys, "argv", ["sft.py", "--preset", "toy", "--steps", "7"])
    sft.main()
    toy = presets.PRESETS["toy"]
    assert seen[0].steps == 7 and seen[0].learning_rate == toy["learning_rate"]
    assert not hasattr(seen[0], "group_size")


def test_triples_and_candidates_are_not_given_together(process_group, small, tiny, tmp_path):
    with pytest.raises(UserError, match="give --triples, or --candidates and --qrels, not both"):
        presets.fill_in(quick(small, tiny, tmp_path, triples=str(small[0])))
