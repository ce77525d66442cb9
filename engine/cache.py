"""The keys and values that sampling needs: each prompt's once, and each response's own.

A step adds a token to every response under way. Its attention is two parts, merged (attention.py):
over the prompt, where all responses of a group ask as one matrix, and over the response's own
tokens. Caches have room to spare, and the kernels are told how far each is filled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache

from engine.attention import Spans, gpu_options, merge_outputs, on_gpu

CHUNK = 256  # tokens by which the room for responses grows


@dataclass(frozen=True)
class Filled:
    """B caches [B, room, H_kv, D], of which the first lengths[b] tokens are there to be seen."""

    lengths: Tensor  # [B] int32
    cumulative: Tensor  # [B + 1] int32: where each begins, if they stand one behind the other
    mask: Tensor | None  # [B, 1, 1, width]: what to add to the scores, where a kernel needs it
    width: int  # the longest
    window: int | None  # how many of the last tokens are seen; None: all

    @classmethod
    def of(cls, lengths: Tensor, width: int, room: int, window: int | None = None) -> "Filled":
        begin = room * torch.arange(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
        mask = None
        if not on_gpu(lengths):
            places = torch.arange(width)
            hidden = places >= lengths[:, None]
            if window:
                hidden |= places < lengths[:, None] - window
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]
        return cls(lengths, begin, mask, width, window)


@dataclass(frozen=True)
class Kept:
    """A layer's keys and values of B prompts or responses, and the views of them that the kernels
    want. They are made once: a view costs the host as much as a small kernel."""

    kv: list[Tensor]  # k and v, each [B, room, H_kv, D]
    flat: list[Tensor]  # each [B * room, H_kv, D]
    by_heads: list[Tensor]  # each [B, H_kv, room, D]

    @classmethod
    def of(cls, kv: list[Tensor]) -> "Kept":
        flat = [x.view(-1, *x.shape[2:]) for x in kv]
        return cls(kv, flat, [x.transpose(1, 2) for x in kv])


class SharedCache:
    """The keys and values of S prompts, and of the R responses under way to them.

    Layers with a sliding window see little of a prompt: there each response keeps a copy of its
    prompt's end in front of its own tokens, and the prompt itself is not kept. The host knows all
    lengths, and makes every index of a step once, for all layers.
    """

    def __init__(self, max_new_tokens: int, device: torch.device):
        self.max_new_tokens, self.device = max_new_tokens, device
        self.windows: list[int | None] = []  # per layer
        self.prompts_kept: list[Kept] = []  # per layer, of [S, P, H_kv, D]
        self.own_kept: list[Kept] = []  # per layer, of [R, W, H_kv, D]
        self.prompt_len = np.zeros(0, np.int64)  # [S]
        self.own_len = np.zeros(0, np.int64)  # [R]
        self.slot = np.zeros(0, np.int64)  # [R]: each response's prompt; rising

    def add(self, read: DynamicCache, size: int, samples: int) -> None:
        """Take in a prompt of `size` tokens, which `read` holds, and its responses."""
        self.slot = np.append(self.slot, np.full(samples, len(self.prompt_len)))
        self.prompt_len = np.append(self.prompt_len, size)
        self.own_len = np.append(self.own_len, np.zeros(samples, np.int64))
        # One layer at a time, here and below, so that never more than one is there twice.
        for i, layer in enumerate(read.layers):
            window = getattr(layer, "sliding_window", None)
            kv = [x.transpose(1, 2) for x in (layer.keys, layer.values)]  # [1, P, H_kv, D]
            own = [(x if window else x[:, :0]).expand(samples, -1, -1, -1) for x in kv]
            prompt = [x[:, :0] if window else x for x in kv]
            if i == len(self.windows):
                self.windows.append(window)
                self.prompts_kept.append(Kept.of([x.contiguous() for x in prompt]))
                self.own_kept.append(Kept.of([x.contiguous() for x in own]))
            else:
                self.prompts_kept[i] = Kept.of(stack(self.prompts_kept[i].kv, prompt))
                self.own_kept[i] = Kept.of(stack(self.own_kept[i].kv, own))
        self.place_rows()

    def keep(self, rows: list[int]) -> None:
        """Drop all other responses, and the prompts that no response is left of."""
        slots, self.slot = np.unique(self.slot[rows], return_inverse=True)
        self.own_len, self.prompt_len = self.own_len[rows], self.prompt_len[slots]
        stay, used = self.on_device(rows), self.on_device(slots)
        longest = int(self.prompt_len.max(initial=0))
        for i, (prompts, own) in enumerate(zip(self.prompts_kept, self.own_kept)):
            prompts = [x[:, :longest].index_select(0, used) for x in prompts.kv]
            self.prompts_kept[i] = Kept.of(prompts)
            self.own_kept[i] = Kept.of([x.index_select(0, stay) for x in own.kv])
        self.place_rows()

    def on_device(self, values: Sequence, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=dtype).to(self.device)

    def place_rows(self) -> None:
        """What holds until responses come or go: which of them belong to which prompt."""
        self.counts = np.bincount(self.slot, minlength=len(self.prompt_len))
        width = int(self.prompt_len.max(initial=0))
        self.prompts = Filled.of(self.on_device(self.prompt_len, torch.int32), width, width)
        self.made: dict[tuple, tuple] = {}  # by `spans` and `places`

    def begin_step(self) -> tuple[Tensor, Tensor]:
        """Make room for one more token per response: (the positions [R, 1] at which they stand, how
        many tokens each response holds already [R])."""
        self.own: dict[int | None, tuple[Tensor, Filled]] = {}  # by window
        rows, own_len = np.arange(len(self.slot)), self.own_len
        # A response that is done may linger, and goes on at its last place.
        own_len = np.minimum(own_len, self.max_new_tokens - 1)
        for window in set(self.windows):
            tail = np.minimum(self.prompt_len[self.slot], window - 1) if window else 0 * rows
            at = tail + own_len
            room = self.make_room(window, int(at.max()) + 1, int(tail.max()) + self.max_new_tokens)
            cells, lengths = self.on_device([rows * room + at, at + 1])
            self.own[window] = cells, Filled.of(lengths.int(), int(at.max()) + 1, room, window)
        positions, held = self.on_device([self.prompt_len[self.slot] + own_len, own_len])
        return positions[:, None], held

    def make_room(self, window: int | None, width: int, most: int) -> int:
        """Let the own caches of layers with this window hold `width` tokens; how many they hold."""
        layers = [i for i, other in enumerate(self.windows) if other == window]
        room = self.own_kept[layers[0]].kv[0].shape[1]
        if width <= room:
            return room
        larger = min(-(-width // CHUNK) * CHUNK, most)
        for i in layers:
            pad = (0, 0, 0, 0, 0, larger - room)
            self.own_kept[i] = Kept.of([F.pad(x, pad) for x in self.own_kept[i].kv])
        return larger

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """One new token per response: q [R, H, 1, D], k and v [R, H_kv, 1, D] -> [R, 1, H, D]."""
        cells, filled = self.own[window]
        own, prompt = self.own_kept[layer], None if window else self.prompts_kept[layer]
        for cache, new in zip(own.flat, (k, v)):
            cache.index_copy_(0, cells, new.squeeze(2))
        q = q.reshape(len(q), k.shape[1], -1, q.shape[3])  # [R, H_kv, group, D]
        attend = self.attend_on_gpu if on_gpu(q) else self.attend_on_cpu
        return attend(q, own, filled, prompt, scale).flatten(1, 2).unsqueeze(1)

    def attend_on_gpu(
        self, q: Tensor, own: Kept, filled: Filled, prompt: Kept | None, scale: float
    ) -> Tensor:
        """One kernel a part. q [R, H_kv, group, D], and so the output."""
        if prompt is None:
            o, _ = flash_filled(q.flatten(1, 2), own, self.spans(False, 1), filled, scale)
            return o.view_as(q)
        # The query heads of one key head see the same keys: they become rows of one matrix.
        group = q.shape[2]
        q = q.transpose(1, 2).flatten(0, 1)  # [R * group, H_kv, D]
        o, lse = flash_filled(q, own, self.spans(False, group), filled, scale)
        o_p, lse_p = flash_filled(q, prompt, self.spans(True, group), self.prompts, scale)
        o = merge_outputs(o, lse.T, o_p, lse_p.T)
        return o.unflatten(0, (-1, group)).transpose(1, 2)

    def attend_on_cpu(
        self, q: Tensor, own: Kept, filled: Filled, prompt: Kept | None, scale: float
    ) -> Tensor:
        """As `attend_on_gpu`. The CPU's kernel takes matrices of one size, and masks."""
        keys_and_values = (x[:, :, : filled.width] for x in own.by_heads)
        o, lse = flash_masked(q, *keys_and_values, filled, scale)
        if prompt is not None:
            there, back = self.places(*q.shape[1:3])
            asked = q.view(-1, q.shape[3]).index_select(0, there)
            asked = asked.view(len(self.counts), q.shape[1], -1, q.shape[3])
            o_p, lse_p = flash_masked(asked, *prompt.by_heads, self.prompts, scale)
            o_p = o_p.flatten(0, 2).index_select(0, back).view_as(o)
            lse_p = lse_p.flatten().index_select(0, back).view_as(lse)
            o = merge_outputs(o, lse, o_p, lse_p)
        return o

    def spans(self, by_prompt: bool, group: int) -> Spans:
        """How many queries each response has, or all those of a prompt."""
        if (by_prompt, group) not in self.made:
            counts = self.counts if by_prompt else np.ones_like(self.slot)
            self.made[by_prompt, group] = Spans.of((counts * group).tolist(), self.device)
        return self.made[by_prompt, group]

    def places(self, key_heads: int, group: int) -> tuple[Tensor, Tensor]:
        """Where in q [R, H_kv, group, D] each query of one matrix a prompt, [S, H_kv, G * group,
        D], comes from (smaller groups are filled up with others), and where each goes."""
        if (key_heads, group) in self.made:
            return self.made[key_heads, group]
        first, most = np.cumsum(self.counts) - self.counts, int(self.counts.max())
        row = np.minimum(first[:, None] + np.arange(most), len(self.slot) - 1)  # [S, G]
        head, query = np.arange(key_heads)[:, None], np.arange(group)
        there = (row[:, None, :, None] * key_heads + head[..., None]) * group + query
        place = np.arange(len(self.slot)) - first[self.slot]  # in its group
        back = (self.slot[:, None] * key_heads + head.T) * most + place[:, None]
        back = back[..., None] * group + query
        self.made[key_heads, group] = self.on_device(there.ravel()), self.on_device(back.ravel())
        return self.made[key_heads, group]


def flash_filled(
    q: Tensor, kept: Kept, queries: Spans, filled: Filled, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of stretches of queries q [N, H, D], each to what is filled of its cache: o
    [N, H, D], lse [H, N]. GPU."""
    spans = (queries.cumulative, filled.cumulative, queries.longest, kept.kv[0].shape[1])
    o, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(q, *kept.flat, *spans, 0.0, False, False),
        **gpu_options(scale, filled.window),
        seqused_k=filled.lengths,
    )
    return o, lse


def flash_masked(
    q: Tensor, k: Tensor, v: Tensor, filled: Filled, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of B matrices of queries q [B, H_kv, Q, D], each to what is filled of its keys and
    values [B, H_kv, width, D]: o [B, H_kv, Q, D], lse [B, H_kv, Q]. CPU."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=filled.mask, scale=scale
    )


def stack(old: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
    """Concatenate two [N, length, H, D] pairs of keys and values, padded to the longer."""
    longest = max(old[0].shape[1], new[0].shape[1])
    return [
        torch.cat([F.pad(x, (0, 0, 0, 0, 0, longest - x.shape[1])) for x in pair])
        for pair in zip(old, new)
    ]
