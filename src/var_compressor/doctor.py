"""What this machine can run, and why: Python, torch, devices, memory, packages, compute paths."""

from __future__ import annotations

import dataclasses
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from var_compressor.bench.paths import OnStep

OPTIONAL_PACKAGES = {
    "triton": "GPU kernels",
    "torchmetrics": "evaluation: weights of LPIPS",
    "scipy": "evaluation: Fréchet distance",
    "matplotlib": "plots and reports",
    "gradio": "the web page",
}


@dataclass(frozen=True)
class Device:
    """One place to compute: `cpu`, or a GPU with its compute capability."""

    name: str
    description: str
    total_bytes: int | None
    free_bytes: int | None
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Package:
    """An optional package: its version, or None when it is not installed."""

    name: str
    version: str | None
    used_for: str


@dataclass(frozen=True)
class ComputePath:
    """One way to multiply a compressed weight; `reason` says why it can or can't run here."""

    name: str
    available: bool
    reason: str


@dataclass(frozen=True)
class Report:
    """All that `varc doctor` found."""

    python: str
    platform: str
    num_cpus: int
    torch: str | None
    cuda: str | None
    devices: tuple[Device, ...]
    packages: tuple[Package, ...]
    paths: tuple[ComputePath, ...]
    policy: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Kernel:
    """What a path of kernels needs: a compute capability, and where another path is faster."""

    path: str
    lowest: tuple[int, int]
    wants: str
    slow_from: tuple[int, int] | None = None


_KERNELS = (
    _Kernel("w4a4", (8, 0), "INT8 tensor cores", slow_from=(8, 9)),
    _Kernel("w4a8-int8", (8, 0), "INT8 tensor cores", slow_from=(8, 9)),
    _Kernel("w4a8-fp8", (8, 9), "fp8 tensor cores"),
    _Kernel("w4a16", (8, 0), "bf16 tensor cores"),
    _Kernel("w8a8", (8, 9), "fp8 tensor cores"),
    _Kernel("bf16", (8, 0), "bf16 tensor cores"),
)


def examine() -> Report:
    """Look at this machine; nothing is changed, and no model is loaded."""
    torch_version = _version("torch")
    cuda, gpus = _gpus() if torch_version else (None, ())
    capability = gpus[0].capability if gpus else None
    return Report(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        num_cpus=os.cpu_count() or 1,
        torch=torch_version,
        cuda=cuda,
        devices=(_cpu(), *gpus),
        packages=tuple(Package(n, _version(n), used) for n, used in OPTIONAL_PACKAGES.items()),
        paths=compute_paths(
            capability=capability,
            has_torch=torch_version is not None,
            has_triton=_version("triton") is not None,
        ),
        policy=_policy(gpus) if _version("triton") else "reference everywhere: no triton",
    )


def _policy(gpus: tuple[Device, ...]) -> str:
    """What `auto` goes by on the first GPU."""
    from var_compressor.layers.compute import (
        FP8_FROM,
        ROOMY_SHARE,
        Policy,
        read_table,
        table_path,
        table_versions,
    )

    if not gpus or gpus[0].capability is None or gpus[0].capability < (8, 0):
        return "reference everywhere: no GPU that kernels run on"
    name, capability = gpus[0].description, gpus[0].capability
    unpacked = ""
    if capability >= FP8_FROM and gpus[0].total_bytes:
        room = _gib(round(ROOMY_SHARE * gpus[0].total_bytes))
        unpacked = f"w8a8 where unpacked weights take at most {room}; else "
    if table := read_table(name, table_versions()):
        shapes = ", ".join(f"{N}x{K}" for N, K in sorted(table.measured))
        file = table_path(name)
        return f"{unpacked}measured here for weights {shapes} ({file}); others by architecture"
    few, many = (Policy("packed", capability, 1).choose(tokens, 0, 0) for tokens in (1, None))
    return unpacked + (
        f"by architecture: {few.path} ({few.why}), else {many.path} ({many.why}); "
        "`varc doctor --measure MODEL` measures"
    )


