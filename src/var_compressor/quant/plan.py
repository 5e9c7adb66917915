"""What a spec will do to a model, before any weight is read: which linears, how, and what it saves.

Sizes come from the modules themselves, built without storage, so they are those of the artifact.
Shapes: N output and K input channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from var_compressor.layers.linear import swap_linears
from var_compressor.models.config import InfinityConfig
from var_compressor.models.directory import meta_transformer
from var_compressor.quant.ptq import specs_by_block
from var_compressor.spec import MODULES, WHOLE_ROW, LinearSpec, QuantSpec

# of the model that is compressed, as a GPU holds it: blocks in bfloat16, the rest in float32
BLOCK_DTYPE = torch.bfloat16

_HEAD, _MODULATION = ("head_proj", "head_ada_proj"), ("ada_proj",)


@dataclass(frozen=True)
class LinearRow:
    """Linears of one kind that are treated alike.

    ``pattern`` is the name inside a block where all blocks agree, else it names the blocks;
    ``spec`` None leaves them at 16 bits. Bytes are of all ``num_linears`` together, with biases.
    """

    pattern: str
    num_linears: int
    shape_NK: tuple[int, int]
    spec: LinearSpec | None
    before_bytes: int
    after_bytes: int

    @property
    def saved_bytes(self) -> int:
        return self.before_bytes - self.after_bytes


@dataclass(frozen=True)
class KeptRow:
    """Tensors that stay as they are."""

    what: str
    dtype: str
    num_bytes: int


@dataclass(frozen=True)
class Plan:
    """All tensors of the transformer, each in exactly one row."""

    linears: tuple[LinearRow, ...]
    kept: tuple[KeptRow, ...]

    @property
    def before_bytes(self) -> int:
        return sum(row.before_bytes for row in self.linears) + self.kept_bytes

    @property
    def after_bytes(self) -> int:
        return sum(row.after_bytes for row in self.linears) + self.kept_bytes

    @property
    def kept_bytes(self) -> int:
        return sum(row.num_bytes for row in self.kept)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars."""
        linears = [asdict(row) | {"saved_bytes": row.saved_bytes} for row in self.linears]
        kept = [asdict(row) for row in self.kept]
        totals = {"before_bytes": self.before_bytes, "after_bytes": self.after_bytes}
        return {"linears": linears, "kept": kept, **totals}


def plan(spec: QuantSpec, config: InfinityConfig) -> Plan:
    """The plan of compressing a transformer of this shape.

    Raises: ValueError naming the linear whose formats, groups or rank cannot be had.
    """
    specs = specs_by_block(spec, config)
    # blocks are alike, so one stands for all
    model = meta_transformer(replace(config, depth=1, num_chunks=1), BLOCK_DTYPE)
    block = model.blocks[0]
    linears = []
    for name in MODULES:
        treatments: dict[LinearSpec | None, list[int]] = {}
        for index, block_specs in enumerate(specs):
            treatments.setdefault(block_specs.get(name), []).append(index)
        linears += [
            _linear_row(block, name, chosen, indices, config.depth)
            for chosen, indices in sorted(treatments.items(), key=lambda item: -len(item[1]))
        ]
    return Plan(tuple(linears), tuple(_kept_rows(model, config.depth)))


def _linear_row(
    block: nn.Module, name: str, spec: LinearSpec | None, indices: Sequence[int], depth: int
) -> LinearRow:
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    shape_NK = (linear.out_features, linear.in_features)
    after = linear if spec is None else _quantized(block, name, spec)
    where = name if len(indices) == depth else f"blocks.{_ranges(indices)}.{name}"
    before_bytes, after_bytes = (
        len(indices) * _num_bytes(module.state_dict().values()) for module in (linear, after)
    )
    return LinearRow(where, len(indices), shape_NK, spec, before_bytes, after_bytes)


def _quantized(block: nn.Module, name: str, spec: LinearSpec) -> nn.Module:
    """What takes the place of a linear, without storage."""
    swapped = deepcopy(block)
    swap_linears(swapped, {name: spec})
    return swapped.get_submodule(name)


def _kept_rows(model: nn.Module, depth: int) -> list[KeptRow]:
    """Everything but the linears of the blocks."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in model.state_dict().items():
        top, _, rest = name.partition(".")
        if top != "blocks":
            parts.setdefault(_outside_part(top), []).append(tensor)
        elif not rest.partition(".")[2].startswith(tuple(f"{linear}." for linear in MODULES)):
            parts.setdefault("norms, offsets in blocks", []).extend([tensor] * depth)
    return [
        KeptRow(what, str(tensors[0].dtype).removeprefix("torch."), _num_bytes(tensors))
        for what, tensors in parts.items()
    ]


def _outside_part(top: str) -> str:
    if top in _HEAD:
        return "head"
    return "shared modulation" if top in _MODULATION else "embeddings and text"


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _ranges(indices: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# --- for people -----------------------------------------------------------------------------------

COLUMNS = (
    *("linear", "count", "out × in", "weight", "rounding", "input", "rank", "smooth"),
    *("MiB before", "after", "saved"),
)


def table_rows(plan: Plan) -> list[tuple[str, ...]]:
    """The plan as lines of text under `COLUMNS`: linears, what stays, and the total last."""
    rows = [
        (
            *(row.pattern, str(row.num_linears), "{} × {}".format(*row.shape_NK)),
            *_treatment(row.spec),
            *_sizes(row.before_bytes, row.after_bytes),
        )
        for row in plan.linears
    ]
    rows += [
        (row.what, "", "", row.dtype, "", "", "", "", *_sizes(row.num_bytes, row.num_bytes))
        for row in plan.kept
    ]
    return [*rows, ("total", *[""] * 7, *_sizes(plan.before_bytes, plan.after_bytes))]


def _treatment(spec: LinearSpec | None) -> tuple[str, ...]:
    if spec is None:
        return ("16 bits", "", "16 bits", "", "")
    rounding = {"rtn": "nearest", "gptq": "gptq"}[spec.weight.rounding]
    return (
        f"{spec.weight.format} {_group(spec.weight.group_size)}",
        f"{rounding}, range" if spec.weight.range_search else rounding,
        f"{spec.act.format} {_group(spec.act.group_size)}" if spec.act.format else "16 bits",
        str(spec.low_rank.rank),
        "yes" if spec.smooth.enabled else "no",
    )


def _group(group_size: int) -> str:
    return "per row" if group_size == WHOLE_ROW else f"g{group_size}"


def _sizes(before_bytes: int, after_bytes: int) -> tuple[str, str, str]:
    saved = f"{1 - after_bytes / before_bytes:.0%}" if after_bytes != before_bytes else ""
    return f"{before_bytes / 2**20:.2f}", f"{after_bytes / 2**20:.2f}", saved
