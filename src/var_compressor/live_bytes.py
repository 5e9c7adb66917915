"""How many bytes a computation holds at once, found without doing it: on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CONVOLUTION = torch.ops.aten.convolution.default


def peak_live_bytes(compute: Callable[[], object], *, conv_workspace: float) -> int:
    """The most bytes of tensors, made by ``compute``, that lived at the same time.

    Counts what PyTorch allocates, and of what its kernels allocate inside: nothing for attention,
    which is fused on a GPU, and for a convolution ``conv_workspace`` times its input and output.
    """
    with torch.no_grad(), _FusedAttention(), _LiveBytes(conv_workspace) as counter:
        compute()
    return counter.peak


class _LiveBytes(TorchDispatchMode):
    def __init__(self, conv_workspace: float) -> None:
        super().__init__()
        self.conv_workspace = conv_workspace
        self.live, self.peak = 0, 0
        self._seen: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not _is_among(tensor, args):
                self._add(tensor.untyped_storage())
        inside = 0.0
        if func is _CONVOLUTION:
            inside = self.conv_workspace * (args[0].nbytes + result.nbytes)
        self.peak = max(self.peak, self.live + round(inside))
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._seen:
            self.live += storage.nbytes()
            self._seen[key] = weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, num_bytes: int) -> None:
        del self._seen[key]
        self.live -= num_bytes


def _is_among(tensor: Tensor, arguments: Any) -> bool:
    """Whether a result is a view of what was there before, or was written in place."""
    storage = tensor.untyped_storage()._cdata
    return any(
        isinstance(one, Tensor) and one.untyped_storage()._cdata == storage
        for one in tree_leaves(arguments)
    )


class _FusedAttention(TorchFunctionMode):
    """Attention that makes its output alone, as the fused kernels of a GPU do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))
