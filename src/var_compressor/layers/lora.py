"""Low-rank adapters (LoRA) on the linears of a transformer, full precision or quantized.

A quantized linear takes an adapter into its high-precision branch; nothing is quantized again. A
plain linear takes it into its weight. Both keep what they had, so that taking adapters off restores
every bit.

Shapes: N output and K input channels, R rank.
Source: LoRA, Hu et al. 2021 (arXiv 2106.09685); names as PEFT and diffusers save them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from var_compressor.layers.linear import QuantizedLinear
from var_compressor.models.checkpoint import transformer_names, undamaged
from var_compressor.models.streaming import StreamedBlocks
from var_compressor.models.tensor_files import CheckpointError, TensorSource, open_tensors
from var_compressor.models.transformer import Infinity

WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
_METADATA_KEY = "lora_adapter_metadata"
_PREFIX = re.compile(r"^(base_model\.model\.|transformer\.|module\.)+")
_TENSOR = re.compile(
    r"^(?P<module>.+)\.(?:(?P<side>lora_A|lora_B|lora_down|lora_up)(?:\.[^.]+)?\.weight"
    r"|(?P<alpha>alpha))\Z"
)
_SIDES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight: ``up @ down``, float32 ``[N, R]`` and ``[R, K]``.

    ``up`` contains alpha / R.
    """

    down_RK: Tensor
    up_NR: Tensor


Updates = dict[str, Update]


# --- reading --------------------------------------------------------------------------------------


def read_lora(path: str | Path, transformer: Infinity) -> Updates:
    """The updates of an adapter file or PEFT folder, by our names of the linears they belong to.

    Modules are named as ours or as the official Infinity's. Without any alpha it equals the rank.
    Raises: CheckpointError naming the tensor and both shapes for anything that does not fit.
    """
    path = Path(path).expanduser()
    if path.is_dir() and (path / WEIGHTS_NAME).is_file():
        path = path / WEIGHTS_NAME
    source = undamaged(open_tensors(path))
    if not source.names():
        raise CheckpointError(f"{path}: holds no adapter")
    declared = _declared(source)
    linears, aliases = _adaptable(transformer), _aliases(transformer)
    named: dict[str, dict[str, str]] = {}
    for name in sorted(source.names()):
        module, role = _role(source.where, name)
        ours = aliases.get(module)
        if ours not in linears:
            raise CheckpointError(
                f"{source.where}: {name} belongs to {module}, which is no linear of this model; "
                "was the adapter trained for Infinity?"
            )
        roles = named.setdefault(ours, {})
        if role in roles:
            raise CheckpointError(f"{source.where}: {name} and {roles[role]} are the same tensor")
        roles[role] = name
    return {
        ours: _update(source, roles, _shape(linears[ours]), declared)
        for ours, roles in named.items()
    }


def _role(where: str, name: str) -> tuple[str, str]:
    found = _TENSOR.match(_PREFIX.sub("", name))
    if found is None:
        raise CheckpointError(
            f"{where}: {name!r} is not a part of a LoRA on linears; expected names that end in "
            ".lora_A.weight, .lora_B.weight, .lora_down.weight, .lora_up.weight or .alpha"
        )
    return found["module"], "alpha" if found["alpha"] else _SIDES[found["side"]]


def _aliases(transformer: Infinity) -> dict[str, str]:
    """Our module names by every spelling of them."""
    found = {}
    for present in ((), ("blocks.",)):
        for ours, parts in transformer_names(transformer.config, present).items():
            if ours.endswith(".weight"):
                module = ours.removesuffix(".weight")
                found[module] = module
                found[parts[0].removesuffix(".weight")] = module
    return found


def _adaptable(transformer: Infinity) -> dict[str, nn.Linear | QuantizedLinear]:
    """Raises: ValueError for a transformer whose linears are out of reach."""
    streams = isinstance(transformer.blocks, StreamedBlocks)
    if streams:
        raise ValueError("a LoRA needs the blocks in memory; open the model without stream_blocks")
    plain = (nn.Linear, QuantizedLinear)
    return {n: one for n, one in transformer.named_modules() if isinstance(one, plain)}


