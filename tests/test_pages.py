"""The pages, without a browser: what they are made of, what is logged for them, that text stays
text, how large they become, and that writing one never ends what it is about."""

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from math import log
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from page_data import HOSTILE, fake_evaluation, fake_run, write_lines

import grpo
import measure
import report
from data import TrainingWindow
from engine import events
from engine.files import append_lines, read_lines
from engine.run import Run
from engine.sampler import Sample
from grpo import group_advantages
from pages import curves, reader, run
from pages.facts import flat
from pages.render import number, script_json, signed
from reward import ndcg_at_k
from rollout import LOGGED_STEPS, Rollout, readable, rollout_figures
from settings import TrainSettings, UserError
from sources.formats import Candidates, Passage
from tasks import LISTWISE, SETWISE
from window import LISTWISE_PROMPT, load_prompt

MINUS = "\N{MINUS SIGN}"

# ------------------------------------------------------------------------- what is logged of a step


def rollout_of(responses: list[str], place: int = 0, grades=(0, 1, 3)) -> Rollout:
    """A group of these responses, its tokens their words, each word sampled with p = 1/2."""
    passages = tuple(Passage(f"d{i}", f" text  {i} " * 200, 1.0) for i in range(len(grades)))
    window = TrainingWindow(f"q{place}", "tides", passages, grades, tuple(sorted(grades)[::-1]))
    samples = [
        Sample([*range(len(r.split()))], [log(0.5)] * len(r.split()), True, "answer>" in r)
        for r in responses
    ]
    parsed = [LISTWISE.parse(response, len(grades), True) for response in responses]
    rewards = torch.tensor([
        LISTWISE.rewards["relative"](p, grades, window.judged, [0.8, 0.1, 0.1]) for p in parsed
    ])  # fmt: skip
    advantages = group_advantages(rewards, len(responses))
    return Rollout(place, window, [1, 2], samples, parsed, rewards, advantages)


BEST = "<think> a </think> <answer> [3] > [2] > [1] </answer>"
GIVEN = "<think> a b c </think> <answer> [1] > [2] > [3] </answer>"
MIDDLE = "<think> a </think> <answer> first [2] then [3] </answer>"
SILENT = "<think> a b"


def test_the_parts_of_the_reward_add_up_and_the_entropy_is_that_of_the_samples():
    rollouts = [rollout_of([BEST, MIDDLE, GIVEN, SILENT]), rollout_of([BEST] * 4, place=1)]
    settings = TrainSettings(weights=[0.7, 0.2, 0.4])
    for rollout in rollouts:  # as sampling would have scored them
        rewards = LISTWISE.rewards["relative"]
        rollout.rewards = torch.tensor([
            rewards(p, (0, 1, 3), rollout.window.judged, settings.weights) for p in rollout.parsed
        ])  # fmt: skip
    figures = rollout_figures(rollouts, LISTWISE, settings)
    parts = 0.7 * figures["r_rank"] + 0.2 * figures["r_format1"] + 0.4 * figures["r_format2"]
    assert figures["reward"] == pytest.approx(parts, abs=1e-6)
    assert figures["r_format1"] == 7 / 8 and figures["r_format2"] == 6 / 8
    given, best = (ndcg_at_k(g) for g in ([0, 1, 3], [3, 1, 0]))
    ranked = [1.0, (ndcg_at_k([1, 3, 0]) - given) / (best - given), 0.0, 0.0, 1, 1, 1, 1]
    assert figures["r_rank"] == pytest.approx(np.mean(ranked))
    assert figures["entropy"] == pytest.approx(log(2))
    sampled = [BEST, MIDDLE, GIVEN, SILENT] + [BEST] * 4
    assert figures["tokens"] == sum(len(response.split()) for response in sampled)
    assert figures["equal_groups"] == 0.5 and figures["cut_off"] == figures["malformed"] == 1 / 8


