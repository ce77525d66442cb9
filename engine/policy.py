"""A Hugging Face model whose tokens need not stand in a padded batch of whole sequences.

It is any decoder whose attention goes through transformers' AttentionInterface; its code stays as
it is. Its tokens come with something that knows what they attend to: a packed row (packed.py), or
the sampler's batch (cache.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast


class Attending(Protocol):
    """Tokens that know what they attend to: a packed row, or the sampler's batch."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor: ...


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    shared: Attending,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer; `shared` comes through the model's own forward."""
    for feature in ("softcap", "s_aux"):
        if kwargs.get(feature) is not None:
            raise NotImplementedError(f"attention with {feature}")
    if dropout:
        raise NotImplementedError("attention with dropout")
    return shared.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


AttentionInterface.register("shared_prompt", shared_prompt_attention)


class Policy(nn.Module):
    """A causal language model with one door: `policy(compute, ...)` runs `compute(policy, ...)`.

    FSDP gathers sharded weights when a module's forward is entered, so whatever we do with the
    weights, sampling or scoring, enters here.
    """

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm, self.computing = lm, lm.dtype
        self.prefill_attention = lm.config._attn_implementation  # reads prompts when sampling
        lm.config._attn_implementation = "shared_prompt"

    def forward(self, compute, *args, **kwargs):
        return compute(self, *args, **kwargs)

    @contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        """The model with an attention of transformers' own."""
        self.lm.config._attn_implementation = self.prefill_attention
        try:
            yield self.lm
        finally:
            self.lm.config._attn_implementation = "shared_prompt"


def logits_of(lm: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The logits [N, V] of last hidden states [N, d], by the model's own code: some models scale or
    cap what comes out of the head."""

    def already_there(*args, **kwargs) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=hidden[None])

    inner = lm.base_model
    inner.forward = already_there  # which hides the class's own
    try:
        return lm(input_ids=hidden, use_cache=False).logits[0]
    finally:
        del inner.forward
