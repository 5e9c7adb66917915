"""Where the published weights that metrics need are found, and how they are loaded: strictly.

Nothing is downloaded but by the Hugging Face hub's own client, and only what is published there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from var_compressor.models.inspection import sha256_of
from var_compressor.models.tensor_files import CheckpointError

WEIGHTS_VARIABLE = "VARC_METRIC_WEIGHTS"


class MetricUnavailable(ValueError):
    """Something that a metric needs is missing; the message says what, where it was looked for,
    and where to get it.
    """


@dataclass(frozen=True)
class WeightFile:
    """A published file, or a folder of files where ``parts`` names what is taken of it.

    ``names`` are the file names that it goes by, the first one preferred. ``source`` is where it is
    published. ``hub_repo`` holds it on the Hugging Face hub, if any does. ``also_in`` are other
    folders, such as the cache of another package that uses the same file; "package:" begins one
    inside an installed package. ``sha256_prefix`` is what is known of its hash.
    """

    names: tuple[str, ...]
    source: str
    hub_repo: str = ""
    parts: tuple[str, ...] = ()
    also_in: tuple[str, ...] = ()
    sha256_prefix: str = ""

    @property
    def name(self) -> str:
        return self.names[0]


def find_files(
    metric: str, files: tuple[WeightFile, ...], weights_dir: Path | None
) -> dict[str, Path]:
    """The path of every file by its preferred name.

    Raises: MetricUnavailable for those that are nowhere, or for one whose hash is another.
    """
    if weights_dir is None and (variable := os.environ.get(WEIGHTS_VARIABLE)):
        weights_dir = Path(variable)
    if weights_dir is not None and not weights_dir.expanduser().is_dir():
        raise MetricUnavailable(f"{weights_dir}: no such folder of metric weights")
    found = {file.name: _find(file, weights_dir) for file in files}
    if missing := [file for file in files if found[file.name] is None]:
        looked_for = "; ".join(
            f"{' or '.join(file.names)}, published at {file.source}, looked for in "
            f"{', '.join(_places(file, weights_dir))}"
            for file in missing
        )
        put = str(weights_dir) if weights_dir else "a folder and name it by --metric-weights"
        raise MetricUnavailable(f"{metric} lacks {looked_for}; put it into {put}")
    return {name: path for name, path in found.items() if path is not None}


def _find(file: WeightFile, weights_dir: Path | None) -> Path | None:
    for folder in _folders(file, weights_dir):
        for name in file.names:
            path = folder / name
            if path.is_dir() if file.parts else path.is_file():
                return _checked(path, file)
    return _from_hub(file) if file.hub_repo else None


def _places(file: WeightFile, weights_dir: Path | None) -> list[str]:
    hub = [f"the hub's {file.hub_repo} and its cache"] if file.hub_repo else []
    return [*map(str, _folders(file, weights_dir)), *hub]


def _folders(file: WeightFile, weights_dir: Path | None) -> Iterator[Path]:
    if weights_dir is not None:
        yield weights_dir.expanduser()
    if not file.hub_repo:
        yield Path(torch.hub.get_dir()) / "checkpoints"
    for place in file.also_in:
        if not place.startswith("package:"):
            yield Path(place).expanduser()
        # found without importing it: the package itself may not run here
        elif package := find_spec(place.removeprefix("package:").split("/")[0]):
            yield Path(str(package.origin)).parent.joinpath(*place.split("/")[1:])


def _from_hub(file: WeightFile) -> Path | None:
    """What the hub's cache holds whole, else what the hub gives; None when neither has it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = file.parts or (file.name,)
    for cached_only in (True, False):
        try:
            snapshot = snapshot_download(
                file.hub_repo, allow_patterns=list(wanted), local_files_only=cached_only
            )
        except (HfHubHTTPError, OSError, ValueError):
            continue
        folder = Path(snapshot)
        if all(any(folder.glob(part)) for part in wanted):
            return folder if file.parts else _checked(folder / file.name, file)
    return None


@cache
def _sha256(path: Path, _num_bytes: int, _mtime_ns: int) -> str:
    """Once per file and state of it, because several metrics may share it."""
    return sha256_of(path)


def _digest(path: Path) -> str:
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


def file_hashes(files: tuple[WeightFile, ...], paths: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of each file, those of folders included, by name; ``paths`` as `find_files`."""
    found = {}
    for file in files:
        path = paths[file.name]
        if not file.parts:
            found[file.name] = _digest(path)
        for part in sorted(one for pattern in file.parts for one in path.glob(pattern)):
            found[f"{file.name}/{part.relative_to(path)}"] = _digest(part)
    return found


def _checked(path: Path, file: WeightFile) -> Path:
    if file.sha256_prefix:
        digest = _digest(path)
        if not digest.startswith(file.sha256_prefix):
            raise MetricUnavailable(
                f"{path}: its SHA-256 begins with {digest[:8]}, the published file's with "
                f"{file.sha256_prefix}; download it again from {file.source}"
            )
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors or ``torch.save`` file (the one before torch 1.6, too).

    Raises: CheckpointError for anything else; nothing but tensors is unpickled.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    # a damaged or foreign file makes the unpickler stumble in any way there is
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: not a readable file of weights ({reason}); is the download complete?"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def load_strictly(
    module: nn.Module, path: Path, *, prefix: str = "", others: str, device: torch.device
) -> None:
    """Fill ``module`` in float32 from a file that has each of its tensors in the same shape, and
    make it ready for inference on ``device``.

    The file's names are the module's behind ``prefix``; ``others`` is a regular expression of what
    else the file may hold.
    Raises: CheckpointError naming the first tensor that is missing, misshapen or unknown.
    """
    present, loaded = read_tensors(path), {}
    for name, target in module.state_dict().items():
        found = present.pop(prefix + name, None)
        if found is None:
            raise CheckpointError(f"{path}: lacks {prefix}{name}; it is not the published file")
        if found.shape != target.shape:
            raise CheckpointError(
                f"{path}: {prefix}{name} is {list(found.shape)}, expected {list(target.shape)}; "
                "it is not the published file"
            )
        loaded[name] = found.to(device=device, dtype=torch.float32)
    if unknown := [name for name in sorted(present) if not re.fullmatch(others, name)]:
        raise CheckpointError(f"{path}: has {unknown[0]}, which the published file has not")
    module.load_state_dict(loaded, strict=True, assign=True)
    module.eval().requires_grad_(False)
