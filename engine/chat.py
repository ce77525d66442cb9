"""Chat messages to token ids, so that no text can pass for a control token; and tokens to text.

Control tokens (turns, ends, tool calls, in some models <think>) are all that a tokenizer matches
before it looks at words. They come from the chat template, and from what the messages would hold
without any query or passage; never from a query or a passage. That is held against what the
tokenizer makes of a conversation, not against spellings.
"""

import json
from collections.abc import Callable
from functools import lru_cache
from itertools import count

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from engine.limits import limited
from engine.sampler import Sample
from settings import UserError

Messages = list[dict[str, str]]  # {"role", "content"}


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    generate: bool = True,
    trusted: list[str] | None = None,
) -> list[int]:
    """Chat messages as token ids; with `generate` up to where the assistant's reply begins.

    trusted: each message without the texts of others in it; only its control tokens are kept (none
        where it is not given). A message that holds more is encoded as the plain text it is.
    UserError where the chat template refuses the messages or leaves one out.
    """
    held = set().union(*(m["content"] for m in messages))
    if any("\ud800" <= char <= "\udfff" for char in held):
        raise UserError("the query or a passage holds a lone surrogate, which is no text")
    roles, trusted = tuple(m["role"] for m in messages), trusted or [""] * len(messages)
    controls = control_tokens(tokenizer)

    def controlling(tokens: list[int]) -> list[int]:
        return [token for token in tokens if token in controls]

    ids = encode(tokenizer, render(tokenizer, messages, generate))
    if controlling(ids) == expected_controls(tokenizer, roles, tuple(trusted), generate):
        return ids

    # While the template is filled in, a character that no message holds stands for each message
    # that holds too many.
    mark = next(char for i in count(0xE000) if (char := chr(i)) not in held)
    marked, fair, plain = list(messages), list(trusted), []
    for i, (message, own) in enumerate(zip(messages, trusted)):
        held_by, allowed = (controlling(encode(tokenizer, x)) for x in (message["content"], own))
        if held_by != allowed:
            plain.append(plain_tokens(tokenizer, message["content"]))
            marked[i], fair[i] = message | {"content": mark}, ""
    first, *others = render(tokenizer, marked, generate).split(mark)
    ids = encode(tokenizer, first)
    for tokens, part in zip(plain, others):
        ids += tokens + encode(tokenizer, part)
    if controlling(ids) != expected_controls(tokenizer, roles, tuple(fair), generate):
        raise UserError(
            "the query or a passage looks like control tokens in a way that this model's tokenizer "
            "and chat template cannot keep apart"
        )
    return ids


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, generate: bool) -> str:
    """What the chat template makes of the messages. UserError where it does not end, refuses them,
    or leaves some of them out."""
    try:
        with limited("its code"):
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate
            )
    except Exception as error:  # templates raise whatever they like, through jinja
        roles = " ".join(m["role"] for m in messages[:5])
        raise UserError(
            f"the model's chat template refuses these turns ({roles} ...): {error}"
        ) from error
    end = 0
    for message in messages:
        content = message["content"].strip()
        start = text.find(content, end)
        if start == -1:
            raise UserError(
                f"the model's chat template does not show all of the {len(messages)} turns, each "
                f"whole and in its place: not {message['role']}'s {content!r:.60}"
            )
        end = start + len(content)
    return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@lru_cache
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All tokens that are matched before words are looked at, whether marked as special or not
    (Qwen2.5's <|fim_prefix|> and DeepSeek's turns are not); but not the one that unknown words
    become. A tokenizer of bytes knows all, and may call its end of text "unknown" (SmolLM2's)."""
    tokens = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    unknown = getattr(tokenizer.backend_tokenizer.model, "unk_token", tokenizer.unk_token)
    return frozenset(tokens - set(tokenizer.convert_tokens_to_ids([unknown] if unknown else [])))


@lru_cache
def expected_controls(
    tokenizer: PreTrainedTokenizerBase,
    roles: tuple[str, ...],
    trusted: tuple[str, ...],
    generate: bool,
) -> list[int]:
    """The control tokens of these turns with nothing but trusted text in them, in order."""
    messages = [{"role": r, "content": text or "x"} for r, text in zip(roles, trusted)]
    controls = control_tokens(tokenizer)
    return [t for t in encode(tokenizer, render(tokenizer, messages, generate)) if t in controls]


@lru_cache
def without_controls(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The same tokenizer, which matches nothing before it looks at words."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return Tokenizer.from_str(json.dumps(state | {"added_tokens": []}))


def plain_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Text as tokens, none of which controls. A vocabulary may hold control tokens as words: they
    are cut after their first character, or left out where they have no other."""
    found = without_controls(tokenizer).encode(text, add_special_tokens=False)
    controls = control_tokens(tokenizer)
    for token, (start, end) in zip(found.ids, found.offsets):
        if token in controls:
            rest = text[end:] if end - start < 2 else text[start + 1 :]
            kept = text[:start] if end - start < 2 else text[: start + 1]
            return plain_tokens(tokenizer, kept) + plain_tokens(tokenizer, rest)
    return found.ids


@lru_cache
def reply_opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template has written of every reply: "<think>" in models that always reason."""
    text = render(tokenizer, [{"role": "user", "content": "x"}], generate=True)
    return "<think>" if text.rstrip().endswith("<think>") else ""


def reply_end(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> int:
    """The one of the tokens that end a response with which the chat template ends a reply."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "turn1x"}]
    after = encode(tokenizer, render(tokenizer, turns, generate=False).partition("turn1x")[2])
    return next((token for token in after if token in ends), ends[0])


def encode_response(
    tokenizer: PreTrainedTokenizerBase, response: str, ends: list[int]
) -> list[int]:
    """A given response as the tokens that a model would sample, so that `decode_response` gives it
    back. ends: the tokens that end one. UserError where it holds such a token."""
    tokens = encode(tokenizer, response.removeprefix(reply_opening(tokenizer)))
    if held := set(tokens) & set(ends):
        raise UserError(f"the response holds {tokenizer.decode(list(held))!r}, which would end it")
    return [*tokens, reply_end(tokenizer, ends)]


def decode_response(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> str:
    """A response's text with what the template has opened, without the token that ended it."""
    tokens = sample.tokens[:-1] if sample.finished else sample.tokens
    return reply_opening(tokenizer) + tokenizer.decode(tokens)


def text_stream(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """A function that is given a response's tokens one by one, and returns the text that each
    completes, "" where a character is not whole yet: together, what `decode_response` returns."""
    stream, opening = DecodeStream(skip_special_tokens=False), [reply_opening(tokenizer)]

    def text_of(token: int) -> str:
        text = stream.step(tokenizer.backend_tokenizer, token) or ""
        return (opening.pop() if opening else "") + text

    return text_of
