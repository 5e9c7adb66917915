"""Post-training quantization: a pipeline and prompts in, an artifact out, block after block.

The only file that knows the order of steps: record one generation per prompt, stream the blocks,
quantize every linear of a block, and commit the block to disk.

Source: SVDQuant, Li et al. 2024 (arXiv 2411.05007).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from var_compressor.artifact import (
    TRACE_FILE,
    TRANSFORMER_FILE,
    ArtifactWriter,
    Manifest,
    artifact_writer,
    block_file,
    read_tensors,
    write_json,
)
from var_compressor.layers.linear import (
    check_runnable,
    linear_specs,
    resolved_group,
    swap_linears,
)
from var_compressor.models import directory
from var_compressor.models.config import InfinityConfig, config_to_dict
from var_compressor.models.inspection import sha256_of
from var_compressor.models.transformer import Block
from var_compressor.ops.packing import packed_columns
from var_compressor.ops.primitives import FORMATS
from var_compressor.pipeline import InfinityPipeline
from var_compressor.quant.activations import ActivationStore, MemoryBounds, activation_store
from var_compressor.quant.calibration import (
    BlockStream,
    CalibrationTrace,
    Progress,
    RecordedInputs,
    TokenSample,
    collect_inputs,
    one_layer_cache,
)
from var_compressor.quant.inputs import BlockInputs, rows_kept_whole
from var_compressor.quant.linear import quantize_linear, seeded_generator
from var_compressor.quant.recording import (
    Collection,
    check_recordable,
    record,
    trace_of_cut_off_run,
    write_trace,
)
from var_compressor.quant.report import TIMING_FILE
from var_compressor.quant.team import SOLO, Team
from var_compressor.spec import MODULES, LinearSpec, QuantSpec


def quantize_model(
    pipeline: InfinityPipeline,
    collection: Collection,
    spec: QuantSpec,
    *,
    base: str,
    out: str | Path,
    on_progress: Progress = lambda stage, done, total: None,
    memory: MemoryBounds = MemoryBounds(),  # noqa: B008 - frozen
    team: Team = SOLO,
) -> Manifest:
    """Compress the transformer of ``pipeline`` into the directory ``out``.

    ``pipeline``: full precision, with plain blocks (``compute="reference"`` on a GPU), in any dtype
    and on any device; it is left as it is. ``collection``: the prompts to calibrate on and how
    their images are drawn, one generation each. ``spec``: number formats, branch, smoothing and
    rules; `QuantSpec` or a value of `PRESETS`. ``base`` is where the pipeline came from (a name or
    directory), which the artifact refers to for VAE and text encoder. A killed run is continued by
    the same call; ``on_progress`` gets (stage, done, total). Only one block at a time is on the
    device if the pipeline streams them. The same arguments give the same bytes on one machine.

    Returns the artifact's manifest; `load_artifact` opens the directory.
    Raises: ArtifactError when ``out`` holds something else, ValueError for a pipeline that is
    compressed already, or group sizes or a rank that do not fit a linear.
    Source: SVDQuant, Li et al. 2024 (arXiv 2411.05007).
    """
    if pipeline.is_compressed:
        raise ValueError(f"{base}: is compressed already; give the full-precision model")
    check_recordable(collection.sampling)
    model = pipeline.transformer
    specs = specs_by_block(spec, model.config)
    manifest = Manifest(
        config=config_to_dict(model.config),
        base=describe_base(base),
        spec=spec.to_dict(),
        calibration={**collection.to_dict(), "dtype": str(model.block_dtype).split(".")[1]},
        files={},
    )
    with (
        shared_writer(out, manifest.to_json(), team) as writer,
        torch.inference_mode(),
        activation_store(pipeline.device, memory, writer.folder) as store,
    ):
        run = _Run(pipeline, spec, specs, writer, team, store, on_progress)
        trace = run.trace(collection)
        run.quantize_blocks(trace)
        if not team.is_first:
            return manifest
        outside = {n: t for n, t in model.state_dict().items() if not n.startswith("blocks.")}
        writer.put_tensors(TRANSFORMER_FILE, outside)
        return writer.finish(manifest, len(specs))


@contextmanager
def shared_writer(
    out: str | Path, identity: dict[str, Any], team: Team
) -> Iterator[ArtifactWriter]:
    """The first process's writer; the others read what it has written, and wait for it here."""
    if not team.is_first:
        team.told_by_first(None)
        yield ArtifactWriter(Path(out))
        return
    with artifact_writer(out, identity) as writer:
        team.told_by_first(None)
        yield writer


