"""Devices that there are not: tensors that say they are on one, and refuse to be mixed with those of another.

A model can so be spread over several devices where there is one. What is tested is where tensors are, as torch would
have it of GPUs: an operation takes those of one device, and single numbers and indices of the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

KIND = "lazy"  # torch knows the word, and has nothing behind it
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class Placed(Tensor):
    """A tensor of the CPU that says it is elsewhere."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device):
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self):
        return f"Placed({self.device}, {self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatched(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """While active, tensors can be made on such devices."""

    def __enter__(self):
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *how):
        torch._C._set_only_lift_cpu_tensors(self._before)
        return super().__exit__(*how)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _dispatched(func, args, kwargs or {})


def _dispatched(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with Pretend():
            return func.decompose(*args, **kwargs)
    leaves = tree_leaves((args, kwargs))
    given = [one for one in leaves if isinstance(one, Tensor)]
    devices = {one.device for one in given if one.ndim or one.device.type == KIND}
    if func in _INDEXING and args[0].device.type == KIND:
        devices -= {torch.device("cpu")}
    if len(devices) > 1 and func not in _COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} was given {devices}")
    asked = next((one for one in leaves if isinstance(one, torch.device)), None)
    target = asked or (args[0].device if func in _COPIES else next(iter(devices), torch.device("cpu")))

    def here(one: Any) -> Any:
        if isinstance(one, Placed):
            return one.inner
        return torch.device("cpu") if isinstance(one, torch.device) else one

    args, kwargs = tree_map(here, (args, kwargs))
    placed = {id(one.inner): one for one in given if isinstance(one, Placed)}  # what is changed in place stays itself

    def there(one: Any) -> Any:
        if not isinstance(one, Tensor) or target.type != KIND:
            return one
        return placed[id(one)] if id(one) in placed else Placed(one, target)

    return tree_map(there, func(*args, **kwargs))


def spread(model: Any, blocks: str) -> Any:
    """A Hub model on a device a block: its embedding with the first, its final norm and unembedding with the last.

    Inside ``Pretend``. Modules get the hooks of accelerate that a ``device_map`` gives them.
    """
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    where: dict[str, torch.device] = {}
    last = len(model.get_submodule(blocks)) - 1
    for name, module in model.named_modules():
        above = not name or blocks.startswith(name) or any(name.startswith(f"{one}.") for one in where)
        if above:
            continue
        if name.startswith(f"{blocks}."):
            where[name] = torch.device(KIND, int(name.rpartition(".")[2]))
        else:
            first = "emb" in name or name.endswith(("wte", "wpe")) or (module is head and tied)
            where[name] = torch.device(KIND, 0 if first else last)
    for name, device in where.items():
        for module in model.get_submodule(name).modules():
            for key, value in module._parameters.items():
                if value is not None and not isinstance(value, Placed):
                    moved = Placed(value.detach(), device)
                    module._parameters[key] = torch.nn.Parameter(moved, requires_grad=False)
            for key, value in module._buffers.items():
                module._buffers[key] = None if value is None else Placed(value, device)
    attach_align_device_hook_on_blocks(model, execution_device=where, offload=dict.fromkeys(where, False))
    return model
