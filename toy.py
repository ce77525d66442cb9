"""The offline world: a collection whose grades can be read from its texts, and a tiny model that
ranks it badly. No download, no GPU; minutes on two CPU cores. `grpo.py --preset toy` uses it.

The collection. A query names two topics. A passage holds one topic word and one depth word among
filler. Off topic it has grade 0, on topic 1, 2 or 3: half its depth of 1 to 6, rounded up. No
held-out query names a pair of topics that a training query names.

The model is warm-started by imitating a mediocre ranker, the demonstrator. It reasons rightly: for
each passage it writes whether it is on topic (+ or -) and how deep it goes. But then it ranks by
depth, with too little weight on the topic, and with noise, so that a deep passage about something
else comes before a shallow one about the query. GRPO has to find by sampling what matters more.
"""

import fcntl
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from engine.chat import encode_chat
from engine.checkpoint import write_model
from sources.formats import Candidates, Passage, write_candidates
from sources.trec import Qrels, write_qrels
from window import Prompt, conversation

CACHE = Path(__file__).parent / ".cache"
SIZE = 6  # passages in a window

# ---------------------------------------------------------------------------------- the collection

TOPICS = """rivers volcanoes bridges violins comets glaciers beetles castles engines orchids
harbours deserts falcons clocks cheeses canals whales mirrors lanterns tunnels saddles pianos reefs
windmills""".split()
DEPTHS = "glimpse note summary outline treatise monograph".split()  # depth 1 to 6
FILLERS = "here is a text that some people wrote once for us all and then put away".split()


def make_world(
    seed: int, train: int = 200, held_out: int = 64, depth: int = 15
) -> tuple[list[Candidates], list[Candidates], Qrels]:
    """(training queries, held-out queries, qrels of both); each query has `depth` candidates."""
    rng = random.Random(seed)
    pairs = [(a, b) for i, a in enumerate(TOPICS) for b in TOPICS[i + 1 :]]
    drawn = rng.sample(pairs, train + held_out)
    queries = [make_query(rng, f"q{i}", pair, depth) for i, pair in enumerate(drawn)]
    qrels = {q.qid: {p.docid: grade(q.query, p.text) for p in q.passages} for q in queries}
    return queries[:train], queries[train:], qrels


def make_query(rng: random.Random, qid: str, pair: Sequence[str], depth: int) -> Candidates:
    """A query and its first stage: about a third on topic, at least one, in no useful order."""
    others = [topic for topic in TOPICS if topic not in pair]
    topics = [rng.choice(pair if rng.random() < 0.35 else others) for _ in range(depth)]
    topics[rng.randrange(depth)] = rng.choice(pair)
    passages = []
    for i, topic in enumerate(topics):
        words = [*rng.choices(FILLERS, k=2), topic, rng.choice(DEPTHS)]
        text = " ".join(rng.sample(words, len(words)))
        passages.append(Passage(f"{qid}-d{i}", text, float(depth - i)))
    return Candidates(qid, " and ".join(rng.sample(pair, 2)), tuple(passages))


def on_topic(query: str, text: str) -> bool:
    return bool(set(TOPICS) & set(query.split()) & set(text.split()))


def depth(text: str) -> int:
    return next(level for level, word in enumerate(DEPTHS, start=1) if word in text.split())


def grade(query: str, text: str) -> int:
    return (depth(text) + 1) // 2 if on_topic(query, text) else 0


# -------------------------------------------------------------------------------- the demonstrator

TOPIC_WEIGHT = 0.9  # beside a depth of 1 to 6: too little
NOISE = 1.4  # standard deviation of what is added to each score


def note(query: str, text: str) -> str:
    """What the reasoning says of a passage, in one word: +6 is about the topic, and deepest."""
    return f"{'+' if on_topic(query, text) else '-'}{depth(text)}"


NOTES = [f"{sign}{level}" for sign in "+-" for level in range(1, len(DEPTHS) + 1)]


def demonstrator_order(
    query: str, texts: Sequence[str], rng: random.Random | None = None
) -> list[int]:
    """Positions, best first; without rng the demonstrator with its noise taken out."""
    noise = [rng.gauss(0, NOISE) if rng else 0.0 for _ in texts]
    scores = [
        depth(text) + TOPIC_WEIGHT * on_topic(query, text) + e for text, e in zip(texts, noise)
    ]
    return sorted(range(len(texts)), key=lambda i: -scores[i])


def demonstrator_response(task: str, query: str, texts: Sequence[str], rng: random.Random) -> str:
    """Its reasoning, then all labels in its order (listwise) or the first of them (setwise)."""
    thought = " ".join(f"[{i}] {note(query, text)}" for i, text in enumerate(texts, start=1))
    order = demonstrator_order(query, texts, rng)
    answer = " > ".join(f"[{i + 1}]" for i in (order if task == "listwise" else order[:1]))
    return f"<think> {thought} </think> <answer> {answer} </answer>"


# ------------------------------------------------------------------------- the model and its words

PROMPT = Prompt(
    reasoning=True,
    max_chars=400,
    system="judge",
    opening="{query}",
    ready="ready",
    passage="[{i}] {text}",
    received="[{i}]",
    request="rank for {query}",
)
PROMPTS = {"listwise": PROMPT, "setwise": replace(PROMPT, request="best for {query}")}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word. Only the turns' marks are special, so that a response decodes as text."""
    special = ["<|end|>", "<|pad|>", "<|unknown|>", "<|system|>", "<|user|>", "<|assistant|>"]
    spoken = "<think> </think> <answer> </answer> > judge ready rank best for".split()
    labels = [f"[{i}]" for i in range(1, 21)]
    words = [*special, *spoken, *labels, *NOTES, *TOPICS, *FILLERS, *DEPTHS]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_only,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unknown|>",
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