def test_the_entropy_is_estimated_without_bias():
    p = np.array([0.6, 0.3, 0.1])
    drawn = np.random.default_rng(0).choice(3, size=60_000, p=p)
    rollout = rollout_of([BEST])
    rollout.samples = [Sample([*drawn.tolist()], np.log(p)[drawn].tolist(), True, True)]
    figures = rollout_figures([rollout], LISTWISE, TrainSettings())
    assert figures["entropy"] == pytest.approx(-(p * np.log(p)).sum(), abs=0.01)


def test_setwise_figures_have_the_reward_itself_as_their_rank_part():
    rollout = rollout_of([BEST])
    rollout.parsed = [SETWISE.parse("<think> a </think> <answer> [3] </answer>", 3, True)]
    rollout.rewards = torch.tensor([1.0])
    figures = rollout_figures([rollout], SETWISE, TrainSettings(task="setwise"))
    assert figures["r_rank"] == figures["reward"] == 1


def agent_that_reads(texts: dict[int, str]) -> SimpleNamespace:
    """Its tokenizer knows a response by its number of tokens."""

    class Tokenizer:
        def decode(self, tokens):
            return texts[len(tokens)]

        def apply_chat_template(self, messages, **how):
            return "".join(message["content"] for message in messages)

    tokenizer = Tokenizer()
    return SimpleNamespace(tokenizer=tokenizer, prompt=load_prompt(LISTWISE_PROMPT), task=LISTWISE)


def test_groups_worth_reading_are_logged():
    agent = agent_that_reads({i: f"text of {i}" for i in range(40)})
    rollouts = [
        rollout_of([GIVEN, MIDDLE, GIVEN, MIDDLE], place=0),
        rollout_of([BEST, BEST, BEST, MIDDLE], place=1),
        rollout_of([SILENT, SILENT, SILENT, SILENT], place=2),
        rollout_of([SILENT, BEST, SILENT, BEST], place=3),
    ]
    groups = readable(agent, rollouts, 0, TrainSettings())
    assert [(g["chosen"], g["qid"]) for g in groups] == [
        ("best", "q1"), ("worst", "q2"), ("most spread", "q3"),
    ]  # fmt: skip
    spread = groups[2]
    assert [r["reward"] for r in spread["responses"]] == [1.0, 0.0]  # one for each reward
    assert spread["rewards"] == [0.0, 1.0, 0.0, 1.0]
    assert spread["responses"][0]["order"] == [2, 1, 0]
    assert spread["responses"][1]["malformed"] and spread["responses"][1]["cut_off"]
    advantages = rollouts[3].advantages.tolist()
    logged = [response["advantage"] for response in spread["responses"]]
    assert logged == pytest.approx(advantages[1::-1], abs=1e-4)
    passage = spread["passages"][1]
    assert (passage["docid"], passage["grade"]) == ("d1", 1)
    assert passage["text"] == ("text 1 " * 200)[:400]  # as it is shown to the model


def test_one_group_is_logged_once_and_a_long_run_at_a_bounded_number_of_steps():
    agent = agent_that_reads({i: "a" for i in range(40)})
    rollouts = [rollout_of([BEST, GIVEN])]
    assert len(readable(agent, rollouts, 0, TrainSettings())) == 1
    settings = replace(TrainSettings(), steps=10 * LOGGED_STEPS - 5)
    logged = [bool(readable(agent, rollouts, step, settings)) for step in range(settings.steps)]
    assert logged[0] and sum(logged) == LOGGED_STEPS


