"""Prompt sets: id → text, from a file or from the sets that come with the package."""

from __future__ import annotations

import csv
import io
import json
import random
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_BUILT_IN = Path(__file__).parent / "assets" / "prompts"
SUFFIXES = (".yaml", ".yml", ".json", ".jsonl", ".txt", ".csv")
# of what should be a text: a nest of aliases is short in YAML, and endless when written out
_short = reprlib.Repr()
_short.maxlevel = 2
_KEYS = ("id", "prompt", "image")
# thousands of long prompts take the one in Python half a minute
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file; ``image`` is the path that it names, as it stands there."""

    id: str
    text: str
    image: str | None = None


def built_in_sets() -> list[str]:
    """Names that `load_prompts` takes instead of a file."""
    return sorted(path.stem for path in _BUILT_IN.glob("*.yaml"))


def load_prompts(source: str) -> dict[str, str]:
    """The prompts of a built-in set, or of a file; see `read_prompts`.

    Raises ValueError naming the file when it can't be used, or holds an empty prompt.
    """
    prompts = read_prompts(source)
    for prompt in prompts:
        if not prompt.text:
            raise ValueError(f"{source}: prompt {prompt.id!r} is not a text: it is empty")
    return {prompt.id: prompt.text for prompt in prompts}


def read_prompts(source: str) -> list[Prompt]:
    """The lines of a built-in set, or of a .yaml, .json, .jsonl, .txt or .csv file.

    A text file holds one prompt per line, a CSV file a column `prompt`, a JSONL file an object with
    `prompt` per line; YAML and JSON hold a mapping id → text, or a list of texts. Columns or keys
    `id` and `image` (a picture that fits the prompt) may be there; a YAML or JSON entry that has
    them is a mapping instead of a text. Prompts without an id are numbered. Texts may be empty.
    Raises ValueError naming the file when it can't be used.
    """
    path = _BUILT_IN / f"{source}.yaml" if source in built_in_sets() else Path(source)
    if not path.is_file():
        sets = ", ".join(built_in_sets())
        raise ValueError(f"{source}: no such prompt file, nor a built-in set ({sets})")
    try:
        data = _parsed(path)
    except (
        yaml.YAMLError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        csv.Error,
        RecursionError,
    ) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable {path.suffix[1:]} file: {reason}") from error
    if isinstance(data, list):
        numbered = [(f"{i:04d}", entry) for i, entry in enumerate(data)]
    elif isinstance(data, dict):
        numbered = [(str(key), entry) for key, entry in data.items()]
    else:
        numbered = []
    if not numbered:
        raise ValueError(f"{path}: expected prompts as a list or as id: text, found none")
    prompts = [_prompt(path, key, entry) for key, entry in numbered]
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(f"{path}: prompt {prompt.id!r} is there twice; give it another id")
        seen.add(prompt.id)
    return prompts


def select_prompts(prompts: dict[str, str], *, num_prompts: int, seed: int) -> dict[str, str]:
    """`num_prompts` of them, drawn by `seed` and sorted by id."""
    if num_prompts > len(prompts):
        raise ValueError(f"asked for {num_prompts} prompts, but there are only {len(prompts)}")
    chosen = random.Random(seed).sample(sorted(prompts), num_prompts)
    return {prompt_id: prompts[prompt_id] for prompt_id in sorted(chosen)}


def _prompt(path: Path, key: str, entry: Any) -> Prompt:
    if isinstance(entry, str):
        return Prompt(key, entry.strip())
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: prompt {key!r} is not a text: {_short.repr(entry)}")
    name = str(key if entry.get("id") in (None, "") else entry["id"])
    text, image = entry.get("prompt"), entry.get("image") or None
    if not isinstance(text, str):
        raise ValueError(f"{path}: prompt {name!r} is not a text: {_short.repr(text)}")
    if image is not None and not isinstance(image, str):
        raise ValueError(f"{path}: image of prompt {name!r} is not a path: {_short.repr(image)}")
    return Prompt(name, text.strip(), image)


def _parsed(path: Path) -> Any:
    text = path.read_text(encoding="utf-8-sig")
    match path.suffix:
        case ".yaml" | ".yml":
            try:
                return yaml.load(text, Loader=_Loader)
            except ValueError as error:
                # of a date that is none
                raise yaml.YAMLError(str(error)) from None
        case ".json":
            return json.loads(text)
        case ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        case ".txt":
            return [line for line in text.splitlines() if line.strip()]
        case ".csv":
            return _parsed_csv(path, text)
    raise ValueError(f"{path}: expected a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")


def _parsed_csv(path: Path, text: str) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(text))
    columns = reader.fieldnames or []
    if "prompt" not in columns:
        raise ValueError(f"{path}: has no column 'prompt', only {list(columns)}")
    return [{key: row[key] for key in _KEYS if key in columns} for row in reader]
