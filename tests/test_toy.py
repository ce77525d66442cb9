"""The offline world: its texts, demonstrator and lessons; and, marked slow, what is learned."""

import hashlib
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import toy
from engine.chat import encode_chat
from engine.model import load_lm
from settings import TrainSettings
from sources import formats, trec
from window import conversation, load_prompt, parse_ranking


@pytest.fixture(scope="module")
def world():
    return toy.make_world(seed=5)


def test_grades_can_be_read_from_the_texts(world):
    train, held_out, qrels = world
    for query in train + held_out:
        topics = query.query.split(" and ")
        grades = qrels[query.qid]
        assert set(grades) == {p.docid for p in query.passages} and max(grades.values()) > 0
        for passage in query.passages:
            words = passage.text.split()
            (depth,) = (d for d, word in enumerate(toy.DEPTHS, start=1) if word in words)
            expected = -(-depth // 2) if set(topics) & set(words) else 0
            assert grades[passage.docid] == expected
    counts = [g for q in qrels.values() for g in q.values()]
    assert {0, 1, 2, 3} == set(counts) and 0.5 < counts.count(0) / len(counts) < 0.7


def test_held_out_queries_are_new_and_longer_than_a_window(world):
    train, held_out, _ = world
    pairs = [frozenset(q.query.split(" and ")) for q in train + held_out]
    assert len(set(pairs)) == len(pairs) == len(train) + len(held_out)
    assert all(len(q.passages) > toy.SIZE for q in held_out)


def test_a_world_depends_on_its_seed_alone(world):
    assert toy.make_world(5) == world != toy.make_world(6)


def test_the_demonstrator_reasons_rightly_and_ranks_badly():
    texts = ["a rivers note", "a violins treatise", "a canals summary", "a comets outline"]
    response = toy.demonstrator_response("listwise", "rivers and canals", texts, random.Random(0))
    parsed = parse_ranking(response, 4)
    assert parsed.tags and parsed.listed and not parsed.malformed
    assert parsed.reasoning == "[1] +2 [2] -5 [3] +3 [4] -4"
    order = toy.demonstrator_order("rivers and canals", texts)
    assert order == [1, 3, 2, 0]  # the deeper ones off topic come first
    choice = toy.demonstrator_response("setwise", "rivers and canals", texts, random.Random(0))
    best = toy.demonstrator_order("rivers and canals", texts, random.Random(0))[0]
    assert choice == f"{response.partition('<answer>')[0]}<answer> [{best + 1}] </answer>"


@pytest.mark.parametrize("task", ["listwise", "setwise"])
def test_every_word_is_a_token_and_comes_back(world, task):
    tokenizer, query = toy.make_tokenizer(), world[0][0]
    texts = [p.text for p in query.passages[: toy.SIZE]]
    tokens, targets = toy.answering_lesson(tokenizer, query.query, texts, task, random.Random(0))
    assert tokenizer.unk_token_id not in tokens
    response = [t for t in targets if t != -100]
    assert tokens[-len(response) :] == response and response[-1] == tokenizer.eos_token_id
    expected = toy.demonstrator_response(task, query.query, texts, random.Random(0))
    assert tokenizer.decode(response[:-1]) == expected
    asked = encode_chat(tokenizer, conversation(query.query, texts, toy.PROMPTS[task]))
    assert tokens[: len(asked)] == asked and len(tokens) == len(asked) + len(response)


def test_matching_lessons_teach_the_note_after_each_passage(world):
    tokenizer, query = toy.make_tokenizer(), world[0][0]
    texts = [p.text for p in query.passages[: toy.SIZE]]
    tokens, targets = toy.matching_lesson(tokenizer, query.query, texts)
    notes = [toy.note(query.query, text) for text in texts]
    assert tokenizer.convert_ids_to_tokens([t for t in targets if t != -100]) == notes
    assert tokenizer.decode(tokens).count("<|end|>") == 4 + 2 * toy.SIZE


@pytest.mark.parametrize("task", ["listwise", "setwise"])
def test_reasoning_lessons_teach_the_notes_of_a_response(world, task):
    tokenizer, query = toy.make_tokenizer(), world[0][0]
    texts = [p.text for p in query.passages[: toy.SIZE]]
    window = (tokenizer, query.query, texts, task)
    tokens, targets = toy.reasoning_lesson(*window, random.Random(0))
    assert tokens == toy.answering_lesson(*window, random.Random(0))[0]
    notes = [toy.note(query.query, text) for text in texts]
    assert tokenizer.convert_ids_to_tokens([t for t in targets if t != -100]) == notes


def test_prepared_once_whole_and_loadable(monkeypatch, tmp_path):
    monkeypatch.setattr(toy, "CACHE", tmp_path)
    teach, taught = toy.teach, []
    monkeypatch.setattr(
        toy, "teach", lambda lm, what, steps, *a, **k: taught.append(what) or teach(lm, what, 1, *a)
    )
    files = toy.prepare(seed=5)
    assert toy.prepare(seed=5) == files and taught == ["matching", "reasoning", "ranking"]
    assert load_prompt(files["prompt"]) == toy.PROMPT
    train, held_out, qrels = toy.make_world(5)
    assert formats.read_candidates(files["candidates"]) == train
    assert formats.read_candidates(files["eval_candidates"]) == held_out
    assert trec.read_qrels(files["eval_qrels"]) == {q.qid: qrels[q.qid] for q in held_out}
    lm, tokenizer = load_lm(files["model"], torch.float32)
    assert tokenizer.get_vocab() == toy.make_tokenizer().get_vocab()
    assert lm.num_parameters() < 200_000
    assert not list(tmp_path.glob("*.tmp"))


def test_two_that_start_at_once_make_it_once_and_without_what_a_killed_one_left(tmp_path):
    script = (
        "import sys, time, toy; from pathlib import Path; toy.CACHE = Path(sys.argv[1])\n"
        "toy.build = lambda folder, *_: ((folder / 'made').open('x').close(), time.sleep(1))\n"
        "toy.prepare(7)"
    )
    version = Path(toy.__file__).read_bytes()
    name = f"toy-listwise-7-{hashlib.sha256(version).hexdigest()[:8]}"
    (tmp_path / f"{name}.tmp").mkdir()
    (tmp_path / f"{name}.tmp" / "half").touch()
    start = partial(subprocess.Popen, [sys.executable, "-c", script, str(tmp_path)])
    both = [start(cwd=Path(toy.__file__).parent) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    assert [path.name for path in (tmp_path / name).iterdir()] == ["made"]
    assert not list(tmp_path.glob("*.tmp"))


def test_the_preset_holds_known_settings():
    assert TrainSettings(preset="toy", **toy.PRESET).window_size == toy.SIZE


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, seed", [(task, seed) for task in ("listwise", "setwise") for seed in (81, 82, 83)]
)
def test_grpo_learns_what_the_demonstrator_gets_wrong(task, seed, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from toy_learning import measure

    figures = measure(task, seed)
    assert figures["after"] >= figures["before"] + 0.10
    assert figures["after"] >= figures["demo"] + 0.05
    assert figures["swapped"] < figures["after"] - 0.10
    assert figures["shuffled"] <= figures["before"] + 0.02
    assert figures["shuffled_form"] >= 0.95
