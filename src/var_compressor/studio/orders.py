"""What a visitor of the studio asks for: checked once, at the door, and a value from then on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from var_compressor.models.sampling import Sampling
from var_compressor.models.schedule import ASPECT_RATIOS, PIXEL_BUDGETS

MAX_PROMPT = 2000
MAX_SEED = 2**63 - 1
CFG_RANGE, TAU_RANGE, TOP_P_RANGE = (1.0, 20.0), (0.05, 5.0), (0.0, 1.0)


@dataclass(frozen=True)
class Order:
    """One image by one model, or the same by two of them.

    ``models``: one name or two, as `Shelf` knows them. ``negative`` "" is none. ``aspect_ratio`` is
    height / width; ``pixel_budget`` None is the model's own.
    """

    prompt: str
    models: tuple[str, ...]
    negative: str = ""
    seed: int = 0
    aspect_ratio: float = 1.0
    pixel_budget: str | None = None
    cfg: float = 3.0
    tau: float = 0.5
    top_p: float = 0.97

    @staticmethod
    def checked(values: Mapping[str, Any]) -> Order:
        """From what a page or a PNG says, whatever that is.

        Raises: ValueError naming the value that cannot be, and what could.
        """
        models = values.get("models")
        if not isinstance(models, tuple) or not 1 <= len(models) <= 2:
            raise ValueError("choose one model, or two to compare")
        prompt = _text("prompt", values.get("prompt"))
        if not prompt.strip():
            raise ValueError("the prompt is empty; say what to draw")
        return Order(
            prompt,
            models,
            _text("negative prompt", values.get("negative") or ""),
            _seed(values.get("seed", 0)),
            _ratio(values.get("aspect_ratio", 1.0)),
            _budget(values.get("pixel_budget")),
            _number("guidance", values.get("cfg", Order.cfg), CFG_RANGE),
            _number("temperature", values.get("tau", Order.tau), TAU_RANGE),
            _number("top-p", values.get("top_p", Order.top_p), TOP_P_RANGE),
        )

    @property
    def sampling(self) -> Sampling:
        return Sampling(cfg=self.cfg, tau=self.tau, top_p=self.top_p)

    def settings(self, model: str) -> dict[str, Any]:
        """For the PNG of one model's image, with the names of `varc generate`."""
        return {
            "prompt": self.prompt,
            "negative": self.negative or None,
            "seed": self.seed,
            "model": model,
            "cfg": self.cfg,
            "tau": self.tau,
            "top_p": self.top_p,
            "aspect_ratio": self.aspect_ratio,
            "pixel_budget": self.pixel_budget,
        }


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the {name} is not a text")
    if len(value) > MAX_PROMPT:
        raise ValueError(
            f"the {name} has {len(value):,} characters; at most {MAX_PROMPT:,} are taken"
        )
    # half a surrogate pair is no character, and neither a file nor a tokenizer takes it
    return value.encode("utf-8", "replace").decode("utf-8")


def _seed(value: Any) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not text.isascii() or not text.isdigit() or len(text) > 19:
        raise ValueError(f"the seed is {text[:40]!r}; give a whole number from 0 to {MAX_SEED}")
    if int(text) > MAX_SEED:
        raise ValueError(f"the seed is {text}; the largest is {MAX_SEED}")
    return int(text)


def _number(name: str, value: Any, bounds: tuple[float, float]) -> float:
    low, high = bounds
    number = float(value) if isinstance(value, int | float) else math.nan
    if isinstance(value, bool) or not low <= number <= high:
        raise ValueError(f"{name} is {str(value)[:40]}; give a number from {low:g} to {high:g}")
    return number


def _ratio(value: Any) -> float:
    ratio = _number("the aspect ratio", value, (ASPECT_RATIOS[0], ASPECT_RATIOS[-1]))
    return min(ASPECT_RATIOS, key=lambda known: abs(known - ratio))


def _budget(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value in PIXEL_BUDGETS):
        return value
    raise ValueError(f"the image size is {str(value)[:40]}; use one of {', '.join(PIXEL_BUDGETS)}")
