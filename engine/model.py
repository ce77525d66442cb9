"""Load a model: one door for a full model or an adapter, whole or split over all processes.

Only safetensors are read (a pickle could run code), and a model's own code is never run. What is
not all there, or not finite, is refused by name.
"""

import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import is_flash_attn_2_available

from engine import lora
from engine.chat import encode_chat
from engine.hub import require_model
from engine.parallel import gathered, non_finite, shard_from_first, together
from engine.policy import Policy
from engine.probe import check_dropout, check_family, probe
from settings import RunSettings, UserError

# ------------------------------------------------------------------------------------ the choices


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """What weights are rounded to for computing. "auto": bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name == "float32" and device.type == "cuda":
        raise UserError(
            "--dtype float32 runs on a CPU alone: on a GPU, flash attention takes 16-bit types"
        )
    return getattr(torch, name)


def prompt_attention(device: torch.device) -> str:
    """How prompts are read when sampling: with flash-attn where it is installed."""
    flash = device.type == "cuda" and is_flash_attn_2_available()
    return "flash_attention_2" if flash else "sdpa"


# ----------------------------------------------------------------------------------- from its files


def load_config(name: str) -> PreTrainedConfig:
    """UserError, naming --model, where there is none or its kind of model is not supported."""
    try:
        require_model(name)
        base = lora.base_of(name) or name
        require_model(base)
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        check_family(config)
        check_size(base, config)
        return config
    except Exception as error:  # of what lies in a damaged file, any
        raise not_loaded(name, error) from None


def check_size(name: str, config: PreTrainedConfig) -> None:
    """UserError where the config of a folder asks for more than its files can hold, before memory
    is taken for it. (A hub's model is downloaded when its weights are read, not before.)"""
    held = sum(path.stat().st_size for path in Path(name).glob("*.safetensors"))
    asked = sum(weight.numel() for weight in on_meta(config, torch.float32, "sdpa").parameters())
    if asked > held > 0:
        raise UserError(
            f"its config.json asks for {asked:,} weights, which {held:,} bytes in its files cannot "
            "hold; is one missing?"
        )


def on_meta(config: PreTrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A model of shapes alone."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )


def not_loaded(name: str, error: Exception) -> UserError:
    why = " ".join(str(error).split())
    if not isinstance(error, UserError):
        why = f"{type(error).__name__}: {why:.400}"  # some list all kinds of models there are
    return UserError(f"--model {name}: cannot be loaded: {why}")


def load_lm(
    name: str, dtype: torch.dtype, attention: str = "sdpa", merged: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model on the CPU, tokenizer) by Hugging Face name or folder. An adapter stays beside its
    base's weights or, `merged`, is added to them in float32 before they are rounded.

    UserError, naming --model, where it cannot be loaded or is not all there, where a weight is not
    finite, or where its tokenizer has no vocabulary, no chat template, or tokens of another model.
    """
    config = load_config(name)
    try:
        tokenizer = load_tokenizer(name)
        with patch("torch.load", refuse_pickle):  # even a safetensors index may name one
            lm, missing, unexpected = read_weights(name, config, dtype, attention, merged)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of what lies in a damaged file, any
        raise not_loaded(name, error) from None
    for problem, names in (
        ("its files lack", missing),
        ("its files hold tensors that this kind of model has no place for:", unexpected),
        ("not finite:", non_finite(lm)),
    ):
        if names:
            raise UserError(f"--model {name}: {problem} {some(names)}")
    if problem := tokenizer_problem(tokenizer, lm):
        raise UserError(f"--model {name}: its tokenizer {problem}")
    reader = {"sdpa": "PyTorch SDPA", "flash_attention_2": "flash-attention 2"}[attention]
    size = f"{lm.num_parameters():,} parameters"
    print(f"{name}: {size}, {dtype}, reads prompts with {reader}", file=sys.stderr)
    return lm, tokenizer


def tokenizer_problem(tokenizer: PreTrainedTokenizerBase, lm: PreTrainedModel) -> str | None:
    if not tokenizer.encode("text", add_special_tokens=False):
        return "has no vocabulary; is a file missing?"
    if tokenizer.chat_template is None:
        return "has no chat template; use a chat model"
    used = [tokenizer.vocab_size - 1, *encode_chat(tokenizer, [{"role": "user", "content": "x"}])]
    rows = lm.get_input_embeddings().num_embeddings
    return f"has a token {max(used)}, its model only {rows}" if max(used) >= rows else None


def read_weights(
    name: str, config: PreTrainedConfig, dtype: torch.dtype, attention: str, merged: bool
) -> tuple[PreTrainedModel, set[str], set[str]]:
    """(model, the names of tensors that its files lack, of those that it has no place for)."""
    base = lora.base_of(name)
    if base and lora.base_of(base):
        raise UserError(f"its base {base} is an adapter itself: python merge.py {base} OUT, first")
    lm, found = AutoModelForCausalLM.from_pretrained(
        base or name,
        config=config,
        dtype=torch.float32 if base and merged else dtype,
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing, unexpected = set(found["missing_keys"]), set(found["unexpected_keys"])
    if base:
        more_missing, more_unexpected = lora.add_saved(lm, name)
        missing, unexpected = missing | more_missing, unexpected | more_unexpected
        if merged:
            lora.merge(lm)
            lm = lm.to(dtype)
    # Buffers that older files hold and newer code computes are no loss.
    return lm, missing, {key for key in unexpected if key.endswith((".weight", ".bias"))}


def some(names: set[str] | list[str], most: int = 3) -> str:
    """A few of the names, and how many more there are."""
    shown, more = sorted(names)[:most], len(names) - most
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def refuse_pickle(file, *_, **__):
    raise ValueError(f"{file} is a pickle; only safetensors are read")


def empty_lm(
    name: str, dtype: torch.dtype, attention: str, merged: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_lm`, but nothing is written into the weights, which so take up no memory yet."""
    lm = on_meta(load_config(name), dtype, attention).to_empty(device="cpu")
    lm.tie_weights()  # what is one tensor under two names came out as two
    return lm, load_tokenizer(name)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """AutoTokenizer rebuilds the tokenizer of every Qwen2 model as Qwen2's own, whatever its file
    says; one that calls itself generic is taken as it is stored. An adapter may come without."""
    config = get_tokenizer_config(name, trust_remote_code=False)
    if not config and (base := lora.base_of(name)):
        return load_tokenizer(base)
    if config.get("tokenizer_class") == "TokenizersBackend":
        return PreTrainedTokenizerFast.from_pretrained(name)
    # Told so, or it would ask on stdin whether to run the code that comes with a model.
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


# -------------------------------------------------------------------------------------- as a policy


def load_whole(
    name: str, dtype: torch.dtype, device: torch.device
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """A model to sample from, on one device. UserError where it would not sample what it should."""
    lm, tokenizer = load_lm(name, dtype, prompt_attention(device))
    policy = Policy(lm.eval().to(device))
    probe(policy, name)
    return policy, tokenizer


def load_policy(
    settings: RunSettings, dtype: torch.dtype, device: torch.device
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """The model that is trained, split over all processes: kept in float32, computing in `dtype`.
    UserError where it would not be trained on what it samples."""
    policy, tokenizer = load_sharded(settings, torch.float32, dtype, device, trained=True)
    with gathered(policy):
        probe(policy, settings.model)
    return policy, tokenizer


def load_reference(
    settings: RunSettings, dtype: torch.dtype, device: torch.device
) -> Policy | None:
    """What the policy is held to; None where beta is 0. It never changes, so it is kept in the
    precision that it computes with."""
    if not settings.beta:
        return None
    return load_sharded(settings, dtype, dtype, device, trained=False)[0]


def load_sharded(
    settings: RunSettings,
    kept: torch.dtype,
    computing: torch.dtype,
    device: torch.device,
    trained: bool,
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """A model split over all processes. Only the first one reads it, and each is sent its part, so
    that a machine need not hold it once per process."""
    load = load_lm if dist.get_rank() == 0 else empty_lm
    attention = prompt_attention(device)
    lm, tokenizer = together(lambda: load(settings.model, kept, attention, merged=True))
    prepare(lm, settings, trained)
    return shard_from_first(Policy(lm.eval()), device, computing), tokenizer


def prepare(lm: PreTrainedModel, settings: RunSettings, trained: bool) -> None:
    """Make a model one that is trained as the settings say, or one that never is."""
    if not trained:
        lm.requires_grad_(False)
        return
    check_dropout(lm.config)
    if settings.activation_checkpointing:
        # Its name since transformers 5.23, and the name before.
        name = "activation_checkpointing_enable"
        enable = getattr(lm, name, None) or lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if settings.lora_rank:
        if lora.base_of(settings.model):
            raise UserError(
                f"--lora_rank trains an adapter, but --model {settings.model} is one already: "
                f"python merge.py {settings.model} OUT, and train on that"
            )
        lora.add_fresh(lm, settings.lora_rank, settings.lora_alpha, settings.seed)


def end_tokens(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: the model's generation settings', else the tokenizer's."""
    ends = lm.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return ends if isinstance(ends, list) else [ends]


NEED_LESS = "lower --window_size, --max_new_tokens or the prompt file's max_chars"


class TooLong(UserError):
    """A prompt and its response may not fit the model."""


def room_for_prompt(lm: PreTrainedModel, max_new_tokens: int) -> int:
    """How many tokens a prompt may have, so that it and its response fit the model."""
    return lm.config.max_position_embeddings - max_new_tokens


def check_length(lm: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    """TooLong where a prompt and its response may not fit the model."""
    if prompt_tokens > room_for_prompt(lm, max_new_tokens):
        raise TooLong(
            f"a prompt of {prompt_tokens} tokens and a response of up to {max_new_tokens} exceed "
            f"the model's {lm.config.max_position_embeddings} positions: "
            f"{NEED_LESS}"
        )
