"""From the original's `.pt` files to an artifact of ours, block by block, everything accounted for.

Shapes: N output and K input channels, R rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from var_compressor.artifact import (
    TRANSFORMER_FILE,
    Manifest,
    artifact_writer,
    put_kv,
)
from var_compressor.interop import kv_quant_calib
from var_compressor.interop.original import (
    FILES,
    KEY_BIASES,
    MODEL,
    PLACES,
    RECIPE,
    TWINS,
    MismatchError,
    OriginalFiles,
    Problems,
    Subset,
    open_files,
    patched_names,
)
from var_compressor.interop.recovery import (
    Stored,
    branch_of,
    recover,
    smooth_factors,
)
from var_compressor.interop.stored_spec import checked_spec
from var_compressor.layers.kv_params import CacheParams, fingerprint, params_to_tensors
from var_compressor.layers.linear import (
    QuantizedLinear,
    linear_specs,
    swap_linears,
)
from var_compressor.models.checkpoint import block_name, mapped_tensors
from var_compressor.models.config import InfinityConfig, config_to_dict
from var_compressor.models.directory import meta_transformer, read_transformer_config, resolve
from var_compressor.models.inspection import sha256_of
from var_compressor.models.tensor_files import TensorSource, open_tensors
from var_compressor.models.transformer import Block
from var_compressor.quant.calibration import Progress
from var_compressor.quant.linear import snr_db
from var_compressor.quant.ptq import describe_base
from var_compressor.recipe import Recipe, load_recipe, split_arguments
from var_compressor.spec import LinearSpec, QuantSpec

# the original reads every input signed, and has one rule: keys and values of the text as they are
_AS_THE_ORIGINAL = "quant.act.allow_unsigned=false"
# rounding to 4 bits leaves 20 dB and more; another model's weights leave -3
LEAST_SNR_DB = 6.0
# codes that may be off before a weight counts as one that was never on the grid
_MOST_AMBIGUOUS = 0.01
# of a base whose weights were stored in bfloat16
_BASE_TOLERANCE = 2.0**-7


@dataclass(frozen=True)
class Imported:
    """What became of each linear, as the report has it, and whether a KV cache came along."""

    manifest: Manifest
    blocks: list[list[dict[str, Any]]]
    has_kv: bool


def settings_of(folder: Path, words: list[str]) -> Recipe:
    """How inputs are read: as our export's recipe says, or the original's way; then ``words``."""
    paths, overrides = split_arguments(words)
    beside = folder / RECIPE
    if beside.is_file():
        return load_recipe([beside, *paths], overrides)
    return load_recipe(paths, [_AS_THE_ORIGINAL, *overrides])


def import_artifact(
    folder: Path,
    base: str,
    out: Path,
    recipe: Recipe,
    *,
    on_progress: Progress = lambda stage, done, total: None,
) -> Imported:
    """Turn a directory of the original's files into the artifact ``out``, which refers to ``base``.

    A run that was cut off goes on when it is called again.
    Raises: ValueError naming every mismatch of names, shapes, formats and values.
    """
    config = read_transformer_config(resolve(base) / "transformer")
    files = open_files(folder, needs_smooth=recipe.quant.smooth.enabled)
    spec = checked_spec(files, config, recipe)
    kv = _read_kv(folder, config)
    read = [folder / name for name in (*FILES, KEY_BIASES)]
    hashes = {path.name: sha256_of(path) for path in read if path.is_file()}
    manifest = Manifest(
        config=config_to_dict(config),
        base=describe_base(base),
        spec=spec.to_dict(),
        calibration={"imported": hashes},
        files={},
    )
    was_there = out.exists()
    try:
        return _written(files, config, manifest, out, kv, on_progress)
    except MismatchError:
        # what does not fit will not fit next time
        if not was_there:
            shutil.rmtree(out, ignore_errors=True)
        raise


@dataclass(frozen=True)
class _KV:
    path: Path
    params: CacheParams


def _read_kv(folder: Path, config: InfinityConfig) -> _KV | None:
    """The ranges beside the other files, under either name.

    Raises: ValueError when both are there, or the file is not of this model.
    """
    found = [path for name in kv_quant_calib.SPELLINGS if (path := folder / name).is_file()]
    if len(found) > 1:
        raise MismatchError(f"{folder}: has {found[0].name} and {found[1].name}; take one away")
    return _KV(found[0], kv_quant_calib.read(found[0], config)) if found else None


def _written(
    files: OriginalFiles,
    config: InfinityConfig,
    manifest: Manifest,
    out: Path,
    kv: _KV | None,
    on_progress: Progress,
) -> Imported:
    importer = _Importer(files, config, QuantSpec.from_dict(manifest.spec), manifest.base["source"])
    with artifact_writer(out, manifest.to_json()) as writer:
        for index in range(config.depth):
            if not writer.has_block(index):
                block, linears = importer.block(index)
                # the other blocks are looked at all the same, to name whatever does not fit
                if not importer.problems.lines():
                    writer.put_block(index, block.state_dict(), {"linears": linears})
            on_progress("importing", index + 1, config.depth)
        outside = importer.outside()
        importer.problems.raise_any(str(files.folder))
        writer.put_tensors(TRANSFORMER_FILE, outside)
        blocks = [writer.report(index)["linears"] for index in range(config.depth)]
        manifest = writer.finish(manifest, config.depth)
    if kv is not None:
        told = {
            "format": asdict(kv.params.format),
            "layers": list(importer.fingerprints()),
            "calibration": {"imported": {kv.path.name: sha256_of(kv.path)}},
        }
        manifest = put_kv(out, params_to_tensors(kv.params), told)
    return Imported(manifest, blocks, kv is not None)


# --- block by block -------------------------------------------------------------------------------


class _Importer:
    """Makes our blocks; what turns out not to fit is gathered in ``problems``."""

    def __init__(
        self, files: OriginalFiles, config: InfinityConfig, spec: QuantSpec, base: str
    ) -> None:
        self.files, self.config, self.spec = files, config, spec
        self.names = patched_names(config)
        self.base = open_tensors(resolve(base) / "transformer")
        self.problems = Problems()

    def block(self, index: int) -> tuple[Block, list[dict[str, Any]]]:
        """A block in float32 with its quantized linears, and what was found of them."""
        with torch.device("meta"):
            block = Block(self.config)
        specs = linear_specs(self.spec, block, index)
        ours = f"blocks.{index}."
        plain = {
            name: tensor
            for name, tensor in block.state_dict().items()
            if name.removesuffix(".weight") not in specs
        }
        found = self._plain({ours + name: tensor for name, tensor in plain.items()})
        self._check_twins(index)
        swap_linears(block, specs)
        state = {name.removeprefix(ours): tensor for name, tensor in found.items()}
        reports = []
        for name, spec in specs.items():
            linear, report = self._linear(index, name, spec, state[f"{name}.bias"])
            reports.append(report)
            state |= {f"{name}.{key}": tensor for key, tensor in linear.state_dict().items()}
        block.load_state_dict(state, assign=True)
        return block, reports

    def outside(self) -> dict[str, Tensor]:
        """Everything around the blocks."""
        expected = meta_transformer(self.config, torch.float32).state_dict()
        return self._plain({n: t for n, t in expected.items() if not n.startswith("blocks.")})

    def fingerprints(self) -> Iterator[dict[str, Any]]:
        """What a KV cache's manifest says of the layers."""
        for index in range(self.config.depth):
            with torch.device("meta"):
                block = Block(self.config)
            name = f"blocks.{index}.ada_offset"
            block.ada_offset = nn.Parameter(self._plain({name: block.ada_offset})[name])
            yield {"layer": index, "block": fingerprint(block)}

    def _plain(self, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that are not quantized; all must be those of the base."""
        names = {name: self.names[name] for name in expected}
        parts = {part for found in names.values() for part in found}
        source = Subset(self.files.model, parts, self.files.key_biases)
        # copied, because what is read stays mapped to the file
        found = {
            name: tensor.detach().clone()
            for name, tensor in mapped_tensors(expected, source, names)
        }
        for name, tensor in found.items():
            self._check_against_base(name, tensor)
        return found

    def _check_against_base(self, name: str, tensor: Tensor) -> None:
        index, local = _split(name)
        if not bool(tensor.isfinite().all()):
            self.problems.add(f"{MODEL}: {local} holds NaN or infinity", index)
            return
        known = _read_base(self.base, name)
        if known is None or known.shape != tensor.shape:
            shape = "nothing" if known is None else list(known.shape)
            self.problems.add(f"the base has {shape} for {local}", index)
        elif not torch.allclose(tensor, known, rtol=_BASE_TOLERANCE, atol=1e-6):
            worst = float((tensor - known).abs().max())
            self.problems.add(f"{local} is not the base's", index, f"differs by up to {worst:.3g}")

    def _check_twins(self, index: int) -> None:
        model, block = self.files.model, block_name(self.config, index)
        for twin, kept in TWINS.items():
            for kind in ("weight", "bias"):
                names = [f"{block}.{one}.{kind}" for one in (twin, kept)]
                if names[0] not in model.names():
                    continue
                one, other = (model.read(name, torch.float32) for name in names)
                if not torch.equal(one, other):
                    self.problems.add(f"{MODEL}: {twin}.{kind} and {kept}.{kind} differ", index)

    def _linear(
        self, index: int, name: str, spec: LinearSpec, bias_N: Tensor
    ) -> tuple[QuantizedLinear, dict[str, Any]]:
        files, place, block = self.files, PLACES[name], block_name(self.config, index)
        stored = Stored(spec.weight.format, spec.weight.group_size)
        weight, recovery = recover(files, block, place, stored)
        shape: tuple[int, int] = tuple(weight.codes_NK.shape)  # type: ignore[assignment]
        smooth_K = smooth_factors(files, block, place, shape[1])
        down_RK, up_NR = branch_of(files, block, place, shape)
        missing = spec.low_rank.rank - len(down_RK)
        scales_NG = weight.scales_NG
        if weight.tensor_scale is None:
            scales_NG = scales_NG.bfloat16().float()
        linear = QuantizedLinear.of(
            spec,
            replace(weight, scales_NG=scales_NG),
            smooth_factor_K=smooth_K,
            down_RK=nn.functional.pad(down_RK, (0, 0, 0, missing)),
            up_NR=nn.functional.pad(up_NR, (0, missing)),
            bias_N=bias_N,
        )
        whole_NK = weight.dequantize() + up_NR @ down_RK
        kept_NK = linear.residual() + linear.proj_up.float() @ linear.proj_down.float()
        report = {
            "name": name,
            "codes": asdict(recovery),
            # what storing scales and branch in bfloat16 costs
            "storage_snr_db": snr_db(whole_NK, kept_NK),
            "base_snr_db": self._base_snr_db(f"blocks.{index}.{name}.weight", whole_NK / smooth_K),
        }
        self._judge(index, name, report)
        return linear, report

    def _base_snr_db(self, name: str, weight_NK: Tensor) -> float:
        known = _read_base(self.base, name)
        if known is None or known.shape != weight_NK.shape:
            return float("-inf")
        return snr_db(known, weight_NK)

    def _judge(self, index: int, name: str, report: Mapping[str, Any]) -> None:
        codes = report["codes"]
        if not codes["num_ambiguous"] <= _MOST_AMBIGUOUS * codes["num_codes"]:
            share = codes["num_ambiguous"] / codes["num_codes"]
            self.problems.add(
                f"{name} is not on the grid of its scales: another run's, or never quantized",
                index,
                f"{100 * share:.0f} % of its codes",
            )
        elif not report["base_snr_db"] >= LEAST_SNR_DB:
            snr = report["base_snr_db"]
            self.problems.add(
                f"{name} is not the base's weight: another model, or files of several runs",
                index,
                f"{snr:.1f} dB",
            )


def _split(name: str) -> tuple[int | None, str]:
    """The block that one of our tensors is in, and its name there."""
    if not name.startswith("blocks."):
        return None, name
    _, index, local = name.split(".", 2)
    return int(index), local


def _read_base(base: TensorSource, name: str) -> Tensor | None:
    return base.read(name, torch.float32) if name in base.names() else None