@dataclass
class _Run:
    """One run over all blocks: what every step needs."""

    pipeline: InfinityPipeline
    spec: QuantSpec
    specs: list[dict[str, LinearSpec]]
    writer: ArtifactWriter
    team: Team
    store: ActivationStore
    on_progress: Progress
    timing: dict[str, Any] = field(default_factory=lambda: {"stages": {}, "blocks": {}})

    def trace(self, collection: Collection) -> CalibrationTrace:
        """The recordings: those of the run that was cut off, or new ones."""
        path = self.writer.folder / TRACE_FILE
        timing = self.writer.folder / TIMING_FILE
        began = perf_counter()
        if self.team.told_by_first(path.exists()):
            if timing.exists():
                self.timing = json.loads(timing.read_text())
            return trace_of_cut_off_run(path, self.pipeline, collection)
        trace = record(
            self.pipeline, collection, self.store, on_progress=self.on_progress, team=self.team
        )
        self.timing["stages"]["recording"] = self._seconds_since(began)
        if self.team.is_first:
            write_trace(path, trace)
        return trace

    def quantize_blocks(self, trace: CalibrationTrace) -> None:
        calibration = self.spec.calibration
        mine = self.team.mine(len(trace.recordings))
        stream = BlockStream.of_trace(self.pipeline, trace, self.store, mine)
        sample = TokenSample.of(
            trace, max_tokens_per_level=calibration.max_tokens_per_level, seed=calibration.seed
        )
        done = self.team.told_by_first(
            [self.writer.has_block(index) for index in range(len(self.specs))]
        )
        for index, block in enumerate(self.pipeline.transformer.blocks):
            assert isinstance(block, Block)
            began = perf_counter()
            if done[index]:
                self._pass_through(stream, trace, index, block)
            else:
                recorded = self._collect(stream, trace, sample, index, block)
                streamed = self._seconds_since(began)
                inputs = BlockInputs(block, recorded, sample, trace.schedule, stream.rope_2LD)
                tensors, reports, seconds = self._quantize_block(index, block, inputs)
                self._commit(index, tensors, reports, {"inputs": streamed, **seconds})
                if calibration.prefix == "quantized":
                    quantized = quantized_block(block, self.specs[index], tensors)
                    self._advance(stream, trace, quantized)
            self.on_progress("quantizing", (index + 1) * len(MODULES), self._num_steps)

    @property
    def _num_steps(self) -> int:
        return len(self.specs) * len(MODULES)

    def _advance(self, stream: BlockStream, trace: CalibrationTrace, block: Block) -> None:
        stream.run(block, one_layer_cache(self.pipeline, trace.schedule), trace.schedule.levels)

    def _pass_through(
        self, stream: BlockStream, trace: CalibrationTrace, index: int, block: Block
    ) -> None:
        """Go on behind a block that is finished."""
        if self.spec.calibration.prefix == "quantized":
            path = self.writer.folder / block_file(index)
            tensors = read_tensors(path, str(self.pipeline.device))
            block = quantized_block(block, self.specs[index], tensors)
        self._advance(stream, trace, block)

    def _collect(
        self,
        stream: BlockStream,
        trace: CalibrationTrace,
        sample: TokenSample,
        index: int,
        block: Block,
    ) -> dict[int, RecordedInputs]:
        """Everybody's recorded inputs of the block; moves the stream on, if nothing else will."""
        schedule = trace.schedule
        whole_rows = rows_kept_whole(
            index,
            num_recordings=len(trace.recordings),
            num_rows=sample.num_rows,
            tokens_per_row=schedule.num_tokens,
            max_tokens=self.spec.calibration.max_attention_tokens,
        )
        mine = collect_inputs(
            stream,
            block,
            one_layer_cache(self.pipeline, schedule),
            schedule.levels,
            names=MODULES,
            sample=sample,
            whole_rows=whole_rows,
            keep_output=self.spec.calibration.prefix == "full",
        )
        if self.team.size == 1:
            return mine
        everybodys = self.team.merged({i: inputs.to("cpu") for i, inputs in mine.items()})
        return {i: inputs.to(self.pipeline.device) for i, inputs in everybodys.items()}

    def _quantize_block(
        self, index: int, block: Block, inputs: BlockInputs
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]], dict[str, float]]:
        """Every tensor of the compressed block, a report and the seconds of each linear."""
        specs = self.specs[index]
        names = list(specs)
        sizes = [block.get_submodule(name).weight.numel() for name in names]  # type: ignore[operator]
        mine: dict[int, Any] = {}
        for job, owner in enumerate(self.team.owners(sizes)):
            if owner == self.team.rank:
                mine[job] = self._quantize_one(index, names[job], block, inputs)
                steps = index * len(MODULES) + len(mine)
                self.on_progress("quantizing", steps, self._num_steps)
        results = self.team.merged(mine).values()
        tensors = dict(block.state_dict())
        for name, (state, _, _) in zip(names, results, strict=True):
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{key}": value for key, value in state.items()}
        reports = [report for _, report, _ in results]
        seconds = {name: time for name, (_, _, time) in zip(names, results, strict=True)}
        return tensors, reports, seconds

    def _quantize_one(
        self, index: int, name: str, block: Block, inputs: BlockInputs
    ) -> tuple[dict[str, Tensor], dict[str, Any], float]:
        began = perf_counter()
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        read = inputs.of(name)
        quantized, report = quantize_linear(
            name,
            linear,
            self.specs[index][name],
            read,
            inputs.objective(name, read),
            generator=seeded_generator(self.spec.calibration.seed, f"blocks.{index}.{name}"),
        )
        state = {key: tensor.cpu() for key, tensor in quantized.state_dict().items()}
        return state, asdict(report), self._seconds_since(began)

    def _seconds_since(self, began: float) -> float:
        if self.pipeline.device.type == "cuda":
            torch.cuda.synchronize(self.pipeline.device)
        return perf_counter() - began

    def _commit(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        reports: list[dict[str, Any]],
        seconds: Mapping[str, float],
    ) -> None:
        if self.team.is_first:
            self.timing["blocks"][str(index)] = dict(seconds)
            write_json(self.writer.folder / TIMING_FILE, self.timing)
            self.writer.put_block(index, tensors, {"linears": reports})


