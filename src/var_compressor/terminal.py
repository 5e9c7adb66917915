"""What people see while a command runs and when it is done: bars, tables, warnings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from rich.progress import TaskID

    from var_compressor.bench.session import Result
    from var_compressor.models.directory import OnTensor
    from var_compressor.planning import MemoryPlan
    from var_compressor.quant.calibration import Progress as OnProgress
    from var_compressor.quant.plan import Plan

MAX_WARNINGS = 10
# of tables that no terminal limits
PIPE_WIDTH = 160


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[OnProgress]:
    """A bar per stage on stderr, with the time left; `on_progress(stage, done, total)` moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True, quiet=quiet)
    with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield on_progress


@contextmanager
def byte_progress(what: str, total_bytes: int) -> Iterator[OnTensor]:
    """A bar on stderr that counts bytes, and goes away when all are there."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total_bytes)
        yield lambda name, num_bytes: bars.advance(task, num_bytes)


def print_plan(planned: Plan, *, as_json: bool, stderr: bool) -> None:
    """What becomes of each linear, and the bytes that it saves."""
    from var_compressor.quant.plan import COLUMNS, table_rows

    if as_json:
        typer.echo(json.dumps(planned.to_dict()))
        return
    print_table(COLUMNS, table_rows(planned), stderr=stderr)


def print_memory_plan(planned: MemoryPlan, *, as_json: bool) -> None:
    """A setup, and the bytes of its parts in each stage. As JSON: tables go to stderr."""
    from var_compressor import planning

    choice = planning.setup_rows(planned.setup)
    print_table(("setup", planned.model), choice, stderr=as_json)
    print_table(planning.COLUMNS, planning.table_rows(planned), stderr=as_json)
    typer.echo(planning.verdict(planned), err=as_json)
    if as_json:
        typer.echo(json.dumps(planned.to_dict()))


def print_run(out: Path, before_bytes: int, after_bytes: int, *, as_json: bool) -> None:
    """What a finished run did. As JSON: one object, and all the rest on stderr."""
    from var_compressor.quant import report as reports

    report, timing = reports.read_report(out)
    warnings, seconds = reports.all_warnings(report), reports.stage_seconds(timing)
    lines = [f"warning: {warning}" for warning in warnings[:MAX_WARNINGS]]
    if len(warnings) > MAX_WARNINGS:
        lines.append(f"and {len(warnings) - MAX_WARNINGS} more in {out / reports.REPORT_FILE}")
    lines.append("time: " + ", ".join(f"{stage} {time:.1f} s" for stage, time in seconds.items()))
    if rows := reports.summary_rows(report, timing):
        print_table(reports.SUMMARY_COLUMNS, rows, stderr=as_json)
        plot = out / reports.PLOT_FILE
        is_drawn = reports.write_plot(report, timing, plot)
        lines.append(
            f"wrote {plot}" if is_drawn else "no plot: pip install 'var-compressor[plots]'"
        )
    lines.append(f"wrote {out}: transformer {after_bytes / 2**20:.1f} MiB")
    typer.echo("\n".join(lines), err=as_json)
    if as_json:
        found = {
            "out": str(out),
            "before_bytes": before_bytes,
            "after_bytes": after_bytes,
            "snr_db": reports.final_snr_db(report),
            "num_warnings": len(warnings),
            "seconds": seconds,
        }
        typer.echo(json.dumps(found))


def print_bench(result: Result, out: Path, *, as_json: bool) -> None:
    """Write the results, show them, and end with one line of JSON; as JSON: that line alone."""
    from var_compressor.artifact import write_json
    from var_compressor.bench import report
    from var_compressor.bench.picture import write_picture

    results, picture = out / report.RESULTS_FILE, out / report.PICTURE_FILE
    write_json(results, report.to_json(result))
    is_drawn = write_picture(result, picture)
    print_table(report.columns(result), report.table_rows(result), stderr=as_json)
    lines = [*report.compute_lines(result), *(f"note: {note}" for note in result.notes)]
    lines.append(f"wrote {results}" + (f" and {picture}" if is_drawn else ""))
    if not is_drawn:
        lines.append("no picture: pip install 'var-compressor[plots]'")
    typer.echo("\n".join(lines), err=as_json)
    typer.echo(json.dumps(report.summary(result, out)))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, stderr: bool) -> None:
    """A table of texts; columns of numbers are aligned on the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        is_text = any(row[place][:1].isalpha() for row in rows)
        table.add_column(column, justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(stderr=stderr, markup=False, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    console.print(table)
