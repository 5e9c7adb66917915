"""`varc evaluate` by several processes: how far it scales, and that kills change no number.

    python benchmarks/evaluation.py scaling --processes 1 2 2 1 --images 512
    python benchmarks/evaluation.py kills --processes 2 --images 5000 --kills 4

Processes take one GPU each, or share the CPU with one thread each. "scaling" draws the same images
with every number of processes and has the reader judge them; its rows are added up over NCCL
(gloo on a CPU); models are loaded and warmed up before the clock starts. "kills" evaluates once
undisturbed, and once more while processes are killed with SIGKILL at random moments, the last time
while images are measured, and the same command is started again; rows and values must be equal to
the bit. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from var_compressor.artifact import write_json
from var_compressor.evaluation.results import read_results, read_rows
from var_compressor.machine import machine_of

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["scaling", "kills"])
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--kills", type=int, default=4, help="while images are drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of kills")
    parser.add_argument("--artifact", type=Path, help="of Infinity-Tiny; default: full precision")
    parser.add_argument("--minutes", type=float, default=3, help="give up after so many")
    parser.add_argument("--out", type=Path, help="JSON to write; default: in benchmarks/results")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        time_here(args)
        return
    deadline = time.monotonic() + 60 * args.minutes
    found = {"scaling": scaling, "kills": kills}[args.what](args, deadline)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    summary = {
        "benchmark": f"evaluation {args.what}",
        "images": args.images,
        "batch": args.batch,
        "model": "infinity-tiny" if args.artifact is None else str(args.artifact),
        **found,
        "machine": {**machine_of(device), "num_gpus": torch.cuda.device_count()},
    }
    write_json(args.out or RESULTS / f"evaluation-{args.what}.json", summary)
    print(json.dumps(summary))


def started(command: Sequence[str], size: int, folder: Path) -> list[subprocess.Popen]:
    """The command in ``size`` processes, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(size):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in places.items()}}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        with (folder / f"printed-{rank}.txt").open("a") as printed:
            processes.append(
                subprocess.Popen(
                    command, cwd=folder, env=environment, stdout=printed, stderr=subprocess.STDOUT
                )
            )
    return processes


def finish(processes: Sequence[subprocess.Popen], folder: Path, deadline: float) -> None:
    """Raises: SystemExit when one fails, or the time is over."""
    try:
        codes = [one.wait(max(0.1, deadline - time.monotonic())) for one in processes]
    except subprocess.TimeoutExpired:
        codes = [None]
    if any(codes) or None in codes:
        for one in processes:
            one.kill()
        printed = (folder / "printed-0.txt").read_text()[-2000:]
        raise SystemExit(f"exit codes {codes} (None: out of time)\n{printed}")


# --- scaling --------------------------------------------------------------------------------------


def scaling(args: argparse.Namespace, deadline: float) -> dict:
    runs = []
    print(f"{'processes':>10}{'drawing s':>12}{'images/s':>11}{'measuring s':>13}")
    for size in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            times = Path(folder) / "times.json"
            command = [sys.executable, str(Path(__file__).absolute()), "scaling"]
            command += ["--images", str(args.images), "--batch", str(args.batch)]
            command += ["--worker", str(times)]
            if args.artifact is not None:
                command += ["--artifact", str(args.artifact.absolute())]
            finish(started(command, size, Path(folder)), Path(folder), deadline)
            run = {"processes": size, **json.loads(times.read_text())}
        run["images_per_s"] = args.images / run["drawing_s"]
        runs.append(run)
        print(
            f"{size:>10}{run['drawing_s']:>12.2f}{run['images_per_s']:>11.2f}"
            f"{run['measuring_s']:>13.2f}"
        )
    found = efficiencies(runs)
    for size, efficiency in found.items():
        print(f"{size} processes: {efficiency:.1%} of what as many alone would draw (medians)")
    return {"runs": runs, "efficiency": found}


def efficiencies(runs: Sequence[dict]) -> dict[int, float]:
    """Images per second and process over those of the fewest processes; by medians of runs."""
    seconds: dict[int, list[float]] = {}
    for run in runs:
        seconds.setdefault(run["processes"], []).append(run["drawing_s"])
    work = {size: size * median(found) for size, found in sorted(seconds.items())}
    fewest = next(iter(work.values()))
    return {size: fewest / one for size, one in list(work.items())[1:]}


def silently(*_: object) -> None:
    """Progress and notes that nobody reads."""


