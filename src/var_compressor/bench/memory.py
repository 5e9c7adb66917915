"""What a pipeline takes: bytes of its parts, peaks of one run, and energy as the GPU counts it."""

from __future__ import annotations

import gc
import importlib
from dataclasses import dataclass, replace
from typing import Any

import torch

from var_compressor.bench.timing import Request, draw
from var_compressor.bench.work import parameter_bytes
from var_compressor.pipeline import InfinityPipeline
from var_compressor.resident import reset_resident_peak, resident_bytes, resident_peak


@dataclass(frozen=True)
class Occupied:
    """Bytes in use: by torch's tensors, by its allocator, and as the driver counts them.

    On a CPU the allocator's are 0, and ``used`` is this process's resident memory.
    """

    allocated: int
    reserved: int
    used: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a batch with this pipeline alone in memory.

    ``parts``: weights, and the KV cache. ``stage_peaks``: most allocated on a GPU; on a CPU the
    weights, and what the process grew by. ``reserved``: by the allocator, 0 on a CPU. ``driver``:
    with the CUDA context; on a CPU with Python and its libraries.
    """

    parts: dict[str, int]
    stage_peaks: dict[str, int]
    reserved: int
    driver: int

    @property
    def peak(self) -> int:
        return max(self.stage_peaks.values())

    @property
    def peak_released(self) -> int:
        """The peak if the text encoder's weights go once the text is encoded: computed."""
        text = self.parts["text encoder"]
        later = [peak - text for stage, peak in self.stage_peaks.items() if stage != "text"]
        return max(self.stage_peaks["text"], *later)


class Meter:
    """Reads one device. Without NVML, ``used`` lacks the CUDA context and energy is unknown."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.nvml = _nvml(device) if self.on_gpu else None
        idle = self._used()
        if self.on_gpu:
            # the first tensor makes the CUDA context
            torch.zeros((), device=device)
        self.start = self.occupied()
        self.context_bytes = self.start.used - idle

    def occupied(self) -> Occupied:
        """Now, after giving back what no tensor holds."""
        gc.collect()
        if not self.on_gpu:
            return Occupied(0, 0, self._used())
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return Occupied(
            torch.cuda.memory_allocated(self.device),
            torch.cuda.memory_reserved(self.device),
            self._used(),
        )

    def take_peak(self, before: Occupied) -> int:
        """Most bytes since the last call, above what others held ``before``."""
        if not self.on_gpu:
            peak = resident_peak() - before.used
            reset_resident_peak()
            return peak
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before.allocated
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    @torch.inference_mode()
    def measure(self, pipeline: InfinityPipeline, request: Request, *, before: Occupied) -> Memory:
        """Peaks of one run; ``before`` the pipeline was opened, others held that much."""
        now, parts = self.occupied(), part_bytes(pipeline)
        if not self.on_gpu:
            # memory given back may stay with the process, so what was before tells nothing
            before = replace(now, used=now.used - sum(parts.values()))
        self.take_peak(before)
        peaks = {}
        text = pipeline.encode(request.text)
        peaks["text"] = self.take_peak(before)
        drawn = draw(pipeline, text, request)
        peaks["draw"] = self.take_peak(before)
        pipeline.decode(drawn.latent_BDYX, strip_rows=None)
        peaks["VAE"] = self.take_peak(before)
        reserved, driver = 0, max(peaks.values()) + self.start.used
        if self.on_gpu:
            # the allocator keeps what it once took
            reserved = torch.cuda.memory_reserved(self.device) - before.reserved
            driver = self._used() - before.used + self.context_bytes
        return Memory({**parts, "KV cache": drawn.kv_bytes}, peaks, reserved, driver)

    def joules(self) -> float | None:
        """The GPU's energy counter, once all work is done; None where there is none."""
        if self.nvml is None:
            return None
        torch.cuda.synchronize(self.device)
        pynvml, handle = self.nvml
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        except pynvml.NVMLError:
            return None

    def _used(self) -> int:
        if not self.on_gpu:
            return resident_bytes()
        if self.nvml is not None:
            pynvml, handle = self.nvml
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free


def part_bytes(pipeline: InfinityPipeline) -> dict[str, int]:
    """Bytes of the weights in memory."""
    encoder = pipeline.text_encoder
    return {
        "transformer": parameter_bytes(pipeline.transformer),
        "VAE": parameter_bytes(pipeline.vae),
        "text encoder": 0 if encoder is None else encoder.num_bytes,
    }


def _nvml(device: torch.device) -> tuple[Any, Any] | None:
    """(pynvml, the GPU as it knows it); None without NVML, or where it tells no memory."""
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        # on a Jetson it knows no memory of the GPU's own
        pynvml.nvmlDeviceGetMemoryInfo(handle)
        return pynvml, handle
    except pynvml.NVMLError:
        return None
