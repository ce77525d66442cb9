"""One process or many: the process group, signals, sharded weights (PyTorch's FSDP2).

A single `python grpo.py` is a group of one, so that there is one way through the code.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from shared_prompt import Policy

T = TypeVar("T")
# How long one process may wait for the others, who may still be sampling; a dead one ends all at
# once, through torchrun.
PATIENCE = timedelta(hours=2)


@contextmanager
def processes() -> Iterator[torch.device]:
    """Join the processes that torchrun started, or be the only one; yields this one's device.

    Where one of many fails, it says why first and then leaves without a word to the others, so
    that it neither waits for them nor lets their complaints come before its own; torchrun ends
    them.
    """
    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.is_available():
        backend, device = "nccl", torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
        dist.barrier()  # none leaves while another still talks to it
    except BaseException as error:
        if dist.get_world_size() > 1:
            leave(error)
        raise
    finally:
        dist.destroy_process_group()


def leave(error: BaseException) -> None:
    """End this process at once, as Python ends on this error."""
    code = error.code if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit):
        get_error_handler().record_exception(error)  # for torchrun's summary
        traceback.print_exception(error)
    elif isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


# ------------------------------------------------------------------------ talking to the others


def all_reduce(values: Sequence[float], device: torch.device, op=dist.ReduceOp.SUM) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op)
    return tensor.tolist()


def all_gather(thing: T) -> list[T]:
    """Every process's thing, in the order of the ranks."""
    things: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def together(work: Callable[[], T]) -> T:
    """Do `work` on this process; where it raises OSError or ValueError on any process, that is
    raised on all, so that none goes on alone."""
    result, error = None, None
    try:
        result = work()
    except (OSError, ValueError) as failure:
        error = failure
    failures = [failure for failure in all_gather(error) if failure]
    if failures:
        raise failures[0]
    return result


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


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C asked the run to end. Like KeyboardInterrupt it is no Exception, so that
    no library takes it for an error of its own."""


class StopSignal:
    """SIGTERM and SIGINT as a wish to stop, which each process hears at its own moment.

    While `at_once`, a signal raises Interrupted where the process stands. Otherwise it is noted,
    and where the processes next ask `agreed`, all learn of it together.
    """

    def __init__(self):
        self.number, self.at_once = 0, True

    def __enter__(self) -> "StopSignal":
        self.before = {n: signal.signal(n, self.hear) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def hear(self, number: int, frame) -> None:
        # torchrun repeats a Ctrl-C that the terminal has sent to all already; a person who
        # repeats one does not want to wait.
        if self.number and number == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        self.number = number
        if self.at_once:
            raise Interrupted

    def cut_short(self, work: Callable[[], T]) -> T | None:
        """work(), which a signal ends at once: None. It must not need the other processes, and
        the caller goes on to ask `agreed`."""
        try:
            self.at_once = True
            return None if self.number else work()
        except Interrupted:
            return None
        finally:
            self.at_once = False

    def agreed(self, device: torch.device) -> bool:
        """Whether any process has heard a signal."""
        self.number = int(all_reduce([self.number], device, dist.ReduceOp.MAX)[0])
        return self.number > 0


# ------------------------------------------------------------------------------- sharded weights


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


def scatter(policy: Policy, device: torch.device) -> Policy:
    """`shard` a policy whose weights only process 0 holds (the others' are empty)."""
    weights = policy.state_dict() if dist.get_rank() == 0 else {}
    policy = shard(policy, device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(policy, weights, options=options)
    for buffer in policy.buffers():  # those that a state dict leaves out, too
        dist.broadcast(buffer, 0)
    policy.lm.generation_config = all_gather(policy.lm.generation_config)[0]
    return policy


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