def time_here(args: argparse.Namespace) -> None:
    """One process of a timed run; the first one writes the times."""
    from var_compressor.compress import choose_device
    from var_compressor.evaluation.benchmarks import open_benchmarks
    from var_compressor.evaluation.gallery import Gallery
    from var_compressor.evaluation.measuring import Drawn, measure_rows
    from var_compressor.evaluation.runner import Plan, PromptSet, draw_sets
    from var_compressor.evaluation.sharding import crew_of_environment
    from var_compressor.evaluation.subject import AS_CALIBRATED, model_of
    from var_compressor.layers.switches import Switches
    from var_compressor.models.sampling import Sampling
    from var_compressor.quant.team import local_device
    from var_compressor.recipe import load_recipe

    recipe = load_recipe(["recipes/model/infinity-tiny.yaml"], [])
    model, _ = model_of(recipe, args.artifact, Switches(), compute=AS_CALIBRATED, prompt_cache=None)
    device = local_device(choose_device("auto"))
    sampling = Sampling(cfg=2.0, tau=0.3)
    with crew_of_environment(device) as crew:
        pipeline, schedule = model.open(), model.schedule(recipe)
        samples = open_benchmarks(["tiny"], Path())[0].choose(args.images, seed=0)
        # the first compiles, the second records graphs, the third replays them
        for _ in range(3):
            texts = [sample.prompt for sample in samples[: args.batch]]
            pipeline.generate(texts, seed=list(range(len(texts))), sampling=sampling)
        prompts = PromptSet("tiny", samples)
        gallery = Gallery(Path("images"), "timed", {"seed": 0})
        plan = Plan(schedule, sampling, args.batch)
        crew.gathered(None)
        began = time.perf_counter()
        ways = {"crew": crew, "on_progress": silently}
        draw_sets(gallery, [prompts], plan, opened=lambda: pipeline, note=silently, **ways)
        drawing_s = time.perf_counter() - began
        began = time.perf_counter()
        drawn = [Drawn(prompts, gallery, None)]
        measure_rows("caption_accuracy", drawn, weights_dir=None, rows_root=Path("rows"), **ways)
        measuring_s = time.perf_counter() - began
        if crew.is_first:
            backend = "nothing to add up"
            if crew.size > 1:
                backend = torch.distributed.get_backend(crew.group)
            write_json(
                args.worker,
                {"drawing_s": drawing_s, "measuring_s": measuring_s, "reduced_by": backend},
            )


# --- kills ----------------------------------------------------------------------------------------


def kills(args: argparse.Namespace, deadline: float) -> dict:
    dice, size = random.Random(args.seed), args.processes[-1]
    metrics = ["caption_accuracy", "reader_fid"]
    words = [
        "recipes/model/infinity-tiny.yaml",
        "recipes/collect/tiny.yaml",
        "--benchmarks",
        "tiny",
    ]
    words += ["--num-samples", str(args.images), "--batch", str(args.batch)]
    if args.artifact is not None:
        words += ["--artifact", str(args.artifact.absolute())]
        metrics += ["psnr", "ssim"]
    command = [sys.executable, "-m", "var_compressor.cli", "evaluate", *words]
    command += ["--gen-root", "images", "--out", "results", "--metrics", *metrics]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        quiet, rough = Path(one), Path(other)
        began = time.monotonic()
        finish(started(command, size, quiet), quiet, deadline)
        quiet_s = time.monotonic() - began
        total, killed_at = num_images(quiet), []
        moments = sorted(dice.randrange(total // 20, total * 19 // 20) for _ in range(args.kills))
        for moment in [*moments, total]:
            processes = started(command, size, rough)
            # the last one dies while images are measured
            while time.monotonic() < deadline and not (
                num_images(rough) >= moment and (moment < total or num_row_files(rough))
            ):
                time.sleep(0.2)
            # one at random; the launcher takes the others down a moment later
            dice.shuffle(processes)
            processes[0].send_signal(signal.SIGKILL)
            time.sleep(dice.random())
            for process in processes:
                process.kill()
                process.wait()
            killed_at.append(num_images(rough))
            print(f"killed at {killed_at[-1]} of {total} images")
        before_end = not (rough / "results").exists()
        written = stamps(rough)
        finish(started(command, size, rough), rough, deadline)
        finished = stamps(rough)
        kept = sum(finished.get(name) == stamp for name, stamp in written.items())
        equal = same_numbers(quiet / "results", rough / "results")
        values = read_results(rough / "results").benchmarks["tiny"].metrics
    for name, found in values.items():
        print(f"{name:<18}{found.value:>10.4f}  [{found.low:.4f}, {found.high:.4f}]")
    print(f"{kept} of {len(written)} images kept; numbers {'equal' if equal else 'DIFFER'}")
    print(f"the last kill was {'before' if before_end else 'AFTER'} the end of measuring")
    return {
        "processes": size,
        "undisturbed_s": quiet_s,
        "images_drawn": total,
        "killed_at": killed_at,
        "last_kill_while_measuring": before_end,
        "kept": kept,
        "equal": equal,
        "values": {name: found.value for name, found in values.items()},
    }


def num_images(folder: Path) -> int:
    return sum(1 for _ in (folder / "images").rglob("test-*.png"))


def num_row_files(folder: Path) -> int:
    return sum(1 for _ in (folder / "images" / "rows").rglob("*.safetensors"))


def stamps(folder: Path) -> dict[Path, int]:
    return {
        path.relative_to(folder): path.stat().st_mtime_ns
        for path in (folder / "images").rglob("test-*.png")
    }


def same_numbers(a: Path, b: Path) -> bool:
    """Whether every row and every value is the same, to the bit."""
    rows = [read_rows(one) for one in (a, b)]
    found = [read_results(one).benchmarks["tiny"] for one in (a, b)]
    return (
        rows[0].keys() == rows[1].keys()
        and all(torch.equal(rows[0][name], rows[1][name]) for name in rows[0])
        and found[0].metrics == found[1].metrics
        and found[0].ids == found[1].ids
    )


if __name__ == "__main__":
    main()
