"""Steps of a long command: each is skipped when it stands finished with the same inputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from var_compressor.artifact import write_json


class Steps:
    """Finished steps of the directory ``out``, by name; what each was done with is in a file.

    ``tell`` gets one line per step.
    """

    def __init__(self, out: Path, *, tell: Callable[[str], None]) -> None:
        self.folder = out / "steps"
        self.out, self.tell = out, tell

    def run(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[Path],
        work: Callable[[], object],
    ) -> bool:
        """Do ``work`` unless it was done with these ``inputs`` (as JSON takes them) and its
        ``outputs`` are there; whether it was done now.
        """
        record = self.folder / f"{name}.json"
        wanted = json.loads(json.dumps(inputs))
        if _content(record) == wanted and all(path.exists() for path in outputs):
            self.tell(f"{name}: done before")
            return False
        record.unlink(missing_ok=True)
        self.tell(f"{name}: begun")
        work()
        write_json(record, wanted)
        return True


def _content(record: Path) -> Any:
    """Of a step's file; None when there is none, or it is not readable."""
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
