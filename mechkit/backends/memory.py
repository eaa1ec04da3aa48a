"""How much fits in memory: measured, not guessed; and what to do when it did not.

1. Free memory is what the device says is free. On a CPU it is also what the container still allows, which the
   machine's own figure does not know.
2. What one variant takes is what one block puts out for it, added up over the block's operations: more than it holds
   at any moment.
3. Batches take at most half of what is free. The number of rows is a power of two, so that a little more or less free
   memory gives the same batches, and so the same numbers to the last bit.
4. A batch that does not fit after all is halved, and so are those after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import CapacityError

Result = TypeVar("Result")

# Beyond this many tokens on the batch axis, matrix products get no faster.
TOKENS_AT_ONCE = {"cpu": 3072, "mps": 1 << 15, "cuda": 1 << 16}
_NO_ROOM = ("out of memory", "can't allocate memory", "not enough memory")
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min([psutil.virtual_memory().available, *_container_rooms()])


def _container_rooms() -> Iterator[int]:
    for limit, used in _CGROUPS:
        try:
            yield max(0, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or no limit
            continue


def rows_at_once(row_bytes: int, tokens: int, device: torch.device) -> int:
    """How many variants to run side by side: a power of two.

    Args:
        row_bytes: what one of them takes.
        tokens: how many tokens one of them is.
        device: where they run.
    """
    useful = TOKENS_AT_ONCE.get(device.type, TOKENS_AT_ONCE["cuda"]) // max(1, tokens)
    return fitting(row_bytes, device, useful)


def fitting(each: int, device: torch.device, at_most: int) -> int:
    """How many things of ``each`` bytes fit in half of the free memory, a power of two, at least 1."""
    room = free_bytes(device) // 2 // max(1, each)
    return 1 << (max(1, min(at_most, room)).bit_length() - 1)


class OutputBytes(TorchDispatchMode):
    """While active, adds up the bytes of everything that operations put out, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_storage(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        new = [one for one in tree_leaves(out) if isinstance(one, Tensor) and _storage(one) not in given]
        self.total += sum(one.untyped_storage().nbytes() for one in new)
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def ran_out(error: BaseException) -> bool:
    """True when an error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_ROOM)


def in_batches(items: Tensor, rows: int, run: Callable[[Tensor], Result]) -> Iterator[tuple[Tensor, Result, int]]:
    """Run items batch by batch, halving the batches when memory runs out.

    Args:
        items: what to run; cut along its first axis.
        rows: how many at once.
        run: called with some of them.

    Yields:
        The items that ran, what came of them, and how many at once go on from here.

    Raises:
        CapacityError: a single item does not fit.
    """
    while len(items):
        some = items[:rows]
        try:
            result = run(some)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            if len(some) == 1:
                raise CapacityError(
                    f"Memory ran out on a single variant: {str(error).splitlines()[0]}",
                    fix="Take shorter or fewer prompts, or load the model with dtype=torch.float16",
                ) from error
            rows = 1 << ((len(some) + 1) // 2).bit_length() - 1
        else:
            items = items[rows:]
            yield some, result, rows
            continue
        if torch.cuda.is_available():  # outside the handler, whose traceback holds on to the tensors
            torch.cuda.empty_cache()