def test_tokens_per_second_and_event_files(tmp_path, process_group, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = TrainSettings(tensorboard=True)
    bar = SimpleNamespace(set_postfix=lambda values: None)
    a_run = SimpleNamespace(settings=settings, bar=bar, output_dir=tmp_path, first=0, skipped=0)
    for step in range(3):
        a_run.step, a_run.seconds = step, {"sample_seconds": 0.5, "update_seconds": 1.0}
        figures = {"reward": step / 2, "tokens": 100, "skipped_updates": 0}
        Run.log(a_run, figures, "reward", [], [])
    rows = list(read_lines(tmp_path / "metrics.jsonl"))
    assert [row["tokens_per_second"] for row in rows] == [200.0] * 3
    settings.tensorboard = False
    monkeypatch.setattr(events, "open_writer", None)  # nobody asked for it
    Run.log(a_run, figures, "reward", [], [])
    monkeypatch.undo()
    settings.tensorboard = True
    events.open_writer.cache_clear()
    a_run.first = a_run.step = 1  # it goes on from there: what came after is of another past
    Run.log(a_run, {"reward": 9.0, "tokens": 100, "skipped_updates": 0}, "reward", [], [])
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("reward")] == [(0, 0.0), (1, 9.0)]
    assert {"tokens_per_second", "sample_seconds"} <= set(read.Tags()["scalars"])


def test_events_that_cannot_be_written_end_nothing(tmp_path, process_group, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    events.write_events(tmp_path / "file" / "folder", 0, 0, {"reward": 1.0})
    assert "no TensorBoard events for step 0" in capsys.readouterr().err


def test_tensorboard_that_is_absent_is_said_first(monkeypatch, process_group):
    monkeypatch.setattr(events, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        grpo.fill_in(TrainSettings(tensorboard=True, preset="toy"))


# ------------------------------------------------------------------------------------- text is text


class Scripts(HTMLParser):
    """The text of each <script>, and every tag and attribute, as a browser would read them."""

    def __init__(self, page: str):
        super().__init__()
        self.scripts, self.tags, self.text = [], set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags |= {tag} | {f"{tag} {name}" for name, _ in attributes}
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.get_starttag_text() and self.get_starttag_text().startswith("<script"):
            self.scripts[-1] += data
        self.text += f" {data}"


@pytest.mark.parametrize("text", HOSTILE)
def test_json_for_a_script_comes_back_and_cannot_end_it(text):
    written = script_json({text: [text]})
    assert not set("<>&\u2028\u2029") & set(written)
    whole = text.encode("utf-8", "replace").decode()
    assert json.loads(written) == {whole: [whole]}


@pytest.mark.parametrize("make", ["run", "reader"])
def test_hostile_text_adds_no_tag_to_a_page(tmp_path, make):
    def page(hostile: bool) -> str:
        folder = tmp_path / str(hostile)
        if make == "reader":
            fake = fake_evaluation(folder, hostile=hostile)
            return reader.reader_page([replace(reader.read_evaluation(fake), name=HOSTILE[0])])
        fake = fake_run(folder, hostile=hostile, model=HOSTILE[1] if hostile else "tiny")
        return run.run_page([replace(run.read_run(fake), name=HOSTILE[2])])

    plain, hostile = Scripts(page(False)), Scripts(page(True))
    assert hostile.tags == plain.tags and len(hostile.scripts) == len(plain.scripts) == 2
    assert "{{ 7 * 7 }}" in hostile.scripts[0]
    assert "window.pwned" in hostile.scripts[0] and "window.pwned" not in hostile.scripts[1]


def test_a_page_takes_nothing_from_anywhere(tmp_path):
    pages = [
        run.run_page([run.read_run(fake_run(tmp_path / "run"))]),
        reader.reader_page([reader.read_evaluation(fake_evaluation(tmp_path / "eval"))]),
    ]
    for page in pages:
        assert "default-src 'none'" in page
        addresses = set(re.findall(r"https?://[^\"' )]+", page))
        assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
        assert not re.search(r"<(script|img|iframe|link)[^>]* (src|href)=(?!\"data:,\")", page)
        assert "@import" not in page and not re.search(r"url\((?!#)", page)


# ---------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (1.0, "1"),
        (0.5, "0.500"),
        (48.31, "48.3"),
        (12345.6, "12,346"),
        (-3.25, f"{MINUS}3.250"),
        (2e-5, f"2.0e{MINUS}05"),
        (float("nan"), "nan"),
        (True, "True"),
    ],
)
def test_numbers_are_written_alike(value, text):
    assert number(value) == text


