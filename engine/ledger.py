"""What a computation takes of memory, of arithmetic and of the network, counted as it runs."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
COLLECTIVES = {"_allgather_base_", "_reduce_scatter_base_"}


class Ledger(TorchDispatchMode):
    """The bytes that are alive, by kind, and the most there were; operations, and bytes received.

    A kind is what a tensor was made as, or has been named since.
    """

    def __init__(self):
        super().__init__()
        self.kind, self.flops, self.received = "activations", 0, 0
        self.held: dict[int, tuple[str, int]] = {}  # by storage
        self.now: Counter[str] = Counter()
        self.peak: dict[str, int] = {}

    def __enter__(self) -> "Ledger":
        # FSDP gives weights back by emptying their storage, below what is dispatched.
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            self.rename(storage, "gathered weights")
            resize(storage, size)
            self.note(storage, "gathered weights")
            return storage

        self.resizing = patch.object(torch.UntypedStorage, "resize_", resized)
        self.resizing.start()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        self.resizing.stop()
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                kind = "gathered weights" if "all_gather" in name else self.kind
                self.note(own_part(leaf).untyped_storage(), kind)
        if name in PRODUCTS:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        if name in COLLECTIVES:
            sizes = [x.nbytes for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.received += max(sizes) - min(sizes)  # all but its own share
        return out

    def note(self, storage: torch.UntypedStorage, kind: str) -> None:
        """A storage was made, or has another size."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.held:
            self.held[key] = kind, 0
            weakref.finalize(storage, self.drop, key)
        kind, before = self.held[key]
        self.held[key] = kind, size
        self.now[kind] += size - before
        if size > before and self.now.total() > sum(self.peak.values()):
            self.peak = dict(self.now)

    def drop(self, key: int) -> None:
        kind, size = self.held.pop(key)
        self.now[kind] -= size

    def rename(self, storage: torch.UntypedStorage, kind: str) -> None:
        if storage._cdata in self.held:
            before, size = self.held[storage._cdata]
            self.held[storage._cdata] = kind, size
            self.now[before] -= size
            self.now[kind] += size

    def name(self, tensors: Iterable[Tensor], kind: str) -> None:
        """These, whether known or not, are of this kind."""
        for storage in (own_part(tensor).untyped_storage() for tensor in tensors):
            self.rename(storage, kind)
            self.note(storage, kind)

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        before, self.kind = self.kind, kind
        yield
        self.kind = before


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds: a sharded tensor's own storage pretends to the whole size."""
    return getattr(tensor, "_local_tensor", tensor)
