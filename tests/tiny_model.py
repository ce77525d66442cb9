"""A tiny Qwen2 for trying every part of the real job without a download: its tokenizer is learned
from a candidates file, and it is taught to answer windows of those passages in the right form, in
a random order. So rewards differ and gradients flow, but its rankings mean nothing.

    python tests/tiny_model.py CANDIDATES OUT
"""

import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from agent import encode_window
from engine.packed import Group, pack_row, response_logprobs
from engine.policy import Policy
from sources import formats
from window import LISTWISE_PROMPT, load_prompt

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learn_tokenizer(texts: list[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Byte-level BPE, the kind Qwen2 uses, with Qwen2's way to mark turns."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(tokenizer, seed: int = 0, **changes) -> Qwen2ForCausalLM:
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = Qwen2Config(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa", **({"vocab_size": len(tokenizer)} | sizes | changes),
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def teach_form(lm, tokenizer, candidates: list[formats.Candidates], steps: int, size: int) -> None:
    """Supervised steps on windows answered in a random order."""
    policy, rng = Policy(lm), random.Random(0)
    prompt = load_prompt(LISTWISE_PROMPT)
    short = replace(prompt, max_chars=20)  # most of the lessons, since they are cheaper
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in trange(steps, desc="teaching the form", ncols=80):
        query = rng.choice([c for c in candidates if len(c.passages) >= size])
        texts = [p.text for p in rng.sample(query.passages, size)]
        ids, _ = encode_window(
            tokenizer, rng.choice([short, short, short, prompt]), query.query, texts
        )
        answers = []
        for _ in range(4):
            order = " > ".join(f"[{i}]" for i in rng.sample(range(1, size + 1), size))
            text = f"<think> Each was read. </think> <answer> {order} </answer>"
            answers.append([*tokenizer.encode(text), tokenizer.eos_token_id])
        row = pack_row([Group(ids, answers)])
        loss = -policy(response_logprobs, row)[row.mask].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()


def save_tiny_model(
    candidates: list[formats.Candidates], out: Path, steps: int = 400, size: int = 20, **changes
) -> None:
    # Control tokens belong to the template; the words that responses are made of to the text.
    forms = ["<think> Each was read. </think> <answer> [1] > [2] </answer>"] * 100
    tokenizer = learn_tokenizer([p.text for c in candidates for p in c.passages] + forms)
    lm = tiny_model(tokenizer, **changes)
    teach_form(lm, tokenizer, candidates, steps, size)
    lm.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    source, out = sys.argv[1:]
    save_tiny_model(formats.read_candidates(source), Path(out))