def test_gains_have_their_sign():
    assert signed(0.25) == "+0.2500" and signed(-0.25, 2) == f"{MINUS}0.25"


# ---------------------------------------------------------------------------------- a run's page


def test_a_runs_page_has_what_was_measured(tmp_path):
    page = Scripts(run.run_page([run.read_run(fake_run(tmp_path / "mine", beta=0.5))]))
    for title in ("Reward", "r_rank", "r_format2", "Entropy", "KL to the reference", "Malformed",
                  "nDCG@10, held out", "Tokens per second", "Response length"):  # fmt: skip
        assert title in page.text
    assert "0.5000 → 0.6250" in " ".join(page.text.split())
    assert "The same at every step: Skipped updates 0." in page.text
    rows = {row["name"]: row for row in run.settings_table([run.read_run(tmp_path / "mine")])}
    assert rows["beta"]["changed"] and rows["beta"]["values"] == ["0.5"]
    assert rows["beta"]["default"] == "0.001" and not rows["clip"]["changed"]
    groups = json.loads(page.scripts[0])["groups"]
    assert len(groups) == 24 and groups[0]["passages"][1]["grade"] == 1


def test_held_out_figures_during_training_are_drawn_in_their_order(tmp_path):
    folder = fake_run(tmp_path, steps=12)
    rows = [{"step": s, "first_stage": 0.4, "ndcg@10": s, "window_reward": s} for s in (8, 4)]
    write_lines(folder / "held_out.jsonl", rows)
    line = run.line_of(run.read_run(folder), 0, "held-out/ndcg@10")
    assert line.steps == (0, 4, 8, 12) and line.values == (0.5, 4, 8, 0.625) and line.level == 0.4


def test_a_figure_that_nobody_listed_is_drawn_too(tmp_path):
    folder = fake_run(tmp_path)
    write_lines(folder / "metrics.jsonl", [{"step": s, "new_one": s, "word": "x"} for s in (0, 1)])
    (heading,) = [h for h in run.curves([run.read_run(folder)]) if h["title"] == "Further figures"]
    assert [figure["title"] for figure in heading["figures"]] == ["new one"]


def test_provenance_is_shown_where_it_is_known(tmp_path):
    folder = fake_run(tmp_path)
    start = {"step": 0, "git": {"revision": "0123456789abcdef", "clean": False}}
    start["versions"] = {"torch": "2.13.0"}
    record = {"inputs": {"qrels": "feed"}, "starts": [start | {"git": None}, start]}
    (folder / "provenance.json").write_text(json.dumps(record))
    text = " ".join(Scripts(run.run_page([run.read_run(folder)])).text.split())
    assert "0123456789 and changes" in text
    for fact in ("inputs qrels feed", "starts 2 versions torch 2.13.0"):
        assert fact in text


def test_long_facts_are_only_counted():
    facts = {"a": {"b": 1, "c": [1, 2]}, "per query": dict.fromkeys(map(str, range(99)), 1)}
    assert dict(flat(facts)) == {"a b": "1", "a c": "1 2", "per query": "(99 values)"}


def test_runs_are_overlaid_and_their_settings_compared(tmp_path):
    runs = [run.read_run(fake_run(tmp_path / f"r{i}", seed=i, clip=0.1)) for i in range(3)]
    rows = run.settings_table(runs)
    assert rows[0]["name"] == "seed" and rows[0]["values"] == ["0", "1", "2"] and rows[0]["differs"]
    assert [row["name"] for row in rows if row["differs"]] == ["seed"]
    page = run.run_page(runs)
    assert "var(--run2)" in page and "var(--run3)" not in page.split("</style>")[1]
    assert {g["run"] for g in json.loads(Scripts(page).scripts[0])["groups"]} == {0, 1, 2}


def test_a_run_without_a_step_has_a_page(tmp_path):
    folder = fake_run(tmp_path)
    (folder / "metrics.jsonl").unlink()
    (folder / "responses.jsonl").unlink()
    (folder / "before" / "held_out.json").unlink()
    (folder / "after" / "held_out.json").unlink()
    assert "No step is done yet." in run.run_page([run.read_run(folder)])


