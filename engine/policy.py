"""A Hugging Face model whose tokens need not stand in a padded batch of whole sequences.

It is any decoder whose attention goes through transformers' AttentionInterface; but for its norms,
and for what nobody reads of its last layer, its code stays as it is. Its tokens come with something
that knows what they attend to: a packed row (packed.py), or the sampler's batch (cache.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Protocol

import torch
import torch.nn.functional as F
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


def fuse_norms(lm: PreTrainedModel) -> None:
    """Let PyTorch compute a model's RMS norms, weight * x / sqrt(mean(x^2) + eps): on a GPU in one
    kernel, which keeps no copies for backward, where transformers' code makes six of float32 and
    eight of bfloat16. Norms that are written otherwise (Gemma's, LayerNorm) stay as they are."""
    for module in lm.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(rms_norm, module)


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def spare_unread(decoder: nn.Module) -> None:
    """Let the MLP of a decoder's last layer, the larger part of it, leave out those tokens of a
    packed row whose hidden states nobody reads: all of a prompt but its last one."""
    last = getattr(decoder, "layers", [None])[-1]
    if hasattr(last, "mlp"):
        last.mlp.read = None
        last.forward = MethodType(forward_as_read, last)
        last.mlp.forward = MethodType(forward_where_read, last.mlp)


def forward_as_read(layer: nn.Module, *args, **kwargs) -> Tensor:
    layer.mlp.read = getattr(kwargs.get("shared"), "read", None)  # only a row has unread tokens
    return type(layer).forward(layer, *args, **kwargs)


def forward_where_read(mlp: nn.Module, x: Tensor) -> Tensor:
    forward, read = type(mlp).forward, mlp.read
    if read is None:
        return forward(mlp, x)
    return torch.zeros_like(x).index_copy(1, read, forward(mlp, x.index_select(1, read)))


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
        fuse_norms(lm)
        spare_unread(lm.base_model)

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
