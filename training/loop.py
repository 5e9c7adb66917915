"""What the training scripts share: a run that is measured in seconds, averaged weights, files."""

from __future__ import annotations

import copy
import json
import math
import platform
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

MAX_FILE_BYTES = 15 * 2**20


class Run:
    """A training run of ``seconds``: learning rate by elapsed time, averaged weights, curve.

    The clock starts with ``start()``, so compiling before it is not counted against the run.
    """

    def __init__(
        self,
        models: list[nn.Module],
        *,
        seconds: float,
        peak_lr: float,
        weight_decay: float,
        lr_factors: list[float] | None = None,
    ) -> None:
        self.models = models
        self.averaged = [copy.deepcopy(model).eval().requires_grad_(False) for model in models]
        self.parameters = [p for model in models for p in model.parameters()]
        self.seconds, self.peak_lr = seconds, peak_lr
        groups = []
        for model, factor in zip(models, lr_factors or [1.0] * len(models), strict=True):
            matrices = [p for p in model.parameters() if p.ndim > 1 and len(p) > 1]
            others = [p for p in model.parameters() if p.ndim <= 1 or len(p) == 1]
            groups += [
                {"params": matrices, "weight_decay": weight_decay, "factor": factor},
                {"params": others, "weight_decay": 0.0, "factor": factor},
            ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=peak_lr, betas=(0.9, 0.95), fused=torch.cuda.is_available()
        )
        self.step_index = 0
        self.curve: list[dict[str, float]] = []
        self.start()

    def start(self) -> None:
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    @property
    def progress(self) -> float:
        return min(self.elapsed / self.seconds, 1.0)

    def step(self, loss: Tensor) -> None:
        """Backward, clip, update, average; the learning rate is a short ramp and then a cosine."""
        ramp = min(1.0, (self.step_index + 1) / 200)
        lr = self.peak_lr * ramp * (0.01 + 0.99 * (1 + math.cos(math.pi * self.progress)) / 2)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        self.step_index += 1

    @torch.no_grad()
    def _average(self) -> None:
        weight = 1 - min(0.999, (1 + self.step_index) / (10 + self.step_index))
        for averaged, model in zip(self.averaged, self.models, strict=True):
            pairs = list(zip(averaged.parameters(), model.parameters(), strict=True))
            torch._foreach_lerp_([a for a, _ in pairs], [m.detach() for _, m in pairs], weight)
            for a, m in zip(averaged.buffers(), model.buffers(), strict=True):
                a.copy_(m)

    def log(self, images: int, **values: float) -> None:
        point = {"seconds": round(self.elapsed, 1), "step": self.step_index, "images": images}
        point |= {name: round(float(value), 5) for name, value in values.items()}
        self.curve.append(point)
        print(point, flush=True)


def machine() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": device, "torch": torch.__version__, "python": platform.python_version()}


def save_weights(module: nn.Module, path: Path) -> None:
    """bf16 safetensors; split into ``path`` with -1, -2 … when larger than 15 MiB."""
    state = {
        n: t.detach().to("cpu", torch.bfloat16).contiguous() for n, t in module.state_dict().items()
    }
    files: list[dict[str, Tensor]] = [{}]
    room = MAX_FILE_BYTES
    for name, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        if size > room:
            files.append({})
            room = MAX_FILE_BYTES
        files[-1][name] = tensor
        room -= size
    for old in path.parent.glob(f"{path.stem}*{path.suffix}"):
        old.unlink()
    for index, content in enumerate(files, 1):
        part = path if len(files) == 1 else path.with_stem(f"{path.stem}-{index}")
        save_file(content, part)


def save_json(values: dict, path: Path) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


def save_grid(images_B3YX: Tensor, path: Path) -> None:
    """Eight images a row, as PNG."""
    columns = min(8, len(images_B3YX))
    images_B3YX = images_B3YX[: len(images_B3YX) // columns * columns]
    grid = (
        images_B3YX.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    )
    Image.fromarray(((grid + 1) * 127.5).round().to(torch.uint8).cpu().numpy()).save(path)
