"""Prompt sets: id → text, from a file or from the sets that come with the package."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import yaml

_BUILT_IN = Path(__file__).parent / "assets" / "prompts"


def built_in_sets() -> list[str]:
    """Names that `load_prompts` takes instead of a file."""
    return sorted(path.stem for path in _BUILT_IN.glob("*.yaml"))


def load_prompts(source: str) -> dict[str, str]:
    """The prompts of a built-in set, or of a .yaml, .json, .txt or .csv file.

    YAML and JSON hold a mapping id → text or a list of texts, a text file one prompt per line, a
    CSV file a column `prompt` and perhaps a column `id`. Prompts without an id are numbered.
    Raises ValueError naming the file when it can't be used.
    """
    path = _BUILT_IN / f"{source}.yaml" if source in built_in_sets() else Path(source)
    if not path.is_file():
        sets = ", ".join(built_in_sets())
        raise ValueError(f"{source}: no such prompt file, nor a built-in set ({sets})")
    try:
        data = _parsed(path)
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable {path.suffix[1:]} file: {reason}") from error
    if isinstance(data, list):
        data = {f"{i:04d}": text for i, text in enumerate(data)}
    if not isinstance(data, dict) or not data:
        raise ValueError(f"{path}: expected prompts as a list or as id: text, found none")
    for prompt_id, text in data.items():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}: prompt {prompt_id!r} is not a text: {text!r}")
    return {str(prompt_id): text.strip() for prompt_id, text in data.items()}


def select_prompts(prompts: dict[str, str], *, num_prompts: int, seed: int) -> dict[str, str]:
    """`num_prompts` of them, drawn by `seed` and sorted by id."""
    if num_prompts > len(prompts):
        raise ValueError(f"asked for {num_prompts} prompts, but there are only {len(prompts)}")
    chosen = random.Random(seed).sample(sorted(prompts), num_prompts)
    return {prompt_id: prompts[prompt_id] for prompt_id in sorted(chosen)}


def _parsed(path: Path) -> Any:
    text = path.read_text(encoding="utf-8-sig")
    match path.suffix:
        case ".yaml" | ".yml":
            return yaml.safe_load(text)
        case ".json":
            return json.loads(text)
        case ".txt":
            return [line for line in text.splitlines() if line.strip()]
        case ".csv":
            return _parsed_csv(path, text)
    raise ValueError(f"{path}: expected a .yaml, .json, .txt or .csv file")


def _parsed_csv(path: Path, text: str) -> list[str] | dict[str, str]:
    reader = csv.DictReader(io.StringIO(text))
    columns = reader.fieldnames or []
    if "prompt" not in columns:
        raise ValueError(f"{path}: has no column 'prompt', only {list(columns)}")
    rows = list(reader)
    if "id" not in columns:
        return [row["prompt"] for row in rows]
    return {row["id"]: row["prompt"] for row in rows}