def _shape(linear: nn.Linear | QuantizedLinear) -> tuple[int, int]:
    """(N, K)"""
    if isinstance(linear, nn.Linear):
        return linear.out_features, linear.in_features
    return len(linear.qweight), len(linear.smooth_factor)


def _update(
    source: TensorSource, roles: Mapping[str, str], shape: tuple[int, int], declared: _Declared
) -> Update:
    where, (N, K) = source.where, shape
    if lacking := {"down", "up"} - roles.keys():
        other = sorted(roles.values())[0]
        kind = "lora_A" if "down" in lacking else "lora_B"
        raise CheckpointError(f"{where}: {other} has no {kind} beside it")
    down, up = source.info(roles["down"]).shape, source.info(roles["up"]).shape
    if len(down) != 2 or len(up) != 2 or (up[0], down[1], up[1]) != (N, K, down[0]) or not down[0]:
        raise CheckpointError(
            f"{where}: {roles['down']} {list(down)} and {roles['up']} {list(up)} do not fit a "
            f"linear of [{N}, {K}]; expected [rank, {K}] and [{N}, rank]"
        )
    rank = down[0]
    alpha = declared.alpha if declared.alpha is not None else float(rank)
    if "alpha" in roles:
        info = source.info(roles["alpha"])
        if math.prod(info.shape) != 1:
            raise CheckpointError(f"{where}: {roles['alpha']} has shape {list(info.shape)}, not []")
        alpha = source.read(roles["alpha"], torch.float32).item()
    factor = alpha / (math.sqrt(rank) if declared.by_root else rank)
    down_RK, up_NR = (_read(source, roles[side]) for side in ("down", "up"))
    up_NR = up_NR * factor
    if not up_NR.isfinite().all():
        raise CheckpointError(f"{where}: alpha of {roles['down']} is {alpha}, far out of range")
    return Update(down_RK, up_NR)


def _read(source: TensorSource, name: str) -> Tensor:
    dtype = source.info(name).dtype
    if not dtype.startswith(("float", "bfloat")):
        raise CheckpointError(f"{source.where}: {name} is {dtype}, expected a floating dtype")
    tensor = source.read(name, torch.float32)
    if not tensor.isfinite().all():
        raise CheckpointError(f"{source.where}: {name} holds values that are not finite")
    return tensor


@dataclass(frozen=True)
class _Declared:
    """What lies beside the tensors: alpha of all of them, and whether it is over sqrt(rank)."""

    alpha: float | None = None
    by_root: bool = False


