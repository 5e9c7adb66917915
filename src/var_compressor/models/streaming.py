"""A transformer whose blocks stay in their files and are read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from var_compressor.models.checkpoint import mapped_tensors
from var_compressor.models.directory import meta_transformer, read_transformer_config
from var_compressor.models.tensor_files import TensorSource, open_tensors
from var_compressor.models.transformer import Block, Infinity


class StreamedBlocks(Sequence[Block]):
    """The blocks of a model directory: one is read when it is asked for, the next ahead of time.

    Nothing is kept: who lets go of a block gives its memory back.
    """

    def __init__(self, source: TensorSource, model: Infinity, device: torch.device) -> None:
        self.source, self.device = source, device
        self.config, self.dtype = model.config, model.block_dtype
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return self.config.depth

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | Sequence[Block]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._ahead is None or self._ahead[0] != index:
            self._ahead = (index, self._reader.submit(self._read, index))
        tensors = self._ahead[1].result()
        following = (index + 1) % len(self)
        self._ahead = (following, self._reader.submit(self._read, following))
        with torch.device("meta"):
            block = Block(self.config)
        if self._stream is not None:
            # they were allocated on another stream than the one that will use them
            for tensor in tensors.values():
                tensor.record_stream(torch.cuda.current_stream(self.device))
        block.load_state_dict(tensors, assign=True)
        return block.requires_grad_(False).eval()

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(len(self)))

    def _read(self, index: int) -> dict[str, Tensor]:
        prefix = f"blocks.{index}."
        names = [name for name in self.source.names() if name.startswith(prefix)]
        with torch.cuda.stream(self._stream):
            tensors = {
                name.removeprefix(prefix): self.source.read(name, self.dtype).to(self.device)
                for name in sorted(names)
            }
        if self._stream is not None:
            self._stream.synchronize()
        return tensors


def load_streamed(
    directory: str | Path, *, dtype: torch.dtype, device: torch.device | str
) -> Infinity:
    """A transformer of which only what lies outside the blocks is in memory.

    Its ``blocks`` read themselves from the directory in ``dtype``, one at a time.
    Raises: CheckpointError when any tensor is missing, left over or mis-shaped.
    """
    folder = Path(directory) / "transformer"
    model = meta_transformer(read_transformer_config(folder), dtype)
    expected = model.state_dict()
    outside = [name for name in expected if not name.startswith("blocks.")]
    ordered = dict.fromkeys([*outside, *expected])
    source = open_tensors(folder)
    tensors = mapped_tensors(expected, source, {name: (name,) for name in ordered})
    state = {name: tensor.to(device) for name, tensor in islice(tensors, len(outside))}
    del model.blocks
    model.load_state_dict(state, strict=True, assign=True)
    model.blocks = StreamedBlocks(source, model, torch.device(device))  # type: ignore[assignment]
    return model.requires_grad_(False).eval()
