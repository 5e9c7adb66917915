"""The `.pt` files of VAR-Compressor's original: what is in them under which name, and reading them.

    model.pt    the whole state dict; linears of blocks hold dequantized residuals, q, k, v apart
    scale.pt    {linear}.weight.scale.0 [out, 1, groups, 1] float32, {linear}.weight.zero 0
    smooth.pt   one vector per input; inputs are divided by it
    branch.pt   {linear: {"a.weight": [r, in], "b.weight": [out, r]}}, on divided inputs

Names begin with ``block_chunks.{i}.module.{j}``. q, k and v of an attention share one branch, in
cross-attention too, where q and k, v read different inputs: there both use the same ``a``.

Shapes: N output and K input channels, G groups, R rank, C embed_dim.

Source: deepcompressor as VAR-Compressor's commit a9f224d has it, checked against what it wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from var_compressor.artifact import read_tensors
from var_compressor.models.checkpoint import DERIVED, NameMap, block_name, transformer_names
from var_compressor.models.config import InfinityConfig
from var_compressor.models.tensor_files import (
    CheckpointError,
    TensorInfo,
    TensorSource,
    check_zip,
    is_plain,
    load_torch_zip,
    open_tensors,
)

MODEL, SCALE, SMOOTH, BRANCH = "model.pt", "scale.pt", "smooth.pt", "branch.pt"
FILES = (MODEL, SCALE, SMOOTH, BRANCH)
# written beside them by our export: the recipe, of which those files tell nothing, and the bias of
# cross-attention's keys, which the original does not have (it cancels in the softmax)
RECIPE, KEY_BIASES = "recipe.yaml", "key_biases.safetensors"
# in smooth.pt when it was saved from memory; a flag
_NO_FACTORS = "proj.fuse_when_possible"


@dataclass(frozen=True)
class Place:
    """Where one of our linears is: its parts, stacked by rows; whose factors and branch it uses.

    Its rows of a joint branch begin at ``first_row`` times embed_dim.
    """

    parts: tuple[str, ...]
    smooth: str
    branch: str
    first_row: int = 0


PLACES = {
    "self_attn.qkv": Place(("sa.to_q", "sa.to_k", "sa.to_v"), "sa.to_q", "sa.to_q"),
    "self_attn.proj": Place(("sa.proj",), "sa.proj", "sa.proj"),
    "cross_attn.q": Place(("ca.to_q",), "ca.to_q", "ca.to_q"),
    "cross_attn.kv": Place(("ca.to_k", "ca.to_v"), "ca.kv_smooth_scale", "ca.to_q", 1),
    "cross_attn.proj": Place(("ca.proj",), "ca.proj", "ca.proj"),
    "ffn.fc1": Place(("ffn.fc1",), "ffn.fc1", "ffn.fc1"),
    "ffn.fc2": Place(("ffn.fc2",), "ffn.fc2", "ffn.fc2"),
}
# biases that go by other names than their linear's parts; keys of cross-attention have none
_BIASES = {"cross_attn.kv": ("ca.zero_k_bias", "ca.to_v.bias")}
# entries that model.pt holds twice
TWINS = {"sa.to_out.0": "sa.proj", "ca.to_out.0": "ca.proj"}


def patched_names(config: InfinityConfig) -> NameMap:
    """Our tensor names and the ones in model.pt that each is made of."""
    names = transformer_names(config)
    for index in range(config.depth):
        theirs = block_name(config, index)
        for ours, place in PLACES.items():
            biases = _BIASES.get(ours, tuple(f"{part}.bias" for part in place.parts))
            for kind, parts in (
                ("weight", tuple(f"{part}.weight" for part in place.parts)),
                ("bias", biases),
            ):
                found = tuple(f"{theirs}.{part}" for part in parts)
                names[f"blocks.{index}.{ours}.{kind}"] = found
    return names


class MismatchError(CheckpointError):
    """Files that do not fit each other, or their base; the message names every mismatch."""


class Problems:
    """What does not fit, all of it; the same in several blocks is told once."""

    def __init__(self) -> None:
        self._found: dict[str, dict[int | None, str]] = {}

    def add(self, text: str, block: int | None = None, detail: str = "") -> None:
        self._found.setdefault(text, {})[block] = detail

    def lines(self) -> list[str]:
        lines = []
        for text, places in self._found.items():
            words = [text]
            if blocks := [block for block in places if block is not None]:
                words.append(f"in {_ranges(blocks)}")
            if detail := next(iter(places.values())):
                words.append(f"({detail})")
            lines.append(" ".join(words))
        return lines

    def raise_any(self, where: str) -> None:
        """Raises: MismatchError naming every one of them."""
        if lines := self.lines():
            things = "1 mismatch" if len(lines) == 1 else f"{len(lines)} mismatches"
            raise MismatchError(f"{where}: {things}: " + "; ".join(lines))


def _ranges(blocks: list[int]) -> str:
    """ "block 3", "blocks 0-3, 7"."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return f"{'block' if len(blocks) == 1 else 'blocks'} {', '.join(texts)}"


