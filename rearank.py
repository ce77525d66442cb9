"""The reranking agent: a language model that reads a window of passages, reasons, and ranks it.

    python rearank.py "how do tides work" passages.txt          # one passage a line
    python rearank.py "how do tides work" passages.txt --model OUT --prompt my_prompt.toml

From Python, for one query or thousands (all their windows share one batch):

    agent = load_agent(AgentSettings(model="Qwen/Qwen2.5-7B-Instruct"))
    reranked = rerank(agent, candidates)
"""

import re
import sys
import textwrap
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import MappingProxyType
from unittest.mock import patch

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import is_flash_attn_2_available

import lora
from data import Candidates, Passage
from settings import parse_settings, setting
from setwise import SORTS
from shared_prompt import Policy, Request, Sample, Sampler
from tasks import TASKS
from window import OPENING_TURNS, TAGS, Prompt, Task, conversation, load_prompt, run_rankers


@dataclass
class AgentSettings:
    model: str = setting(
        "Qwen/Qwen2.5-7B-Instruct", "Hugging Face name or folder of a causal LM, or of an adapter"
    )
    task: str = setting("listwise", "what the model is asked for", choices=sorted(TASKS))
    prompt: str = setting("", "TOML file with every turn's text; default: the task's own")
    window_size: int = setting(20, "passages the model sees at once")
    step_size: int = setting(10, "listwise: how far the window moves up")
    sort: str = setting("heapsort", "setwise: how choices become a ranking", sorted(SORTS))
    sort_top: int = setting(10, "setwise: how many of the best are sorted out")
    max_new_tokens: int = setting(2048, "length limit of a response, in tokens")
    temperature: float = setting(0.0, "sampling temperature; 0 is greedy")
    max_in_flight: int = setting(64, "windows answered at once; more needs more memory")
    seed: int = setting(0, "of the sampling, where the temperature is not 0")
    dtype: str = setting("auto", "of the weights; auto: bfloat16 on a GPU, float32 on a CPU",
                         choices=["auto", "bfloat16", "float16", "float32"])  # fmt: skip


# ------------------------------------------------------------------------------- loading a model


def prompt_attention(device: torch.device, dtype: torch.dtype) -> str:
    """How prompts are read when sampling: with flash-attn where it is installed and can be."""
    flash = device.type == "cuda" and dtype != torch.float32 and is_flash_attn_2_available()
    return "flash_attention_2" if flash else "sdpa"