def _declared(source: TensorSource) -> _Declared:
    """From the adapter_config.json in the file's folder, or from the file's own header."""
    where, content = source.where, None
    config = source.files[0].with_name(CONFIG_NAME)
    if config.is_file() and source.files[0].name == WEIGHTS_NAME:
        where, content = str(config), config.read_bytes()
    elif source.files[0].suffix == ".safetensors":
        content = (safe_open(source.files[0], framework="pt").metadata() or {}).get(_METADATA_KEY)
    if content is None:
        return _Declared()
    try:
        values: Any = json.loads(content)
        # diffusers puts the component's name before each key
        values = {str(key).removeprefix("transformer."): one for key, one in values.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: not the settings of an adapter ({error})") from None
    for key in ("use_dora", "alpha_pattern", "lora_bias", "fan_in_fan_out"):
        if values.get(key):
            raise CheckpointError(f"{where}: {key} is set, which is not supported; merge it first")
    alpha = values.get("lora_alpha")
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    # whole numbers in JSON have no limit, floats do
    if alpha is not None and not (is_number and abs(alpha) < 1e30):
        raise CheckpointError(f"{where}: lora_alpha is {str(alpha)[:40]!r}, expected a number")
    by_root = values.get("use_rslora", False)
    if not isinstance(by_root, bool):
        raise CheckpointError(
            f"{where}: use_rslora is {str(by_root)[:40]!r}, expected true or false"
        )
    return _Declared(alpha, by_root)


# --- applying -------------------------------------------------------------------------------------


@dataclass
class Adapter:
    """Updates that act together, times ``strength``."""

    updates: Updates
    strength: float


@dataclass
class Adapters:
    """The adapters of a transformer, by name; they add up in the order they came in."""

    transformer: Infinity
    by_name: dict[str, Adapter] = field(default_factory=dict)
    _originals: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def load(self, path: str | Path, *, name: str, strength: float) -> None:
        """Add an adapter. Raises: ValueError for a name in use, CheckpointError for the file."""
        _check_strength(strength)
        if name in self.by_name:
            raise ValueError(
                f"there is a LoRA named {name!r} already; unload it or take a new name"
            )
        adapter = Adapter(read_lora(path, self.transformer), strength)
        self.by_name[name] = adapter
        self._apply(adapter.updates)

    def set_strength(self, name: str, strength: float) -> None:
        """Raises: ValueError for an unknown name or a number that is not finite."""
        _check_strength(strength)
        adapter = self._named(name)
        adapter.strength = strength
        self._apply(adapter.updates)

    def unload(self, name: str) -> None:
        """Take an adapter off; without any, every tensor is what it was. Raises: ValueError."""
        adapter = self._named(name)
        del self.by_name[name]
        self._apply(adapter.updates)

    def _named(self, name: str) -> Adapter:
        if name not in self.by_name:
            known = ", ".join(map(repr, self.by_name)) or "none"
            raise ValueError(f"no LoRA is named {name!r}; loaded are: {known}")
        return self.by_name[name]

    @torch.no_grad()
    def _apply(self, modules: Iterable[str]) -> None:
        """Make these linears what their original and the adapters' updates give."""
        for module in modules:
            linear = self.transformer.get_submodule(module)
            active = [
                Update(one.updates[module].down_RK, one.updates[module].up_NR * one.strength)
                for one in self.by_name.values()
                if module in one.updates and one.strength != 0
            ]
            assert isinstance(linear, nn.Linear | QuantizedLinear)
            if module in self._originals:
                _put(linear, self._originals.pop(module))
            if active:
                self._originals[module] = _kept(linear)
                adapted = _merged if isinstance(linear, nn.Linear) else _branched
                _put(linear, adapted(linear, active))  # type: ignore[arg-type]


def _check_strength(strength: float) -> None:
    if not math.isfinite(strength):
        raise ValueError(f"the scale of a LoRA is {strength}; give a finite number, e.g. 1.0")


def _kept(linear: nn.Linear | QuantizedLinear) -> dict[str, Tensor]:
    """What an adapter changes, whole weights on the host: a GPU has no room for two."""
    if isinstance(linear, nn.Linear):
        return {"weight": linear.weight.detach().to("cpu")}
    return {name: getattr(linear, name) for name in ("proj_down", "proj_up", "bias")}


def _put(linear: nn.Linear | QuantizedLinear, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if isinstance(linear, nn.Linear):
            moved = tensor.to(linear.weight.device)
            setattr(linear, name, nn.Parameter(moved, requires_grad=False))
        else:
            setattr(linear, name, tensor)


def _merged(linear: nn.Linear, updates: list[Update]) -> dict[str, Tensor]:
    weight_NK = linear.weight.float()
    for one in updates:
        up_NR, down_RK = one.up_NR.to(weight_NK.device), one.down_RK.to(weight_NK.device)
        weight_NK = weight_NK + up_NR @ down_RK
    return {"weight": weight_NK.to(linear.weight.dtype)}


def _branched(linear: QuantizedLinear, updates: list[Update]) -> dict[str, Tensor]:
    """The branch with the updates' ranks appended to its own.

    It reads smoothed inputs, so what acts on inputs is multiplied by the smoothing factors; what
    it adds for a shift of the inputs is taken off the bias.
    """
    device, dtype = linear.proj_down.device, linear.proj_down.dtype
    down_RK = torch.cat([one.down_RK for one in updates]).to(device) * linear.smooth_factor
    down_RK = down_RK.to(dtype)
    up_NR = torch.cat([one.up_NR for one in updates], dim=1).to(device, dtype)
    bias_N = linear.bias
    if linear.shift:
        inverse_K = linear.shift / linear.smooth_factor.double()
        extra_N = up_NR.double() @ (down_RK.double() @ inverse_K)
        bias_N = (bias_N.double() - extra_N).to(bias_N.dtype)
    return {
        "proj_down": torch.cat([linear.proj_down, down_RK]),
        "proj_up": torch.cat([linear.proj_up, up_NR], dim=1),
        "bias": bias_N,
    }