class Subset:
    """The tensors of a source whose names are given, and more that are not in it."""

    def __init__(
        self, source: TensorSource, names: Iterable[str], more: Mapping[str, Tensor]
    ) -> None:
        wanted = set(names)
        self._source = source
        self._more = {name: tensor for name, tensor in more.items() if name in wanted}
        self._names = (wanted & source.names()) | self._more.keys()
        self.where, self.files = source.where, source.files

    def names(self) -> set[str]:
        return self._names

    def info(self, name: str) -> TensorInfo:
        if name in self._more:
            tensor = self._more[name]
            return TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        return self._source.info(name)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        if name in self._more:
            return self._more[name].to(dtype)
        return self._source.read(name, dtype)


@dataclass(frozen=True)
class OriginalFiles:
    """The four files, opened: tensors of ``model`` are read one by one, the rest is small."""

    folder: Path
    model: TensorSource
    wscales: Mapping[str, Tensor]
    smooth: Mapping[str, Tensor]
    branch: Mapping[str, tuple[Tensor, Tensor]]
    key_biases: Mapping[str, Tensor]

    def scales_of(self, block: str, part: str) -> tuple[Tensor | None, Tensor | None]:
        """Scales of a linear's groups and, in NVFP4, of its whole weight; None where absent."""
        key = f"{block}.{part}.weight.scale"
        if f"{key}.1" in self.wscales:
            return self.wscales[f"{key}.1"], self.wscales.get(f"{key}.0")
        return self.wscales.get(f"{key}.0"), None

    def weight(self, block: str, part: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.model.read(f"{block}.{part}.weight", dtype).detach()

    def weight_dtype(self, block: str, part: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.model.info(f"{block}.{part}.weight").dtype)
        return dtype


def open_files(folder: Path, *, needs_smooth: bool) -> OriginalFiles:
    """Checksums first, then what is in the files.

    ``needs_smooth``: whether an empty smooth.pt is an error, which is what the original leaves in
    its output directory.
    Raises: CheckpointError naming every file that is missing or damaged.
    """
    problems = Problems()
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory; give the one with {', '.join(FILES)}")
    contents: dict[str, Any] = {}
    for name in FILES:
        try:
            contents[name] = _read_dict(folder / name)
        except CheckpointError as error:
            problems.add(str(error).removeprefix(f"{folder}/"))
    problems.raise_any(str(folder))
    for name in (SCALE, SMOOTH):
        kept = {key: value for key, value in contents[name].items() if key != _NO_FACTORS}
        contents[name] = _only_tensors(name, kept, problems)
    if needs_smooth and not contents[SMOOTH]:
        problems.add(
            f"{SMOOTH} is empty, as the original leaves it there: copy the one from the directory "
            "that it ran in, or give quant.smooth.enabled=false for a run without smoothing"
        )
    branches = _branches(contents[BRANCH], problems)
    beside, key_biases = folder / KEY_BIASES, {}
    if beside.is_file():
        key_biases = _only_tensors(KEY_BIASES, read_tensors(beside, "cpu"), problems)
    problems.raise_any(str(folder))
    model = open_tensors(folder / MODEL)
    return OriginalFiles(folder, model, contents[SCALE], contents[SMOOTH], branches, key_biases)


def _read_dict(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    check_zip(path)
    content = load_torch_zip(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dict")
    return {str(key): value for key, value in content.items()}


def _only_tensors(file: str, content: Mapping[str, Any], problems: Problems) -> dict[str, Tensor]:
    for key, value in content.items():
        _check_tensor(f"{file}: {key}", value, problems)
    return {key: value.detach().float() for key, value in content.items() if _is_numbers(value)}


def _branches(content: Mapping[str, Any], problems: Problems) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for key, value in content.items():
        parts = value if isinstance(value, dict) else {}
        if parts.keys() != {"a.weight", "b.weight"}:
            problems.add(f"{BRANCH}: {key} does not hold a.weight and b.weight")
            continue
        down_RK, up_NR = parts["a.weight"], parts["b.weight"]
        for name, tensor in parts.items():
            _check_tensor(f"{BRANCH}: {key}.{name}", tensor, problems)
        if _is_numbers(down_RK) and _is_numbers(up_NR):
            if down_RK.ndim != 2 or up_NR.ndim != 2 or down_RK.shape[0] != up_NR.shape[1]:
                shapes = f"{list(down_RK.shape)} and {list(up_NR.shape)}"
                problems.add(f"{BRANCH}: {key} has a and b of shapes {shapes}")
                continue
            found[key] = (down_RK.detach().float(), up_NR.detach().float())
    return found


def _is_numbers(value: Any) -> bool:
    return isinstance(value, Tensor) and is_plain(value) and value.is_floating_point()


def _check_tensor(where: str, value: Any, problems: Problems) -> None:
    if not _is_numbers(value):
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        problems.add(f"{where} is {kind}, expected a tensor of floats")
    # a view may pretend to be of any size; what is stored bounds what is read
    elif value.numel() * value.itemsize > value.untyped_storage().nbytes():
        problems.add(f"{where} claims {list(value.shape)}, more than is stored")
    elif not bool(value.isfinite().all()):
        problems.add(f"{where} holds NaN or infinity")


# --- what must be there ---------------------------------------------------------------------------


def check_names(files: OriginalFiles, config: InfinityConfig, problems: Problems) -> None:
    """Every name and sign in the files that a model of this shape does not have, or lacks."""
    blocks = [block_name(config, index) for index in range(config.depth)]

    def everywhere(names: Iterable[str]) -> set[str]:
        return {f"{block}.{name}" for name in names for block in blocks}

    def add(text: str, name: str) -> None:
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        index = None if block is None else blocks.index(block)
        problems.add(text.format(name.removeprefix(f"{block}.")), index)

    wanted = {part for parts in patched_names(config).values() for part in parts}
    # the bias of keys, which is 0: in cross-attention it is left out
    wanted -= everywhere(["ca.zero_k_bias"])
    twins = everywhere(f"{twin}.{kind}" for twin in TWINS for kind in ("weight", "bias"))
    parts = [part for place in PLACES.values() for part in place.parts]
    ends = ("scale.0", "scale.1", "zero")
    for file, present, known, needed in (
        (MODEL, files.model.names(), wanted | twins, wanted),
        (SCALE, files.wscales, everywhere(f"{p}.weight.{end}" for p in parts for end in ends), ()),
        (SMOOTH, files.smooth, everywhere(place.smooth for place in PLACES.values()), ()),
        (BRANCH, files.branch, everywhere(place.branch for place in PLACES.values()), ()),
        (KEY_BIASES, files.key_biases, everywhere(["ca.zero_k_bias"]), ()),
    ):
        for name in sorted(set(needed) - set(present)):
            add(f"{file} lacks {{}}", name)
        for name in sorted(set(present) - known):
            if not DERIVED.match(name):
                add(f"{file} has unknown {{}}", name)
    for name, factors in files.smooth.items():
        if not bool((factors > 0).all()):
            add(f"{SMOOTH}: {{}} is not positive", name)
    for name, wscales in files.wscales.items():
        if name.endswith(".zero"):
            if bool((wscales != 0).any()):
                add(f"{SCALE}: {{}} is not 0; only symmetric codes are read", name)
        # e4m3 scales of small groups underflow to 0
        elif not bool((wscales >= 0 if name.endswith(".scale.1") else wscales > 0).all()):
            add(f"{SCALE}: {{}} is not positive", name)
