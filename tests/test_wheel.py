"""The wheel, installed where nothing of the checkout can be seen, draws, compresses and describes
itself as the checkout does.

torch and the other dependencies come from the environment of the tests, by a path file: fetching
them again takes minutes. So what an installer makes of Requires-Dist is not proved here; that they
say what pyproject.toml says is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import tomlkit
from packaging.requirements import Requirement
from PIL import Image

pytest.importorskip("build", reason="building needs the extra dev")

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "var_compressor"
MIB = 2**20
# Infinity-Tiny and its reader are 36 MiB of weights; a golden file or a picture would show
MAX_WHEEL_BYTES, MAX_SDIST_BYTES = 32 * MIB, 60 * MIB

THREE_LINES = """\
from var_compressor import InfinityPipeline
pipe = InfinityPipeline.from_pretrained("infinity-tiny")
pipe.generate(["a tiny yellow star on a checkerboard."], seed=0).pil[0].save("star.png")
"""


@dataclass(frozen=True)
class Built:
    """What `python -m build` made: an sdist, a wheel out of it, and one out of the checkout."""

    sdist: Path
    wheel: Path
    wheel_of_checkout: Path


def run(*command: str | Path, cwd: Path) -> str:
    """What it printed; nothing of the caller's environment points to the checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    kept |= {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    out = tmp_path_factory.mktemp("built")
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--outdir", out / "both", ROOT, cwd=out)
    run(*build, "--wheel", "--outdir", out / "direct", ROOT, cwd=out)
    (sdist,) = (out / "both").glob("*.tar.gz")
    (wheel,) = (out / "both").glob("*.whl")
    (direct,) = (out / "direct").glob("*.whl")
    return Built(sdist, wheel, direct)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The folder of programs of an environment with the wheel alone in it."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    programs = folder / "bin"
    pip = (sys.executable, "-m", "pip", "--python", programs / "python")
    run(*pip, "install", "-q", "--no-deps", "--no-index", built.wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    # behind the environment's own folder; the path files that it holds, of an editable install
    # among them, are not read
    paths = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site / "dependencies.pth").write_text("\n".join(paths) + "\n")
    return programs


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def files_of(folder: Path) -> dict[str, bytes]:
    """By path below it, without what Python and tools leave there."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def read_pyproject() -> dict:
    return tomlkit.parse((ROOT / "pyproject.toml").read_text()).unwrap()["project"]


def test_the_sdist_gives_the_wheel_that_the_checkout_gives(built):
    assert content(built.wheel) == content(built.wheel_of_checkout)


def test_the_wheel_holds_the_package_its_recipes_and_the_licence_and_nothing_else(built):
    found = content(built.wheel)
    (info,) = {name.split("/")[0] for name in found} - {"var_compressor"}
    inside = {name: found[name] for name in found if not name.startswith(info)}
    expected = {f"var_compressor/{name}": data for name, data in files_of(PACKAGE).items()}
    recipes = files_of(ROOT / "recipes")
    expected |= {f"var_compressor/recipes/{name}": data for name, data in recipes.items()}
    assert inside.keys() == expected.keys()
    assert [name for name in inside if inside[name] != expected[name]] == []
    assert found[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert not any(PurePosixPath(name).parts[1] == "tests" for name in inside)


def test_the_sdist_holds_what_builds_and_tests_it(built):
    with tarfile.open(built.sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    for wanted in ("pyproject.toml", "LICENSE", "README.md", "constraints.txt", "docs/EDGE.md"):
        assert wanted in names
    tests = {f"tests/{name}" for name in files_of(ROOT / "tests")}
    assert tests <= names
    assert not any(name.startswith((".git/", ".venv", "out/")) for name in names)


def test_neither_grows_unnoticed(built):
    sizes = {path.name: path.stat().st_size for path in (built.wheel, built.sdist)}
    print({name: f"{size / MIB:.1f} MiB" for name, size in sizes.items()})
    assert sizes[built.wheel.name] <= MAX_WHEEL_BYTES, sizes
    assert sizes[built.sdist.name] <= MAX_SDIST_BYTES, sizes


def test_the_metadata_says_what_pyproject_says(built):
    found, project = content(built.wheel), read_pyproject()
    (info,) = {name.split("/")[0] for name in found} - {"var_compressor"}
    metadata = message_from_bytes(found[f"{info}/METADATA"])
    assert metadata["Name"] == project["name"]
    assert metadata["Requires-Python"] == project["requires-python"]
    assert metadata["License-Expression"] == project["license"]
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])

    wanted = [Requirement(one) for one in project["dependencies"]]
    for extra, listed in project["optional-dependencies"].items():
        for one in listed:
            requirement = Requirement(one)
            if requirement.name == project["name"]:
                # the backend writes out the extras that an extra is made of
                parts = [project["optional-dependencies"][part] for part in requirement.extras]
                wanted += [of_extra(line, extra) for part in parts for line in part]
            else:
                wanted.append(of_extra(one, extra))
    given = {canonical(Requirement(one)) for one in metadata.get_all("Requires-Dist")}
    assert given == {canonical(one) for one in wanted}

    scripts = "".join(f"{name} = {where}\n" for name, where in project["scripts"].items())
    assert found[f"{info}/entry_points.txt"].decode() == f"[console_scripts]\n{scripts}"


def of_extra(line: str, extra: str) -> Requirement:
    return Requirement(f"{line}; extra == '{extra}'")


def canonical(requirement: Requirement) -> tuple[str, frozenset[str], str]:
    name = requirement.name.lower().replace("_", "-")
    return name, frozenset(map(str, requirement.specifier)), str(requirement.marker)


def test_three_lines_draw_the_checkouts_image(installed, tmp_path):
    of_checkout = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n" + THREE_LINES
    images = []
    for python, program, home in (
        (installed / "python", THREE_LINES, installed.parent),
        (sys.executable, of_checkout, PACKAGE),
    ):
        where = "import var_compressor; print(var_compressor.__file__)"
        origin = Path(run(python, "-c", program + where, cwd=tmp_path).strip())
        assert origin.is_relative_to(home), origin
        with Image.open(tmp_path / "star.png") as image:
            images.append(np.asarray(image))
        (tmp_path / "star.png").unlink()
    assert images[0].shape == (256, 256, 3) and images[0].std() > 10
    np.testing.assert_array_equal(*images)


def test_the_command_knows_its_version_and_its_recipes(installed, built, tmp_path):
    version = built.wheel.name.split("-")[1]
    assert run(installed / "varc", "version", cwd=tmp_path) == f"var-compressor {version}\n"
    where = "from var_compressor import recipe; print(recipe.recipes_dir())"
    found = Path(run(installed / "python", "-c", where, cwd=tmp_path).strip())
    assert found.is_relative_to(installed.parent)
    assert files_of(found) == files_of(ROOT / "recipes")
    recipes = ("recipes/model/infinity-tiny.yaml", "recipes/collect/tiny.yaml")
    run(installed / "varc", "quantize", *recipes, "--plan", cwd=tmp_path)


def test_the_demo_runs(installed, tmp_path):
    quick = (
        *("collect.num_prompts=1", "quant.smooth.num_grids=2", "quant.low_rank.max_iters=1"),
        *("model.device=cpu", "model.dtype=float32"),
    )
    printed = run(installed / "varc", "demo", "--num-prompts", "1", *quick, cwd=tmp_path)
    written = tmp_path / "out" / "demo"
    assert json.loads(printed.splitlines()[-1]) == json.loads((written / "result.json").read_text())
    assert (written / "index.html").stat().st_size > 10_000
    # an artifact that the installed package made, from a model that lies inside it, opens again
    drawn = ("a small blue ball on a wooden floor.", "--model", written / "artifact")
    run(installed / "varc", "generate", *drawn, "--out", "ball.png", cwd=tmp_path)
    with Image.open(tmp_path / "ball.png") as image:
        assert np.asarray(image).std() > 10
