"""docs/EDGE.md says what the code says, and the Dockerfiles name what is there.

`python tests/test_edge.py` writes the outputs in the document again.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import tomlkit
import torch
import typer
from packaging.requirements import Requirement
from typer.testing import CliRunner

from var_compressor import cli, doctor
from var_compressor.devices import SHARED_HOST_BYTES, smallest_device
from var_compressor.footprint import TEXT_WEIGHTS, WEIGHTS, Request, Setup, footprint
from var_compressor.layers.kernel_linear import has_kernels
from var_compressor.layers.linear import QuantizedLinear
from var_compressor.models.config import MODELS
from var_compressor.models.schedule import Schedule
from var_compressor.planning import model_shape
from var_compressor.quant.plan import plan

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "EDGE.md"
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
# what makes an output, and the output
MADE = re.compile(r"^<!-- made: ([^\n]+) -->\n(.*?)^<!-- end -->\n", re.MULTILINE | re.DOTALL)


# --- the outputs in the document ------------------------------------------------------------------


def remade(page: str) -> str:
    """The page with every output made again."""

    def made(found: re.Match[str]) -> str:
        return f"<!-- made: {found[1]} -->\n{output_of(found[1])}<!-- end -->\n"

    return MADE.sub(made, page)


def output_of(marker: str) -> str:
    if marker == "table: compressed":
        return compressed_table()
    if marker == "doctor: sm_87":
        return fenced(orin_paths())
    run = CliRunner().invoke(cli.app, shlex.split(marker)[1:])
    assert run.exception is None, run.exception
    lines = [line.rstrip() for line in run.output.splitlines()]
    return fenced("\n".join(lines).strip("\n"))


def fenced(text: str) -> str:
    return f"```text\n{text}\n```\n"


def compressed_table() -> str:
    """Peaks of W4A4 models, packed; with what a shared memory does not save."""
    rows = [
        "| model | KV cache | | text | draw | VAE | smallest device |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("infinity-2b", "infinity-8b"):
        shape = model_shape(name)
        schedule = Schedule.of(1.0, shape.transformer.pixel_budget)
        request = Request(schedule, batch=1, prompt_tokens=128)
        packed = Setup("w4a4", "int8", 8, True, chunk_tokens=None, strip_rows=256)
        for kv in ("int8", "int4"):
            for chunk_tokens, options in ((None, "`--compute packed`"), (4096, "`--low-memory`")):
                setup = replace(packed, kv=kv, chunk_tokens=chunk_tokens)
                found = footprint(shape, request, setup)
                # on shared memory the host's copy of these weights counts as well
                moved = 0 if chunk_tokens is None else found.stages["text"][TEXT_WEIGHTS]
                device = smallest_device(max(found.peak_bytes, found.stage_bytes["draw"] + moved))
                cells = [f"{value / 2**20:.0f}" for value in found.stage_bytes.values()]
                assert device is not None
                rows.append(
                    f"| {name[-2:].upper()} | {kv.upper()} | {options} | {' | '.join(cells)} "
                    f"| {device.name} |"
                )
    return "\n".join(rows) + "\n"


def orin_paths() -> str:
    paths = doctor.compute_paths(capability=(8, 7), has_torch=True, has_triton=True)
    return "\n".join(
        f"{path.name:<12} {'yes' if path.available else 'no':<4} {path.reason}" for path in paths
    )


def test_every_output_in_the_document_is_what_the_code_prints():
    page = PAGE.read_text()
    made = MADE.findall(page)
    assert len(made) == 11 and all(output for _, output in made)
    again = remade(page)
    for (marker, before), (_, now) in zip(made, MADE.findall(again), strict=True):
        assert before == now, f"{marker}: run `python tests/test_edge.py`"
    assert again == page


def test_the_budget_of_the_8_gb_jetson_is_what_linux_leaves():
    """7.4 GiB that it sees, less what the host takes; the document plans with the difference."""
    assert f"--budget {7.4 - SHARED_HOST_BYTES / 2**30:.2f}GiB" in PAGE.read_text()


@pytest.mark.parametrize("weights", [name for name, spec in WEIGHTS.items() if spec is not None])
def test_weights_that_plans_choose_have_kernels(weights):
    spec = WEIGHTS[weights]
    for row in plan(spec, MODELS["infinity-2b"].transformer).linears:
        N, K = row.shape_NK
        with torch.device("meta"):
            linear = QuantizedLinear(K, N, row.spec, bias_dtype=torch.bfloat16)
        assert has_kernels(linear)


def test_the_document_names_commands_and_options_that_exist():
    lines = re.findall(r"(?:^|varc-cache:\S+ .*?|bin/|`)varc ([^`\n]+)", PAGE.read_text(), re.M)
    assert len(lines) > 10
    for line in lines:
        words = shlex.split(line, comments=True)
        command = commands()[words[0]]
        known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known, line
    mentioned = set(re.findall(r"`(--[a-z-]+)", PAGE.read_text()))
    known = {name for one in commands().values() for p in one.params for name in p.opts}
    # of docker's and pip's
    assert mentioned - known == {"--build-arg", "--no-deps"}


def commands() -> dict:
    return typer.main.get_command(cli.app).commands


def test_tegrastats_lines_are_read_as_the_document_reads_them(tmp_path):
    script = re.search(r"<!-- shell: tegrastats -->\n```bash\n(.*?)```", PAGE.read_text(), re.S)[1]
    rest = "(lfb 5x4MB) SWAP 0/3810MB (cached 0MB) CPU [2%@729,off] GR3D_FREQ 0% VDD_IN 4980mW"
    logs = {"idle": (1502, 1498, 9000, 1500, 1501), "draw": (1500, 5240, 12000, 5239)}
    for name, values in logs.items():
        lines = [f"11-28-2026 10:00:00 RAM {used}/7620MB {rest}\n" for used in values]
        (tmp_path / f"{name}.log").write_text("".join(lines))
    script += 'echo "$(idle idle.log) $(peak draw.log)"'
    run = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    # the median does not mind a line of something else; the peak is a number, not a word
    assert run.stdout == "1501 12000\n", run.stderr


def test_kernels_compile_for_orin_and_fit_its_shared_memory():
    # another process, because this one may have made them to be interpreted
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_edge.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    taken = [int(found) for found in re.findall(r": (\d+) bytes", run.stdout)]
    assert len(taken) == 6
    assert f"at most {max(taken) // 1024} KiB of shared memory" in PAGE.read_text()


# --- the Dockerfiles ------------------------------------------------------------------------------


def instructions(path: Path) -> list[tuple[str, str]]:
    """What a Dockerfile says, line continuations and comments gone."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line]


