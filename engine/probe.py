"""Is a model one that this engine computes rightly? Asked when it is loaded, in the type in use.

Packed rows and sampling run a model's own code on tokens laid out in an unusual way. A model whose
layers are not plain causal attention, or which looks at other tokens of its row, would go wrong
without a word. So some made-up prompts are scored three ways, by the plain model, as a packed row,
and as they are sampled, and must agree to rounding.
"""

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from engine.packed import Group, pack_row, response_logprobs
from engine.policy import Policy
from engine.sampler import Request, Sampler
from settings import UserError

PROMPTS, RESPONSES, STEPS = (19, 4), ((7, 2), (5,)), 3  # in tokens
WHOLE_ROW_ROPES = ("dynamic", "longrope")
LAYERS = {"full_attention", "sliding_attention"}  # others may differ beyond the probe's lengths
LARGEST = {  # of what a config may ask for, so that a damaged one ends at once
    "num_hidden_layers": 1000,
    "vocab_size": 10**7,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_attention_heads": 10**4,
}


def check_family(config: PreTrainedConfig) -> None:
    """UserError for what is known, before any weight is read, not to work."""
    for name, most in LARGEST.items():
        if not 0 < getattr(config, name, 1) <= most:
            raise UserError(f"{name} in its config.json is {getattr(config, name)}")
    if others := set(getattr(config, "layer_types", None) or ()) - LAYERS:
        raise UserError(
            f"{config.model_type} has layers of type {min(others)}: only full attention and "
            "sliding windows are supported"
        )
    if config.to_dict().get("quantization_config"):
        raise UserError("its weights are quantized, which is not supported: load it unquantized")
    if name := hub_kernel(config):
        raise UserError(f"its config.json asks for code from the hub, {name!r:.60}: not run")
    if ropes := rope_types(getattr(config, "rope_parameters", None)) & set(WHOLE_ROW_ROPES):
        raise UserError(
            f"rope of type {ropes.pop()} depends on the longest sequence of a row, and rows hold "
            "many here: not supported"
        )


def hub_kernel(config: PreTrainedConfig) -> str | None:
    """The repository that a config (or one inside it) names as its attention or its experts."""
    for part in (config, *vars(config).values()):
        if isinstance(part, PreTrainedConfig):
            for name in ("_attn_implementation", "_experts_implementation"):
                if "/" in (getattr(part, name, None) or ""):
                    return getattr(part, name)
    return None


def check_dropout(config: PreTrainedConfig) -> None:
    """UserError where training would drop what sampling does not."""
    for name, value in config.to_dict().items():
        if name.endswith(("dropout", "pdrop", "drop")) and value:
            raise UserError(f"{name} is {value} in its config.json: set it to 0 to train it")


def rope_types(parameters: dict | None) -> set[str]:
    """In a config's rope parameters, which may be one set for each kind of layer."""
    found = set()
    for name, value in (parameters or {}).items():
        if isinstance(value, dict):
            found |= rope_types(value)
        elif name in ("rope_type", "type"):
            found.add(value)
    return found


@torch.no_grad()
def probe(policy: Policy, name: str) -> None:
    """UserError, naming --model, where the packed row or the sampler does not compute what the
    plain model does. The policy's weights must be whole on this process."""
    kind = policy.lm.config.model_type
    try:
        packed, sampled, itself = policy(differences)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model's code makes of what it was not written for
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"--model {name}: {kind} models cannot be used here: {what}") from error
    # Rounding alone is a few eps, or more where even the plain model, read token by token, differs
    # from itself; what is wrong is wrong by far more.
    allowed = 1e-3 + 20 * torch.finfo(policy.computing).eps + 5 * itself
    for what, difference in (("update", packed), ("sampling", sampled)):
        if not difference <= allowed:
            raise UserError(
                f"--model {name}: {kind} models go wrong here: the {what}'s log-probabilities are "
                f"{difference:.2g} from the plain model's on average, where its own differ by "
                f"{itself:.2g}"
            )


def differences(policy: Policy) -> tuple[float, float, float]:
    """Mean |difference| of log-probabilities from the plain model's: of a packed row's, of sampled
    tokens', and of the plain model's own when it reads token by token."""
    numbers = torch.Generator().manual_seed(0)
    vocabulary, device = policy.lm.config.vocab_size, policy.lm.device

    def tokens(length: int) -> list[int]:
        return torch.randint(vocabulary, (length,), generator=numbers).tolist()

    groups = [Group(tokens(p), [tokens(r) for r in rs]) for p, rs in zip(PROMPTS, RESPONSES)]
    row = pack_row(groups, device)
    packed = policy(response_logprobs, row)[row.mask]
    pairs = [(group.prompt, response) for group in groups for response in group.responses]
    expected = torch.cat([plain_logprobs(policy, *pair) for pair in pairs])
    stepwise = torch.cat([stepwise_logprobs(policy, *pair) for pair in pairs])

    sampler = Sampler(policy, [], STEPS)
    for i, group in enumerate(groups):
        sampler.submit(Request(i, group.prompt, samples=2, seed=(i,)))
    sampled, plain = [], []
    while finished := sampler.collect():
        for i, samples in finished:
            for sample in samples:
                sampled += sample.logprobs
                plain.append(plain_logprobs(policy, groups[i].prompt, sample.tokens))
    pairs = ((packed, expected), (torch.tensor(sampled, device=device), torch.cat(plain)))
    return tuple(float((a - b).abs().mean()) for a, b in (*pairs, (stepwise, expected)))


def plain_logprobs(policy: Policy, prompt: list[int], response: list[int]) -> Tensor:
    """log pi of a response's tokens [C], by the plain model."""
    with policy.plain() as lm:
        ids = torch.tensor([[*prompt, *response]], device=lm.device)
        logits = lm(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return picked(logits, response)


def stepwise_logprobs(policy: Policy, prompt: list[int], response: list[int]) -> Tensor:
    """The same, read token by token after the prompt."""
    with policy.plain() as lm:
        cache, logits = DynamicCache(config=lm.config), []
        for part in (prompt, *([token] for token in response[:-1])):
            ids = torch.tensor([part], device=lm.device)
            logits.append(lm(ids, past_key_values=cache, use_cache=True).logits[0, -1])
    return picked(torch.stack(logits), response)


def picked(logits: Tensor, tokens: list[int]) -> Tensor:
    logprobs = logits.float().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
