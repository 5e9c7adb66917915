"""Which spec an original's files were made with: what they say, what a recipe says, and whether
both agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from var_compressor.interop.original import (
    MODEL,
    PLACES,
    OriginalFiles,
    Problems,
    Subset,
    check_names,
    patched_names,
)
from var_compressor.interop.recovery import Stored, check_linear
from var_compressor.layers.linear import check_runnable, resolved_group
from var_compressor.models.checkpoint import block_name
from var_compressor.models.config import InfinityConfig
from var_compressor.models.directory import meta_transformer
from var_compressor.recipe import Recipe
from var_compressor.spec import WHOLE_ROW, ActSpec, LinearSpec, ModuleRule, QuantSpec

# inputs are coded as weights are; 4-bit integers are the default
_ACTS = {"nvfp4": ActSpec("nvfp4", 16), "sint8": ActSpec("sint8", WHOLE_ROW)}


def checked_spec(files: OriginalFiles, config: InfinityConfig, recipe: Recipe) -> QuantSpec:
    """Raises: MismatchError naming everything that does not fit the model or the recipe."""
    problems, where = Problems(), str(files.folder)
    check_names(files, config, problems)
    problems.raise_any(where)
    shapes = _check_shapes(files, config, problems)
    problems.raise_any(where)
    found: dict[tuple[int, str], Stored | None] = {}
    ranks = {}
    for index in range(config.depth):
        for name, place in PLACES.items():
            block, shape = block_name(config, index), shapes[name]
            key = (index, name)
            found[key], ranks[key] = check_linear(files, block, place, shape, problems, index)
    spec = _spec_of(found, ranks, shapes, recipe, problems)
    problems.raise_any(where)
    return spec


def _check_shapes(
    files: OriginalFiles, config: InfinityConfig, problems: Problems
) -> dict[str, tuple[int, int]]:
    """Of every tensor that the model has; returns those of the linears."""
    expected = meta_transformer(config, torch.float32).state_dict()
    for ours, parts in patched_names(config).items():
        shape = expected[ours].shape
        needed = (shape[0] // len(parts), *shape[1:])
        for part in parts:
            source = Subset(files.model, [part], files.key_biases)
            if part not in source.names():
                continue
            found = source.info(part)
            is_longer = part == "cfg_uncond" and found.shape[0] >= needed[0]
            if not is_longer and found.shape != needed:
                problems.add(f"{MODEL}: {part} has shape {list(found.shape)}, not {list(needed)}")
            if not found.dtype.startswith(("float", "bfloat")):
                problems.add(f"{MODEL}: {part} is {found.dtype}, expected floats")
    names = {name: tuple(expected[f"blocks.0.{name}.weight"].shape) for name in PLACES}
    return names


def _spec_of(
    found: Mapping[tuple[int, str], Stored | None],
    ranks: Mapping[tuple[int, str], int],
    shapes: Mapping[str, tuple[int, int]],
    recipe: Recipe,
    problems: Problems,
) -> QuantSpec:
    """The recipe's spec with what the files say of weights; what they contradict is a problem."""
    kinds = Counter(stored for stored in found.values() if stored is not None)
    if not kinds:
        problems.add("scale.pt holds no scales: a run that did not quantize weights")
        return recipe.quant
    most, spec = kinds.most_common(1)[0][0], recipe.quant
    says = recipe.provenance.keys()
    weight = replace(
        spec.weight,
        format=spec.weight.format if "quant.weight.format" in says else most.format,
        group_size=spec.weight.group_size if "quant.weight.group_size" in says else most.group_size,
    )
    act = spec.act if "quant.act.format" in says else _ACTS.get(most.format, spec.act)
    rank = spec.low_rank.rank if "quant.low_rank.rank" in says else max(ranks.values())
    spec = replace(spec, weight=weight, act=act, low_rank=replace(spec.low_rank, rank=rank))
    if "quant.weight.format" not in says:
        rules = _rules_for_others(found, shapes, spec)
        spec = replace(spec, exceptions=(*rules, *spec.exceptions))
    for (index, name), stored in found.items():
        linear = spec.for_module(f"blocks.{index}.{name}")
        for text in _contradictions(stored, ranks[index, name], linear, shapes[name][1]):
            problems.add(f"{name} {text}", index)
    return spec


def _rules_for_others(
    found: Mapping[tuple[int, str], Stored | None],
    shapes: Mapping[str, tuple[int, int]],
    spec: QuantSpec,
) -> Iterator[ModuleRule]:
    """Exceptions for linears that are stored in another way than most."""
    odd: dict[tuple[str, Stored | None], list[int]] = {}
    for (index, name), stored in found.items():
        if not _is_stored_so(stored, spec.for_module(f"blocks.{index}.{name}"), shapes[name][1]):
            odd.setdefault((name, stored), []).append(index)
    num_blocks = 1 + max(index for index, _ in found)
    for (name, stored), blocks in odd.items():
        rule = spec.rule_for(name)
        act = None if rule is None else rule.act
        format = None if stored is None else stored.format
        patterns = [f"blocks.{i}.{name}" for i in blocks] if len(blocks) < num_blocks else [name]
        for pattern in patterns:
            yield ModuleRule(pattern, weight=format, act=act)


def _is_stored_so(stored: Stored | None, linear: LinearSpec | None, in_features: int) -> bool:
    if stored is None or linear is None:
        return (stored is None) == (linear is None)
    if stored.format != linear.weight.format:
        return False
    groups = [resolved_group(g, in_features) for g in (stored.group_size, linear.weight.group_size)]
    return groups[0] == groups[1]


def _contradictions(
    stored: Stored | None, rank: int, linear: LinearSpec | None, in_features: int
) -> Iterator[str]:
    if linear is None or stored is None:
        return
    if not _is_stored_so(stored, linear, in_features):
        yield (
            f"is {stored.format} in groups of {stored.group_size}, the recipe says "
            f"{linear.weight.format} in groups of {linear.weight.group_size}"
        )
    if rank > linear.low_rank.rank:
        yield f"has a branch of rank {rank}, the recipe says {linear.low_rank.rank}"
    try:
        check_runnable(linear)
        resolved_group(linear.act.group_size, in_features)
    except ValueError as error:
        yield f"cannot run: {error}"