def test_the_page_of_a_long_run_stays_under_two_megabytes(tmp_path):
    """160 steps with REARANK's windows and responses: 20 passages, 850 tokens."""
    folder = fake_run(tmp_path, steps=160, passages=20, tokens=850)
    assert (folder / "responses.jsonl").stat().st_size > 6e6
    page = run.run_page([run.read_run(folder)])
    assert len(page.encode()) < 2e6
    steps = sorted({g["step"] for g in json.loads(Scripts(page).scripts[0])["groups"]})
    assert len(steps) > 10 and steps[-1] == 159 and steps[0] < 12
    assert np.diff(steps).max() <= 3 * 160 / len(steps)  # spread over the training


def test_the_first_few_of_a_spread_order_are_spread():
    for n in (0, 1, 2, 7, 160):
        assert sorted(run.spread_order(n)) == list(range(n))
    assert run.spread_order(160)[:4] == [0, 128, 64, 32]


def test_a_log_that_is_being_written_can_be_read_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    assert list(read_lines(path)) == []
    append_lines(path, [{"step": 0}, {"step": 1}])
    with open(path, "a") as file:
        file.write('{"step": 2, "rew')
    assert [row["step"] for row in read_lines(path)] == [0, 1]
    path.write_text('{"step": 0}\n[1]\n')
    with pytest.raises(UserError, match=r"log.jsonl:2: damaged"):
        list(read_lines(path))


# --------------------------------------------------------------------------------------- curves


def test_a_curve_takes_its_colours_from_the_page():
    steps = list(range(50))
    svg = curves.figure([curves.Line(steps, [x * 1.0 for x in steps], run=1, level=7.0)])
    assert "var(--run1)" in svg and "var(--soft)" in svg
    assert not re.search(r"#[0-9a-f]{6}", svg) and "font-family" not in svg
    assert {"0", "15", "30", "45"} <= set(re.findall(r">([\d.]+)</text>", svg))


def test_tick_labels_keep_their_digits():
    line = curves.Line([0, 1], [0.9981, 0.9989])
    labels = re.findall(r">([\d.]+)</text>", curves.figure([line]))
    assert len(set(labels)) == len(labels) and any(re.fullmatch(r"0\.99\d\d+", x) for x in labels)


def test_long_lines_are_drawn_as_means_of_neighbours():
    line = curves.Line(list(range(10_000)), [float(i % 5) for i in range(10_000)])
    x, y = curves.thinned(line)
    assert len(x) == curves.MOST_POINTS and np.allclose(y, 2) and x[0] == 12
    assert len(curves.figure([line])) < 40_000


def test_smoothing_is_the_mean_of_what_is_around():
    y = np.arange(60.0) ** 2
    got = curves.smoothed(y)
    for i in (0, 30, 59):
        assert got[i] == pytest.approx(y[max(0, i - 3) : i + 4].mean())


# ---------------------------------------------------------------------------- it ends no training


@pytest.fixture
def clock(monkeypatch):
    """The seconds that `keeper` sees; and a page that costs nothing."""
    now = [1000.0]
    monkeypatch.setattr(run, "run_page", lambda runs: "")
    monkeypatch.setattr(
        run, "time", SimpleNamespace(monotonic=lambda: now[0], strftime=lambda _: "")
    )
    return now


def test_a_page_is_kept_now_and_then(tmp_path, clock, process_group, monkeypatch):
    folder = fake_run(tmp_path)
    keep, page = run.keeper(folder), folder / "report.html"
    keep()
    assert page.exists()
    page.unlink()
    clock[0] += run.EVERY - 1
    keep()
    assert not page.exists()
    keep(now=True)
    assert page.exists()
    page.unlink()

    def slow(runs):
        clock[0] += 10
        return ""

    monkeypatch.setattr(run, "run_page", slow)
    clock[0] += run.EVERY
    keep()
    page.unlink()
    clock[0] += 10 / run.SHARE - 1  # what took long is done less often
    keep()
    assert not page.exists()
    clock[0] += 2
    keep()
    assert page.exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("bug")])
