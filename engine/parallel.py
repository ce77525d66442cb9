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
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from settings import UserError

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
    """End this process at once, as a program ends on this error."""
    if isinstance(error, UserError | OSError):
        # torchrun lets those that end well do so, and itself ends as process 0 does.
        error = SystemExit(0 if getattr(error, "said_by_first", False) else str(error))
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


def say(*words: object, **how) -> None:
    """Print, on process 0 alone."""
    if dist.get_rank() == 0:
        print(*words, **how)


def all_reduce(values: Sequence[float], op=dist.ReduceOp.SUM) -> list[float]:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
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
    raised on all, so that none goes on alone (and process 0 says it for all)."""
    result, error = None, None
    try:
        result = work()
    except (OSError, ValueError) as failure:
        error = failure
    failures = [failure for failure in all_gather(error) if failure]
    if failures:
        failures[0].said_by_first = dist.get_rank() > 0
        raise failures[0]
    return result


def if_first(work: Callable[[], T]) -> T | None:
    """Do `work` on process 0 alone: its result there. OSError or ValueError is raised on all."""
    return together(lambda: work() if dist.get_rank() == 0 else None)


def from_first(work: Callable[[], T]) -> T:
    """`if_first`, and its result on all."""
    box = [if_first(work)]
    dist.broadcast_object_list(box)
    return box[0]


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
    """A signal asked the run to end. Like KeyboardInterrupt it is no Exception, so that
    no library takes it for an error of its own."""


class StopSignal:
    """SIGTERM, SIGHUP and SIGINT as a wish to stop, which each process hears at its own moment.

    While `at_once`, a signal raises Interrupted where the process stands. Otherwise it is noted,
    and where the processes next `check`, all raise it together. As a context it ends the program
    where Interrupted comes out of it.
    """

    def __init__(self):
        self.number, self.at_once = 0, True

    def __enter__(self) -> "StopSignal":
        heard = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        self.before = {number: signal.signal(number, self.hear) for number in heard}
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is Interrupted:
            if dist.get_rank() == 0:
                print(f"stopped by {signal.Signals(self.number).name}", file=sys.stderr)
            raise SystemExit(128 + self.number) from None

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
        the caller goes on to `check`."""
        try:
            self.at_once = True
            return None if self.number else work()
        except Interrupted:
            return None
        finally:
            self.at_once = False

    def check(self) -> None:
        """Raise Interrupted on all processes where any has heard a signal."""
        heard = int(all_reduce([self.number], dist.ReduceOp.MAX)[0])
        if heard:
            self.number = heard
            raise Interrupted
        # One that came while this process waited for the others is kept for the next time.


# ------------------------------------------------------------------------------- sharded weights


def shard(
    policy: nn.Module, device: torch.device, computing: torch.dtype = torch.float32
) -> nn.Module:
    """Split a policy's weights over all processes. They are kept as they are, computed with in
    `computing`, and their gradients summed in float32."""
    precision = MixedPrecisionPolicy(param_dtype=computing, reduce_dtype=torch.float32)
    policy.computing = computing
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in policy.lm.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    whole = fully_shard(policy, mesh=mesh, mp_policy=precision)
    for module in shards_of(whole):
        module.set_reshard_after_forward(not stays_gathered(module), recurse=False)
    return whole


def stays_gathered(module: FSDPModule) -> bool:
    """The embeddings and the head are needed again as backward begins; without one, never."""
    return hasattr(module, "computing") and any(p.requires_grad for p in module.parameters())


def shard_from_first(policy: nn.Module, device: torch.device, computing: torch.dtype) -> nn.Module:
    """`shard` a policy whose weights only process 0 holds (the others' are empty)."""
    weights = policy.state_dict() if dist.get_rank() == 0 else {}
    policy = shard(policy, device, computing)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(policy, weights, options=options)
    for buffer in policy.buffers():  # those that a state dict leaves out, too
        dist.broadcast(buffer, 0)
    policy.lm.generation_config = all_gather(policy.lm.generation_config)[0]
    return policy


@contextmanager
def gathered(policy: nn.Module) -> Iterator[None]:
    """Inside, every process holds the whole weights, and a pass needs no other process: each may
    sample as long as it likes."""
    for module in shards_of(policy):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards_of(policy):
            module.set_reshard_after_forward(not stays_gathered(module), recurse=False)
        reshard(policy)


def shards_of(policy: nn.Module) -> list[FSDPModule]:
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def reshard(policy: nn.Module) -> None:
    """Give back what a pass has gathered: only then are the parameters those that are trained."""
    for module in shards_of(policy):
        module.reshard()


def non_finite(model: torch.nn.Module) -> list[str]:
    """The names of the weights that hold a NaN or an infinity (of those on this process)."""
    local = ((n, getattr(p, "to_local", lambda p=p: p)()) for n, p in model.named_parameters())
    held = ((n, p.detach()) for n, p in local if p.numel())
    return [n for n, p in held if not torch.linalg.vector_norm(p, torch.inf).isfinite()]


SMALLER = {
    "loading": "take more processes, or --lora_rank 16 (only an adapter is trained), or --beta 0",
    "sampling": "lower --max_in_flight",
    "update": "lower --max_tokens_per_micro_batch",
}


@contextmanager
def explained(phase: str) -> Iterator[None]:
    """Where memory runs out inside, UserError that names the setting to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory ({phase}): {SMALLER[phase]}; what takes how much, grpo.py "
            f"--dry_run True tells\n{error}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU's, Python's own, or that of PyTorch's CPU allocator, which has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
