"""One process or many: the process group, sharded weights (PyTorch's FSDP2), saving.

A single `python grpo.py` is a group of one, so that there is one way through the code.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedTokenizerBase

from shared_prompt import Policy


@contextmanager
def processes() -> Iterator[torch.device]:
    """Join the processes that torchrun started, or be the only one; yields this one's device."""
    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.is_available():
        backend, device = "nccl", torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
        dist.barrier()  # none leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def all_reduce(values: Sequence[float], device: torch.device, op=dist.ReduceOp.SUM) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op)
    return tensor.tolist()


def all_gather(thing: Any) -> list[Any]:
    """Every process's thing, in the order of the ranks."""
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def balanced(costs: Sequence[float], parts: int) -> list[list[int]]:
    """The indices of costs in `parts` shares of about the same total: the costliest first, each to
    the share that has least so far (within 4/3 of the best split; Graham 1969). Where there are
    at least as many costs as parts, none is empty."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    totals = [0.0] * parts
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = min(range(parts), key=lambda part: (totals[part], len(shares[part])))
        shares[least].append(index)
        totals[least] += costs[index]
    return [sorted(share) for share in shares]


def compute_dtype(device: torch.device) -> torch.dtype:
    """What weights are rounded to for computing; they are kept in float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def shard(policy: Policy, device: torch.device) -> Policy:
    """Split the weights over all processes. They are kept, and gradients summed, in float32."""
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype(device), reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in policy.lm.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    return fully_shard(policy, mesh=mesh, mp_policy=precision)


@contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """Inside, every process holds the whole weights, and a pass needs no other process: each may
    sample as long as it likes."""
    shards = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            # The root is needed again as backward begins; FSDP's default keeps it, too.
            module.set_reshard_after_forward(module is not policy, recurse=False)
            module.reshard()


def save(policy: Policy, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write the model in Hugging Face form, in the precision it computes with."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy, options=options)
    if dist.get_rank() == 0:
        dtype = compute_dtype(next(policy.parameters()).device)
        weights = {k.removeprefix("lm."): w.to(dtype) for k, w in weights.items()}
        policy.lm.save_pretrained(path, state_dict=weights)
        tokenizer.save_pretrained(path)
    dist.barrier()