def test_what_goes_wrong_with_a_page_is_said_once(
    tmp_path, clock, process_group, monkeypatch, capsys, error
):
    def fails(*args):
        raise error

    keep = run.keeper(fake_run(tmp_path))
    monkeypatch.setattr(run, "run_page", fails)
    for _ in range(3):
        clock[0] += 1000
        keep()
    said = capsys.readouterr().err
    assert said.count("report.html is not written") == 1 and type(error).__name__ in said


# ---------------------------------------------------------------------------- the ranking reader


def collection() -> tuple[list[Candidates], list[Candidates], dict]:
    passages = tuple(Passage(f"d{i}", f"text  {i}\n" + "x" * 500, 1.0) for i in range(3))
    before = [Candidates("q0", "tides", passages), Candidates("q1", "moon", passages)]
    after = [replace(before[0], passages=passages[::-1]), before[1]]
    qrels = {"q0": {"d2": 3, "d1": 1, "elsewhere": 2, "d0": 0}, "q1": {"d0": 1}}
    return before, after, qrels


def test_a_query_is_kept_with_its_judgments_and_gains():
    first, second = reader.query_records(*collection())
    ideal = [3, 2, 1, 0]
    expected = [ndcg_at_k([0, 1, 3], 10, ideal), ndcg_at_k([3, 1, 0], 10, ideal)]
    assert first["ndcg@10"] == pytest.approx(expected, abs=1e-6) and first["relevant"] == 3
    assert first["final"] == ["d2", "d1", "d0"]
    assert [p["grade"] for p in first["passages"]] == [0, 1, 3]
    assert [p["grade"] for p in second["passages"]] == [1, None, None]
    cut = ("text 1 " + "x" * 500)[: reader.TEXT - 1]
    assert first["passages"][1]["text"] == cut + "\N{HORIZONTAL ELLIPSIS}"


def test_texts_together_have_a_bound(monkeypatch):
    monkeypatch.setattr(reader, "TEXTS", 60)
    for record in reader.query_records(*collection()):
        assert all(len(p["text"]) == 10 for p in record["passages"])


def reader_data(*folders: Path, **how) -> dict:
    page = reader.reader_page([reader.read_evaluation(folder) for folder in folders], **how)
    return json.loads(Scripts(page).scripts[0])


def test_the_query_that_lost_most_comes_first(tmp_path):
    folder = fake_evaluation(tmp_path / "a")
    data = reader_data(folder)
    gains = [query["ndcg"][1] - query["ndcg"][0] for query in data["queries"]]
    assert gains == sorted(gains) and len(gains) == 6
    records = {record["qid"]: record for record in read_lines(folder / "queries.jsonl")}
    windows = list(read_lines(folder / "windows.jsonl"))
    for query in data["queries"]:
        docids = [p["docid"] for p in query["docs"]]
        first, final = ([docids[i] for i in order] for order in query["orders"])
        assert final == records[query["qid"]]["final"]
        assert first == [p["docid"] for p in records[query["qid"]]["passages"]]
        own = [w for w in windows if w["qid"] == query["qid"]]
        for shown, written in zip(query["windows"][0], own, strict=True):
            assert [docids[i] for i in shown["given"]] == written["given"]
            assert [docids[i] for i in shown["ranked"]] == written["ranked"]


