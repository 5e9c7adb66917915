"""What `varc bench` found, as a table, a picture, JSON, and one line of JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from var_compressor.bench.kinds import ATTENTION, KINDS, LINEAR
from var_compressor.bench.session import Measured, Result
from var_compressor.bench.timing import Run, Spread

RESULTS_FILE, PICTURE_FILE = "results.json", "bench.png"
MIB = 2**20
_ABSENT = "-"


@dataclass(frozen=True)
class Row:
    """A line of the table; ``gain`` is the baseline's value over the first one's."""

    label: str
    values: tuple[str, ...]
    gain: str = ""


def columns(result: Result) -> list[str]:
    names = [one.name for one in result.measured]
    return ["", *names, *(["gain"] if len(names) > 1 else [])]


def table_rows(result: Result) -> list[list[str]]:
    """Times as median (lowest–highest) of all runs, then speed, memory and energy."""
    rows = [*_time_rows(result), *_speed_rows(result), *_memory_rows(result)]
    has_gain = len(result.measured) > 1
    return [[row.label, *row.values, *([row.gain] if has_gain else [])] for row in rows]


def _time_rows(result: Result) -> list[Row]:
    def spread(label: str, seconds: Callable[[Run], float]) -> Row:
        found = [Spread.of([seconds(run) for run in one.runs]) for one in result.measured]
        return _compared(label, [one.median for one in found], [_ms_spread(one) for one in found])

    rows = [spread("prompt to PNG", lambda run: run.total_s)]
    rows.append(spread("text encoding", lambda run: run.text_s))
    for index, (height, width) in enumerate(result.levels):
        in_level = partial(_level_seconds, index)
        rows.append(spread(f"level {index}, {height}×{width}", in_level))
    rows.append(spread("all levels", lambda run: run.draw_s))
    sampling = [sum(one.sampling_s) for one in result.measured]
    rows.append(_compared("of it sampling, timed alone", sampling, map(_ms, sampling)))
    rows.append(spread("VAE decoding", lambda run: run.vae_s))
    rows.append(spread("writing PNG", lambda run: run.png_s))
    for kind in KINDS:
        seconds = [one.by_kind.seconds[kind] for one in result.measured]
        rows.append(_compared(f"all levels: {kind}, profiled", seconds, map(_ms, seconds)))
    rows.append(_plain("opening", [f"{one.open_s:.1f} s" for one in result.measured]))
    warm_ups = [" + ".join(f"{s:.1f}" for s in one.warm_up_s) for one in result.measured]
    return [*rows, _plain("warm-up runs", [f"{text} s" for text in warm_ups])]


def _speed_rows(result: Result) -> list[Row]:
    found = [speeds(one, result) for one in result.measured]
    limits = result.ceilings
    rows = []
    for kind in (LINEAR, ATTENTION):
        label = f"{kind}, TFLOP/s (of {limits.matmul_ops_s / 1e12:.1f} in {limits.dtype})"
        values = [_share(one[f"{kind}_ops_s"], limits.matmul_ops_s, 1e12) for one in found]
        rows.append(_plain(label, values))
    if limits.fp8_ops_s is not None:
        label = f"linear, TFLOP/s (of {limits.fp8_ops_s / 1e12:.1f} in fp8)"
        values = [_share(one["linear_ops_s"], limits.fp8_ops_s, 1e12) for one in found]
        rows.append(_plain(label, values))
    label = f"weights and cache, GB/s (of {limits.copy_bytes_s / 1e9:.1f} copying)"
    values = [_share(one["bytes_s"], limits.copy_bytes_s, 1e9) for one in found]
    return [*rows, _plain(label, values)]


def _memory_rows(result: Result) -> list[Row]:
    memories = [one.memory for one in result.measured]
    on_gpu = result.machine["device"] != "cpu"
    sizes = {name: [one.parts[name] for one in memories] for name in memories[0].parts}
    what = "allocated" if on_gpu else "resident"
    for stage in memories[0].stage_peaks:
        sizes[f"peak {what}, {stage}"] = [one.stage_peaks[stage] for one in memories]
    if any(sizes["text encoder"]):
        sizes["peak without text encoder, computed"] = [one.peak_released for one in memories]
    if on_gpu:
        sizes["peak reserved"] = [one.reserved for one in memories]
    counted = "as the driver counts" if on_gpu else "with Python and its libraries"
    sizes[counted] = [one.driver for one in memories]
    rows = [
        _compared(f"{label}, MiB", found, [f"{size / MIB:.1f}" for size in found])
        for label, found in sizes.items()
    ]
    rows += _prediction_rows(result)
    rows.append(_plain("fits into", [fitting_device(one.peak) or _ABSENT for one in memories]))
    joules = [one.joules_per_run for one in result.measured]
    if None not in joules:
        batch = result.settings.batch
        known = [one / batch for one in joules if one is not None]
        rows.append(_compared("energy per image, J", known, [f"{one:.1f}" for one in known]))
    return rows


def _prediction_rows(result: Result) -> list[Row]:
    """Predicted peaks of each stage, and how far they are from the measured ones."""
    rows = []
    for stage in result.measured[0].predicted_peaks:
        texts = []
        for one in result.measured:
            predicted, found = one.predicted_peaks[stage], one.memory.stage_peaks[stage]
            texts.append(f"{predicted / MIB:.1f} ({100 * (predicted / found - 1):+.1f} %)")
        rows.append(_plain(f"peak predicted, {stage}, MiB", texts))
    return rows


def speeds(one: Measured, result: Result) -> dict[str, float | None]:
    """Operations per second of each kind's own time, and bytes per second of drawing."""
    draw_s = Spread.of([run.draw_s for run in one.runs]).median
    num_bytes = one.work.weight_bytes + one.work.cache_bytes
    seconds = one.by_kind.seconds
    return {
        "linear_ops_s": _per_second(one.work.linear_ops, seconds[LINEAR]),
        "attention_ops_s": _per_second(one.work.attention_ops, seconds[ATTENTION]),
        "bytes_s": _per_second(num_bytes, draw_s),
    }