def load_lm(
    name: str, dtype: torch.dtype, attention: str = "sdpa"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model on the CPU, tokenizer) by Hugging Face name or folder. SystemExit, naming --model,
    where it cannot be loaded or its tokenizer has no vocabulary or no chat template."""
    try:
        tokenizer = load_tokenizer(name)
        load = lora.load_merged if lora.base_of(name) else AutoModelForCausalLM.from_pretrained
        # Safetensors alone: a pickle could run code, and even a safetensors index may name one.
        with patch("torch.load", refuse_pickle):
            lm = load(
                name, dtype=dtype, attn_implementation=attention, use_safetensors=True,
                trust_remote_code=False,
            )  # fmt: skip
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of what lies in a damaged file, any
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise SystemExit(f"--model {name}: cannot be loaded: {problem}") from None
    if not tokenizer.encode("text", add_special_tokens=False):
        raise SystemExit(f"--model {name}: its tokenizer has no vocabulary; is a file missing?")
    if tokenizer.chat_template is None:
        raise SystemExit(f"--model {name}: its tokenizer has no chat template; use a chat model")
    reader = {"sdpa": "PyTorch SDPA", "flash_attention_2": "flash-attention 2"}[attention]
    print(f"{name}: {lm.num_parameters():,} parameters, reads prompts with {reader}",
          file=sys.stderr)  # fmt: skip
    return lm, tokenizer


def refuse_pickle(file, *_, **__):
    raise ValueError(f"{file} is a pickle; only safetensors are read")


def empty_lm(
    name: str, dtype: torch.dtype, attention: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_lm`, but nothing is written into the weights, which so take up no memory yet."""
    config = AutoConfig.from_pretrained(lora.base_of(name) or name)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    lm = lm.to_empty(device="cpu")
    lm.tie_weights()  # what is one tensor under two names came out as two
    return lm, load_tokenizer(name)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """AutoTokenizer rebuilds the tokenizer of every Qwen2 model as Qwen2's own, whatever its file
    says; one that calls itself generic is taken as it is stored. An adapter may come without."""
    config = get_tokenizer_config(name)
    if not config and (base := lora.base_of(name)):
        return load_tokenizer(base)
    if config.get("tokenizer_class") == "TokenizersBackend":
        return PreTrainedTokenizerFast.from_pretrained(name)
    # Told so, or it would ask on stdin whether to run the code that comes with a model.
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def end_tokens(lm, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: the model's generation settings', else the tokenizer's."""
    ends = lm.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return ends if isinstance(ends, list) else [ends]


# ---------------------------------------------------------------------------- text to tokens


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], generate: bool = True
) -> list[int]:
    """Chat messages as token ids; with `generate` up to where the assistant's reply begins.

    Control tokens come from the chat template alone. One that is spelled out in a message (a
    passage may hold <|im_end|>) is cut after its first character, and the parts are encoded apart:
    so it is the plain text it is, and no text can end its turn.
    """
    added = tokenizer.added_tokens_decoder.values()
    # Some that control are not marked as special: Qwen2.5's <|fim_prefix|>, DeepSeek's turns.
    controls = {str(t) for t in added if t.special or str(t).startswith(("<", "["))}
    controls.update(tokenizer.all_special_tokens)
    controls -= set(TAGS)  # which a prompt speaks of
    first = (f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in controls if t[1:])
    starts = re.compile("|".join(first) or "(?!)")
    held = set().union(*(m["content"] for m in messages))
    if any("\ud800" <= char <= "\udfff" for char in held):
        raise ValueError("the query or a passage holds a lone surrogate, which is no text")
    # While the template is filled in, a character that no message holds marks the cuts.
    cut = next(char for i in count(0xE000) if (char := chr(i)) not in held)
    messages = [m | {"content": starts.sub(rf"\g<0>{cut}", m["content"])} for m in messages]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate
        )
    except Exception as error:  # templates raise whatever they like, through jinja
        roles = " ".join(m["role"] for m in messages[:5])
        raise ValueError(
            f"the model's chat template refuses these turns ({roles} ...): {error}"
        ) from error
    parts = (tokenizer.encode(part, add_special_tokens=False) for part in text.split(cut))
    return [token for ids in parts for token in ids]


def encode_window(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, query: str, passages: Sequence[str]
) -> tuple[list[int], int]:
    """A window's conversation as token ids, and how many of them (the turns before the first
    passage) every other window of the query begins with too."""
    messages = conversation(query, passages, prompt)
    ids = encode_chat(tokenizer, messages)
    opening = encode_chat(tokenizer, messages[:OPENING_TURNS], generate=False)
    # Where a template ends a last turn in its own way, the tokens part a little earlier.
    same = next((i for i, (a, b) in enumerate(zip(ids, opening)) if a != b), len(opening))
    return ids, same