def measure(model: str, on_step: OnStep) -> Path:
    """Time the paths of a model's linears on the first GPU; returns the file that keeps them.

    Raises: ValueError without a GPU that kernels run on, or for an unknown model.
    """
    import torch

    from var_compressor.bench.paths import linear_shapes, measure_paths
    from var_compressor.layers.compute import table_versions, write_table
    from var_compressor.planning import model_shape

    shapes = linear_shapes(model_shape(model).transformer)
    report = examine()
    if not next(path for path in report.paths if path.name == "w4a16").available:
        raise ValueError(f"nothing to measure: {report.policy}")
    table = measure_paths(shapes, torch.device("cuda", 0), on_step)
    return write_table(table, report.devices[1].description, table_versions())


def compute_paths(
    *,
    capability: tuple[int, int] | None,
    has_torch: bool,
    has_triton: bool,
) -> tuple[ComputePath, ...]:
    """Every compute path with the first thing that stops it, or why it runs.

    `capability` is the first GPU's, None without one.
    """
    reason = "plain torch, on any device" if has_torch else "torch is not installed"
    paths = [ComputePath("reference", has_torch, reason)]
    for kernel in _KERNELS:
        obstacle = _obstacle(kernel, capability, has_triton=has_triton)
        paths.append(
            ComputePath(kernel.path, obstacle is None, obstacle or _merit(kernel, capability))
        )
    return tuple(paths)


def _obstacle(
    kernel: _Kernel,
    capability: tuple[int, int] | None,
    *,
    has_triton: bool,
) -> str | None:
    if capability is None:
        return "no GPU that torch can use"
    if capability < kernel.lowest:
        return f"needs {kernel.wants} ({_sm(kernel.lowest)}), the GPU is {_sm(capability)}"
    return None if has_triton else "triton is not installed"


def _merit(kernel: _Kernel, capability: tuple[int, int] | None) -> str:
    assert capability is not None
    if kernel.slow_from and capability >= kernel.slow_from:
        return f"runs, but {_sm(capability)} has fp8 tensor cores: w4a8-fp8 is faster"
    return f"{_sm(capability)} has {kernel.wants}"


def to_text(report: Report) -> str:
    """The report for a person: one fact a line, ready paths marked."""
    cuda = f" (CUDA {report.cuda})" if report.cuda else " (no CUDA)"
    torch_line = f"{report.torch}{cuda}" if report.torch else "not installed: pip install torch"
    lines = [
        f"python    {report.python} on {report.platform}, {report.num_cpus} CPUs",
        f"torch     {torch_line}",
        "devices",
    ]
    for device in report.devices:
        sm = f", {_sm(device.capability)}" if device.capability else ""
        free = f", {_gib(device.free_bytes)} free of {_gib(device.total_bytes)}"
        lines.append(f"  {device.name:<12} {device.description}{sm}{free}")
    lines.append("optional packages")
    for package in report.packages:
        lines.append(f"  {package.name:<12} {package.version or '-':<10} {package.used_for}")
    lines.append("compute paths")
    for path in report.paths:
        lines.append(f"  {path.name:<12} {'yes' if path.available else 'no':<4} {path.reason}")
    lines.append(f"  auto         {report.policy}")
    return "\n".join(lines)


def _cpu() -> Device:
    total, free = _host_memory()
    return Device("cpu", platform.processor() or platform.machine(), total, free)


def _host_memory() -> tuple[int | None, int | None]:
    """(total, available) bytes; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kib = {line.split(":")[0]: int(line.split()[1]) for line in file}
        return kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None, None


def _gpus() -> tuple[str | None, tuple[Device, ...]]:
    """(CUDA version torch was built for, the GPUs it can use)."""
    import torch

    if not torch.cuda.is_available():
        return torch.version.cuda, ()
    gpus = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name, capability = torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)
        gpus.append(Device(f"cuda:{i}", name, total, free, capability))
    return torch.version.cuda, tuple(gpus)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def _gib(num_bytes: int | None) -> str:
    return "?" if num_bytes is None else f"{num_bytes / 2**30:.1f} GiB"
