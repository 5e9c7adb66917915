"""Programs in processes of their own, as torchrun starts them, but torch imported only once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "var_compressor.cli",
        "var_compressor.evaluation.evaluate",
        "transformers.models.t5.modeling_t5",
    ]
)


VARC = "from var_compressor.cli import main; main()"


@dataclass
class Started:
    """A running program; what it prints goes to a file."""

    process: BaseProcess
    printed: Path

    def wait(self, seconds: float = 200) -> tuple[int | None, str]:
        """Exit code (None: still running) and what it said."""
        self.process.join(seconds)
        return self.process.exitcode, self.printed.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def start(words: Sequence[str], folders: Sequence[Path], *, program: str = VARC) -> list[Started]:
    """One process per folder, which it works in; they are a team when there are several."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        printed = folder / f"printed-{rank}.txt"
        printed.write_text("")
        process = _CONTEXT.Process(
            target=_run,
            args=(program, list(words), str(folder), str(printed), rank, len(folders), port),
        )
        process.start()
        started.append(Started(process, printed))
    return started


def _run(
    program: str, words: list[str], folder: str, printed: str, rank: int, size: int, port: int
) -> None:
    import torch

    out = os.open(printed, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
    os.chdir(folder)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    sys.argv = ["varc", *words]
    exec(program, {})