def decode_response(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> str:
    """A response's text, without the token that ended it."""
    return tokenizer.decode(sample.tokens[:-1] if sample.finished else sample.tokens)


# ------------------------------------------------------------------------------------- the agent


@dataclass(frozen=True)
class Agent:
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    prompt: Prompt
    task: Task
    settings: AgentSettings


@dataclass(frozen=True)
class Answer:
    """One answered window, as `rerank` reports it."""

    qid: str
    window: int  # its number within the query, from 0
    given: list[str]  # the docids in the order the model saw them
    ranked: list[str]  # the docids, best first
    malformed: bool  # no answer could be read, so the order is the given one
    reasoning: str
    response: str
    tokens: int
    cut_off: bool  # by max_new_tokens


def load_agent(settings: AgentSettings, device: torch.device | None = None) -> Agent:
    """The agent on `device`, by default the GPU where there is one."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = default if settings.dtype == "auto" else getattr(torch, settings.dtype)
    task = TASKS[settings.task]
    prompt = load_prompt(settings.prompt or task.prompt)
    lm, tokenizer = load_lm(settings.model, dtype, prompt_attention(device, dtype))
    return Agent(Policy(lm.eval().to(device)), tokenizer, prompt, task, settings)


def rerank(
    agent: Agent,
    candidates: Sequence[Candidates],
    on_answer: Callable[[Answer], None] = lambda answer: None,
    known: Mapping[tuple[str, int], Answer] = MappingProxyType({}),
) -> list[Candidates]:
    """Each query's passages in the agent's order. All queries are under way at once, and each
    goes on to its next window as soon as its last is answered.

    known: answers from before, by (qid, window), which are not asked for again nor reported;
        ValueError where one is for other passages than its window shows now.
    """
    settings, tokenizer = agent.settings, agent.tokenizer
    sampler = Sampler(
        agent.policy, end_tokens(agent.policy.lm, tokenizer), settings.max_new_tokens,
        settings.temperature, max_in_flight=settings.max_in_flight,
    )  # fmt: skip
    windows = Counter()  # so far, of each query
    shown: dict[tuple[int, int], tuple[int, list[str]]] = {}  # the window, its docids
    ready: list[tuple[tuple[int, int], list[int]]] = []  # what is answered by `known`

    def submit(ticket: tuple[int, int], given: list[int]) -> None:
        query = candidates[ticket[0]]
        window, docids = windows[ticket[0]], [query.passages[i].docid for i in given]
        windows[ticket[0]] += 1
        if answer := known.get((query.qid, window)):
            if answer.given != docids:
                raise ValueError(f"the known answer to window {window} of query {query.qid} is "
                                 "for other passages")  # fmt: skip
            ready.append((ticket, [docids.index(docid) for docid in answer.ranked]))
            return
        texts = [query.passages[i].text for i in given]
        ids, prefix = encode_window(tokenizer, agent.prompt, query.query, texts)
        check_length(agent.policy.lm, len(ids), settings.max_new_tokens)
        shown[ticket] = window, docids
        # No two windows draw the same numbers, and each the same whichever others are asked.
        seed = (settings.seed, zlib.crc32(query.qid.encode()), window)
        sampler.submit(Request(ticket, ids, prefix=prefix, seed=seed))

    def collect():
        while ready:
            yield ready.pop()
        for ticket, (sample,) in sampler.collect():
            query, (window, docids) = candidates[ticket[0]], shown.pop(ticket)
            response = decode_response(tokenizer, sample)
            parsed = agent.task.parse(response, len(docids), agent.prompt.reasoning)
            on_answer(
                Answer(
                    query.qid, window, docids, [docids[i] for i in parsed.order], parsed.malformed,
                    parsed.reasoning, response, len(sample.tokens), not sample.finished,
                )
            )  # fmt: skip
            yield ticket, parsed.order

    orders: dict[int, list[int]] = {}
    rankers = [agent.task.ranker(len(query.passages), settings) for query in candidates]
    run_rankers(rankers, submit, collect, orders.__setitem__)
    return [
        replace(query, passages=tuple(query.passages[i] for i in orders[index]))
        for index, query in enumerate(candidates)
    ]


def check_length(lm, prompt_tokens: int, max_new_tokens: int) -> None:
    limit = lm.config.max_position_embeddings
    if prompt_tokens + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and a response of up to {max_new_tokens} exceed "
            f"the model's {limit} positions: lower --window_size, --max_new_tokens or the "
            "prompt's max_chars"
        )


# ----------------------------------------------------------------------------------- the command


def main() -> None:
    parser = HfArgumentParser(AgentSettings, allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("query")
    parser.add_argument("passages", type=Path, help="a text file, one passage a line")
    settings, inputs = parse_settings(parser)
    try:
        lines = [line for line in inputs.passages.read_text("utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{inputs.passages}: cannot read passages: {error}")
    if not lines:
        parser.error(f"{inputs.passages}: no passage in it (expected one a line)")

    def show(answer: Answer) -> None:
        print(f"\nWindow of passages {', '.join(answer.given)}:", end="")
        print(" NO ANSWER COULD BE READ, its order is kept" if answer.malformed else "")
        print(textwrap.fill(answer.reasoning or "(no reasoning)", 80))

    passages = tuple(Passage(str(i), line, 0.0) for i, line in enumerate(lines, start=1))
    (ranked,) = rerank(load_agent(settings), [Candidates("1", inputs.query, passages)], show)
    print("\nRanking:")
    for rank, passage in enumerate(ranked.passages, start=1):
        print(f"{rank:4}. [{passage.docid}] " + textwrap.shorten(passage.text, 70))


if __name__ == "__main__":
    main()