def quantized_block(
    block: Block, specs: Mapping[str, LinearSpec], tensors: Mapping[str, Tensor]
) -> Block:
    """The block as the artifact has it, in a copy."""
    block = copy.deepcopy(block)
    swap_linears(block, specs)
    device = block.ada_offset.device
    block.load_state_dict({n: t.to(device) for n, t in tensors.items()}, assign=True)
    return block


def specs_by_block(spec: QuantSpec, config: InfinityConfig) -> list[dict[str, LinearSpec]]:
    """What happens to the linears of each block.

    Raises: ValueError naming the linear when formats, groups or rank cannot be had.
    """
    with torch.device("meta"):
        block = Block(config)
    specs = [linear_specs(spec, block, index) for index in range(config.depth)]
    for block_specs in specs:
        for name, linear_spec in block_specs.items():
            check_fits(name, block.get_submodule(name), linear_spec)
    return specs


def check_fits(name: str, linear: nn.Module, spec: LinearSpec) -> None:
    """Raises: ValueError naming the linear when formats, groups or rank cannot be had."""
    assert isinstance(linear, nn.Linear)
    check_runnable(spec)
    smaller_side = min(linear.weight.shape)
    if spec.low_rank.rank > smaller_side:
        raise ValueError(
            f"{name}: low_rank.rank {spec.low_rank.rank} does not fit a weight of shape "
            f"{tuple(linear.weight.shape)}; use 0 to {smaller_side}"
        )
    try:
        for part in (spec.weight, spec.act):
            resolved_group(part.group_size, linear.in_features)
        packed_columns(linear.in_features, format=FORMATS[spec.weight.format])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def describe_base(base: str) -> dict[str, Any]:
    """Where the base model is and the hashes of its VAE and transformer files."""
    folder, given = directory.resolve(base), Path(base).expanduser()
    source = str(given.absolute()) if folder == given else base
    parts = {}
    for part in ("transformer", "vae"):
        paths = sorted((folder / part).glob("*.safetensors"))
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(sha256_of, paths)
            parts[part] = {path.name: digest for path, digest in zip(paths, hashes, strict=True)}
    return {"source": source, **parts}