# ---------------------------------------------------------------------------------- the warm start


def matching_lesson(tokenizer, query: str, texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """(tokens, targets) of a conversation with each passage's note right after it; only the notes
    are learned. That close, a model learns to match in seconds; from responses alone it does not.
    """
    messages = conversation(query, texts, PROMPT)
    for text, message in zip(texts, messages[4::2]):
        message["content"] += " " + note(query, text)
    tokens = encode_chat(tokenizer, messages, generate=False)
    return tokens, only_notes(tokenizer, tokens)


def only_notes(tokenizer, targets: Sequence[int]) -> list[int]:
    notes = set(tokenizer.convert_tokens_to_ids(NOTES))
    return [token if token in notes else -100 for token in targets]


def answering_lesson(
    tokenizer, query: str, texts: Sequence[str], task: str, rng: random.Random
) -> tuple[list[int], list[int]]:
    """(tokens, targets) of a window with the demonstrator's response; only that is learned."""
    asked = encode_chat(tokenizer, conversation(query, texts, PROMPTS[task]))
    response = tokenizer.encode(demonstrator_response(task, query, texts, rng))
    response.append(tokenizer.eos_token_id)
    return asked + response, [-100] * len(asked) + response


def reasoning_lesson(tokenizer, *window) -> tuple[list[int], list[int]]:
    """An answering lesson of which only the notes are learned."""
    tokens, targets = answering_lesson(tokenizer, *window)
    return tokens, only_notes(tokenizer, targets)


def warm_start(lm, tokenizer, queries: list[Candidates], task: str, seed: int) -> None:
    """Teach the matching, then the reasoning's notes, each until it is learned, and only then the
    demonstrator's answers: where notes are wrong, GRPO has little to go by.

    One label a response teaches slowly, so setwise learns to rank before it learns to choose. It
    sees smaller windows too, since a heapsort has such.
    """
    rng = random.Random(seed)

    def draw(lesson, size: int, *args):
        query = rng.choice(queries)
        texts = [passage.text for passage in rng.sample(query.passages, size)]
        return lesson(tokenizer, query.query, texts, *args)

    def matching(step: int):
        return draw(matching_lesson, SIZE)

    def reasoning(step: int):
        return draw(reasoning_lesson, SIZE, task if step % 2 else "listwise", rng)

    def ranking(step: int):
        return draw(answering_lesson, SIZE, "listwise", rng)

    def choosing(step: int):
        size = SIZE if step % 3 else 2 + step // 3 % (SIZE - 2)
        return draw(answering_lesson, size, "setwise", rng)

    teach(lm, "matching", 1500, matching, until=0.1)
    teach(lm, "reasoning", 1500, reasoning, until=0.03)
    teach(lm, "ranking", 800, ranking)
    if task == "setwise":
        teach(lm, "choosing", 400, choosing)


def teach(
    lm,
    what: str,
    steps: int,
    draw_lesson: Callable,
    until: float = 0.0,
    batch: int = 32,
    rate: float = 2e-3,
) -> None:
    """Supervised steps on batches of lessons, all equally long, until the loss is under `until`."""
    optimizer = torch.optim.AdamW(lm.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    recent = 1.0
    for step in (bar := trange(steps, desc=f"warm start, {what}", ncols=80)):
        tokens, targets = map(torch.tensor, zip(*(draw_lesson(step) for _ in range(batch))))
        loss = lm(input_ids=tokens, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent = 0.9 * recent + 0.1 * loss.item()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{recent:.3f}")
        if recent < until:
            break


# ----------------------------------------------------------------------------------- for grpo.py

PRESET = {
    "window_size": SIZE,
    "draws": 20,
    "max_new_tokens": 40,
    "batch_size": 16,
    "group_size": 16,
    "steps": 200,
    "learning_rate": 3e-4,
    "beta": 0.2,
    "max_in_flight": 256,
    "activation_checkpointing": False,
}


def prepare(seed: int, task: str = "listwise") -> dict[str, str]:
    """Generate the world and warm-start its model, once per seed and task; the settings that
    point there.

    The folder appears whole or not at all, and a change of this file makes a new one. Where
    another program is making it, this one waits.
    """
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    folder = CACHE / f"toy-{task}-{seed}-{version}"
    if not folder.exists():
        building = CACHE / f"{folder.name}.tmp"
        CACHE.mkdir(parents=True, exist_ok=True)
        with open(building.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                shutil.rmtree(building, ignore_errors=True)  # what a killed one left
                building.mkdir()
                build(building, seed, task)
                building.rename(folder)
    settings = "model prompt candidates qrels eval_candidates eval_qrels".split()
    names = "model prompt.toml train.jsonl train.txt held_out.jsonl held_out.txt".split()
    return {setting: str(folder / name) for setting, name in zip(settings, names)}


def build(folder: Path, seed: int, task: str) -> None:
    train, held_out, qrels = make_world(seed)
    for name, queries in (("train", train), ("held_out", held_out)):
        write_candidates(queries, folder / f"{name}.jsonl")
        write_qrels({q.qid: qrels[q.qid] for q in queries}, folder / f"{name}.txt")
    lines = [f"{name} = {json.dumps(value)}" for name, value in asdict(PROMPTS[task]).items()]
    (folder / "prompt.toml").write_text("\n".join(lines) + "\n")
    tokenizer = make_tokenizer()
    lm = make_model(tokenizer, seed)
    warm_start(lm, tokenizer, train, task, seed)
    write_model(lm, tokenizer, folder / "model", {})
