"""The command line: quick help without torch, one-line errors, and what `doctor` says."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from var_compressor import cli
from var_compressor.doctor import compute_paths


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["varc", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_help_is_quick_and_imports_no_torch() -> None:
    before = os.times()
    done = run_python(
        "import sys\n"
        "from var_compressor.cli import main\n"
        "sys.argv = ['varc', '--help']\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    assert not {'torch', 'numpy', 'transformers', 'omegaconf'} & sys.modules.keys()\n"
    )
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout
    # processor time, because the wall clock depends on what else runs on this machine
    used = after.children_user - before.children_user + after.children_system
    assert used - before.children_system < 1.0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("recipes/x.yaml: unknown key"), "varc: recipes/x.yaml: unknown key"),
        (ValueError("two\nlines"), "varc: two lines"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.pth"), "varc: x.pth: No"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), "varc: /out: Permission"),
        (OSError(errno.ENOSPC, "No space left on device", "a.bin"), "varc: a.bin: no space left"),
        (OSError("not a checkpoint"), "varc: not a checkpoint"),
    ],
)
def test_an_error_a_user_can_mend_is_one_line(
    error: Exception,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("var_compressor.doctor.examine", fail)
    monkeypatch.delenv("VARC_TRACEBACK", raising=False)
    assert run_main(monkeypatch, "doctor") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(line)
    assert printed.err.count("\n") == 1
    assert printed.out == ""

    monkeypatch.setenv("VARC_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main()


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr("var_compressor.doctor.examine", fail)
    monkeypatch.setattr(sys, "argv", ["varc", "doctor"])
    with pytest.raises(RuntimeError, match="shape mismatch"):
        cli.main()


def test_running_out_of_gpu_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr("var_compressor.doctor.examine", fail)
    monkeypatch.delenv("VARC_TRACEBACK", raising=False)
    assert run_main(monkeypatch, "doctor") == 2
    assert "GPU ran out of memory" in capsys.readouterr().err


def test_ctrl_c_is_one_word_and_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("var_compressor.doctor.examine", interrupt)
    assert run_main(monkeypatch, "doctor") == 130
    assert capsys.readouterr().err == "varc: interrupted\n"


def test_unknown_command_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main(monkeypatch, "dcotor") == 2


def test_doctor_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["python"].split(".")[0] == "3"
    assert report["devices"][0]["name"] == "cpu"
    assert {key: report["paths"][0][key] for key in ("name", "available")} == {
        "name": "reference",
        "available": True,
    }
    assert all(path["reason"] for path in report["paths"])


def test_doctor_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "doctor") == 0
    printed = capsys.readouterr().out
    assert "reference    yes" in printed
    assert "compute paths" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures where there is a GPU")
def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "doctor", "--measure", "infinity-2b") == 2
    assert "nothing to measure: reference everywhere" in capsys.readouterr().err
    assert run_main(monkeypatch, "doctor", "--measure", "infinity-9b") == 2
    assert "infinity-9b: no such directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capability", "ready"),
    [
        (None, set()),
        ((7, 5), set()),
        ((8, 0), {"w4a4", "w4a8-int8", "w4a16", "bf16"}),
        ((8, 7), {"w4a4", "w4a8-int8", "w4a16", "bf16"}),
        ((8, 9), {"w4a4", "w4a8-int8", "w4a8-fp8", "w4a16", "w8a8", "bf16"}),
        ((9, 0), {"w4a4", "w4a8-int8", "w4a8-fp8", "w4a16", "w8a8", "bf16"}),
    ],
)
def test_compute_paths_follow_the_gpu(capability: tuple[int, int] | None, ready: set[str]) -> None:
    paths = compute_paths(capability=capability, has_torch=True, has_triton=True)
    assert {p.name for p in paths if p.available} == {"reference", *ready}
    by_name = {path.name: path.reason for path in paths}
    if capability == (9, 0):
        assert "w4a8-fp8 is faster" in by_name["w4a4"]
    if capability is None:
        assert "no GPU" in by_name["w4a4"]


def test_a_path_says_what_it_lacks() -> None:
    paths = compute_paths(capability=(8, 9), has_torch=True, has_triton=False)
    assert not any(path.available for path in paths if path.name != "reference")
    assert all("triton is not installed" in path.reason for path in paths[1:])


def test_import_offers_names_without_torch() -> None:
    done = run_python(
        "import sys, var_compressor as v\n"
        "assert v.__version__ and 'InfinityPipeline' in dir(v)\n"
        "assert 'torch' not in sys.modules\n"
        "try: v.nothing\n"
        "except AttributeError: pass\n"
        "else: raise SystemExit('no AttributeError')\n"
    )
    assert done.returncode == 0, done.stderr


COMMANDS = sorted(c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "version"])
def test_every_command_shows_an_example(command: str) -> None:
    shown = " ".join(CliRunner().invoke(cli.app, [command, "--help"]).output.split())
    assert f"Example: varc {command} " in shown