def read_pyproject() -> dict:
    return tomlkit.parse((ROOT / "pyproject.toml").read_text()).unwrap()["project"]


def reaches_docker(name: str) -> bool:
    """Whether .dockerignore lets a file or folder at the top through; the last match decides."""
    found = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and fnmatch(name, line.removeprefix("!")):
            found = line.startswith("!")
    return found


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_copies_what_is_there_and_builds_the_wheel_from_it(path):
    stages, copied = set(), set()
    for word, rest in instructions(path):
        if word == "FROM" and " AS " in rest:
            stages.add(rest.split(" AS ")[1])
        if word != "COPY":
            continue
        *sources, _ = rest.split()
        if sources[0].startswith("--from="):
            assert sources[0].removeprefix("--from=") in stages
        else:
            assert all((ROOT / source).exists() for source in sources), rest
            assert all(reaches_docker(source) for source in sources), rest
            copied |= set(sources)
    # all that pyproject.toml makes a wheel of
    settings = tomlkit.parse((ROOT / "pyproject.toml").read_text()).unwrap()
    wheel = settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {Path(one).parts[0] for one in (*wheel["packages"], *wheel["force-include"])}
    project = settings["project"]
    needed |= {"pyproject.toml", project["readme"], *project["license-files"]}
    assert needed <= copied and not reaches_docker("tests") and not reaches_docker(".git")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_starts_the_command_as_an_ordinary_user(path):
    project, said = read_pyproject(), instructions(path)
    entry = [rest for word, rest in said if word == "ENTRYPOINT"]
    assert entry == [f'["{next(iter(project["scripts"]))}"]']
    user = [rest for word, rest in said if word == "USER"]
    text = path.read_text()
    assert user == ["varc"] and re.search(r"useradd .*\bvarc\b", text)
    last_run = max(i for i, (word, _) in enumerate(said) if word == "RUN")
    assert said.index(("USER", "varc")) > last_run
    # what is kept is where the command looks for it, and belongs to that user
    (volume,) = [rest for word, rest in said if word == "VOLUME"]
    assert volume == "/home/varc/.cache" and f"install -d -o varc -g varc {volume}" in text
    assert text.count(f"-v varc-cache:{volume}") == text.count("docker run")
    port = {one.name: one.default for one in commands()["studio"].params}["port"]
    assert ("EXPOSE", str(port)) in said


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_installs_the_pinned_versions(path):
    project, text = read_pyproject(), path.read_text()
    pins = (ROOT / "constraints.txt").read_text()
    extras = re.search(r"\*\.whl\)\[([\w,]+)\]", text)[1].split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    runs = [rest for word, rest in instructions(path) if word == "RUN" and "pip install" in rest]
    assert len(runs) == 2
    for run in runs:
        assert re.search(r"pip install -c \S*(constraints|without-torch)\.txt ", run), run
        # versions stand in constraints.txt alone
        assert not re.search(r"pip install[^&]*==", run), run
    for name in ("build", "hatchling", "torch", "triton"):
        assert len(re.findall(rf"^{name}==", pins, re.M)) == 1
    if base := re.search(r"^ARG BASE=\S+/pytorch:(\d+\.\d+)-r36", text, re.M):
        wanted = {Requirement(one).name: Requirement(one) for one in project["dependencies"]}
        assert wanted["torch"].specifier.contains(base[1])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_says_at_its_top_what_was_not_run(path):
    top = path.read_text().split("\nARG ")[0].split("\nFROM ")[0]
    assert "has never been built" in top and all(x.startswith("#") for x in top.splitlines())


if __name__ == "__main__":
    PAGE.write_text(remade(PAGE.read_text()))