def compute_lines(result: Result) -> list[str]:
    """Which products ran how, and why: a line per way."""
    lines = []
    for one in result.measured:
        ways: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for product in one.compute:
            ways.setdefault((product["path"], product["why"]), []).append(product)
        for (path, why), products in ways.items():
            tokens = [product["M"] for product in products]
            kinds = sorted({product["linear"] for product in products})
            places = f"{len(products)} products, M {min(tokens)}–{max(tokens)}"
            lines.append(f"{one.name}: {path} for {places} ({', '.join(kinds)}): {why}")
    return lines


def fitting_device(num_bytes: int) -> str | None:
    """The smallest common device with so much memory."""
    from var_compressor.planning import smallest_device

    found = smallest_device(num_bytes)
    return None if found is None else found.name


def to_json(result: Result) -> dict[str, Any]:
    """All raw values, and what the table derives from them."""
    derived = {
        one.name: {**speeds(one, result), "fits_into": fitting_device(one.memory.peak)}
        for one in result.measured
    }
    return {**result.to_dict(), "derived": derived}


def summary(result: Result, out: Path) -> dict[str, Any]:
    """The last line."""
    first, *others = result.measured
    totals = [Spread.of([run.total_s for run in one.runs]) for one in result.measured]
    draws = [Spread.of([run.draw_s for run in one.runs]) for one in result.measured]
    return {
        "model": first.name,
        "device": result.machine["name"],
        "seconds": totals[0].median,
        "seconds_range": [totals[0].lowest, totals[0].highest],
        "draw_seconds": draws[0].median,
        "num_runs": result.settings.num_runs,
        "batch": result.settings.batch,
        "peak_bytes": first.memory.peak,
        "fits_into": fitting_device(first.memory.peak),
        "baseline": others[0].name if others else None,
        "speedup": totals[1].median / totals[0].median if others else None,
        "draw_speedup": draws[1].median / draws[0].median if others else None,
        "memory_ratio": others[0].memory.peak / first.memory.peak if others else None,
        "results": str(out / RESULTS_FILE),
    }


def _compared(label: str, values: list[Any], texts: Iterable[str]) -> Row:
    gain = f"{values[1] / values[0]:.2f}" if len(values) > 1 and values[0] else ""
    return Row(label, tuple(texts), gain)


def _plain(label: str, texts: Iterable[str]) -> Row:
    return Row(label, tuple(texts))


def _level_seconds(index: int, run: Run) -> float:
    return run.level_s[index]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


def _ms_spread(found: Spread) -> str:
    low, high = 1000 * found.lowest, 1000 * found.highest
    return f"{_ms(found.median)} ({low:.2f}–{high:.2f})"


def _per_second(amount: int, seconds: float) -> float | None:
    return amount / seconds if seconds else None


def _share(found: float | None, limit: float, unit: float) -> str:
    return _ABSENT if found is None else f"{found / unit:.2f} ({100 * found / limit:.0f} %)"