def test_two_evaluations_are_ordered_by_where_they_differ(tmp_path):
    a, b = (fake_evaluation(tmp_path / name, seed=i) for i, name in enumerate("ab"))
    lines = list(read_lines(b / "queries.jsonl"))
    write_lines(b / "queries.jsonl", lines[1:])  # b lacks a query
    data = reader_data(a, b)
    differences = [abs(query["ndcg"][1] - query["ndcg"][0]) for query in data["queries"]]
    assert differences == sorted(differences, reverse=True) and len(differences) == 5
    assert data["names"] == ["a", "b"]
    finals = [{r["qid"]: r["final"] for r in read_lines(f / "queries.jsonl")} for f in (a, b)]
    for query in data["queries"]:
        for order, final in zip(query["orders"], finals):
            assert [query["docs"][i]["docid"] for i in order] == final[query["qid"]]
        assert [len(windows) for windows in query["windows"]] == [2, 2]


def test_evaluations_of_other_queries_cannot_be_compared(tmp_path):
    a, b = (fake_evaluation(tmp_path / name, queries=1) for name in "ab")
    (record,) = read_lines(b / "queries.jsonl")
    write_lines(b / "queries.jsonl", [record | {"qid": "other"}])
    with pytest.raises(UserError, match="no query in common"):
        reader_data(a, b)


def test_a_large_evaluation_leaves_out_what_changed_least(tmp_path):
    folder = fake_evaluation(tmp_path)
    whole = reader_data(folder)
    data = reader_data(folder, largest=len(json.dumps(whole)) // 2)
    kept = [bool(query["docs"]) for query in data["queries"]]
    assert len(kept) == 6 and 0 < sum(kept) < 6 and kept == sorted(kept, reverse=True)


def test_an_evaluation_is_never_lost_to_its_page(tmp_path, process_group, monkeypatch, capsys):
    candidates, _, qrels = collection()

    def fails(*args, **how):
        raise RuntimeError("a bug")

    monkeypatch.setattr(reader, "render", fails)
    tmp_path /= "out"
    evaluation = measure.Evaluation(candidates, qrels, tmp_path)
    (metrics,) = measure.measure_all([evaluation], lambda given, *_: given)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert "report.html is not written (RuntimeError: a bug)" in capsys.readouterr().err
    monkeypatch.undo()
    measure.measure_all([evaluation], lambda given, *_: given)
    assert "tides" in (tmp_path / "report.html").read_text()


# ------------------------------------------------------------------------------------- report.py


def write_report(monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, args)])
    report.main()


def test_report_writes_the_page_of_one_run_into_its_folder(tmp_path, monkeypatch, capsys):
    write_report(monkeypatch, fake_run(tmp_path / "a"))
    write_report(monkeypatch, fake_evaluation(tmp_path / "b"))
    assert "Training run" in (tmp_path / "a" / "report.html").read_text()
    assert "Ranking reader" in (tmp_path / "b" / "report.html").read_text()
    both = tmp_path / "both.html"
    write_report(monkeypatch, fake_run(tmp_path / "c"), tmp_path / "a", "--output", both)
    assert "2 runs" in both.read_text() and str(both) in capsys.readouterr().out


@pytest.mark.parametrize(
    "folders, message",
    [
        (["nowhere"], "nowhere: no training run"),
        (["run", "eval"], "not both"),
        (["eval"] * 3, "at most 2 evaluations, not 3"),
        (["run"] * 8, "at most 7 training runs, not 8"),
        (["damaged"], "settings.json: damaged"),
    ],
)
def test_report_says_what_it_cannot_show(tmp_path, monkeypatch, folders, message):
    fake_run(tmp_path / "run", steps=2)
    fake_evaluation(tmp_path / "eval", queries=1)
    (fake_run(tmp_path / "damaged", steps=1) / "settings.json").write_text("{")
    with pytest.raises(SystemExit, match=message):
        write_report(monkeypatch, *(tmp_path / folder for folder in folders))


@pytest.mark.parametrize("file", ["queries.jsonl", "windows.jsonl"])
def test_a_page_of_damaged_files_is_refused_by_name(tmp_path, file):
    folder = fake_evaluation(tmp_path / "hurt")
    (folder / file).write_text('{"qid": "q0"}\n')
    with pytest.raises(UserError, match=rf"{folder}: a file is damaged \(KeyError: "):
        report.page_of([folder])
