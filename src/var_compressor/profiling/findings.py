"""What a profile says about how to compress the model: verdicts in words, each with numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from var_compressor.footprint import ModelShape, Request, Setup, kv_bytes
from var_compressor.models.config import InfinityConfig
from var_compressor.models.schedule import Schedule
from var_compressor.profiling.rows import Row, rows_of, worst_first
from var_compressor.quant.plan import plan
from var_compressor.quant.report import SNR_MARGIN_DB, expected_snr_db
from var_compressor.spec import MODULES, QuantSpec

MIB = 2**20
# a layer stands out that disturbs so many times as much as the median one
_OUTSTANDING = 3.0
_MAX_PROTECTED = 10
# what a remedy must give in the median layer, or in the median layer of one kind, to pay
_PAYS_DB, _PAYS_SOMEWHERE_DB = 0.5, 1.5
# what an asymmetric range must give an input, where its zero point costs work at run time; 16
# instead of 15 levels, and a range that fits, give any tensor 1 to 2 dB
_ZERO_POINT_PAYS_DB = 3.0
# of the hidden state, where there are no linears to compare with
_QUIET_DB = 40.0
# largest over median magnitude: beyond, a step of 4 bits over the whole tensor is as wide as this
# many medians
_STRONG_RATIO = 50.0


@dataclass(frozen=True)
class Finding:
    """``verdict`` in a few words, ``text`` the sentence with numbers; ``advice`` for a recipe."""

    topic: str
    verdict: str
    text: str
    numbers: dict[str, Any] = field(default_factory=dict)
    advice: str | None = None


def expected_bytes(spec: QuantSpec, config: InfinityConfig, schedule: Schedule) -> dict[str, int]:
    """Of the transformer and of one image's cache, at 16 bits and as the recipe stores them."""
    planned = plan(spec, config)
    request = Request(schedule, batch=1, prompt_tokens=1)
    shape = ModelShape("", config, None, None)

    def cache_bytes(format: str) -> int:
        kv = "int8" if format == "fp8" else format
        setup = Setup("bf16", kv, None, False, None, None)
        return kv_bytes(shape, request, setup)

    return {
        "transformer_before": planned.before_bytes,
        "transformer_after": planned.after_bytes,
        "cache_before": cache_bytes("bf16"),
        "cache_after": cache_bytes(spec.kv.format),
    }


def find(profile: Mapping[str, Any]) -> list[Finding]:
    """Everything worth saying, the most important first."""
    spec = QuantSpec.from_dict(profile["spec"])
    rounded = rows_of(profile, only_rounded=True)
    found = [*_broken(profile), _protect(profile, rounded, spec), _outliers(rows_of(profile))]
    if rounded:
        found += [_smoothing(rounded), _branch(rounded), _input_zero_points(rounded, spec)]
    return [*found, *_cache(profile, spec), _bytes(profile, spec)]


# --- which layers ---------------------------------------------------------------------------------


def _broken(profile: Mapping[str, Any]) -> list[Finding]:
    names = [row.full_name for row in rows_of(profile) if not row.input["is_finite"]]
    if not names:
        return []
    text = (
        f"{_listed(names)} read infinite or undefined values; nothing that is said of them can be "
        "trusted. Run the model in float32 (model.dtype=float32), or look for the cause first."
    )
    return [Finding("broken", "Some inputs are not finite", text, {"layers": names})]


def _protect(profile: Mapping[str, Any], rounded: Sequence[Row], spec: QuantSpec) -> Finding:
    if not rounded:
        text = "The recipe leaves every linear at 16 bits."
        return Finding("protect", "Nothing is rounded", text)
    harm, what = _harm(rounded)
    if harm is None:
        return _protect_by_output(rounded, spec)
    middle, total = median(harm.values()), sum(harm.values())
    chosen = [row for row in worst_first(profile) if harm[row.full_name] >= _OUTSTANDING * middle]
    chosen = chosen[:_MAX_PROTECTED]
    if not chosen:
        text = (
            f"No linear stands out: rounding the worst one alone, {_worst_name(harm)}, causes "
            f"{max(harm.values()) / middle:.1f}× the {what} of the median one."
        )
        return Finding("protect", "No layer needs protection", text)
    share = sum(harm[row.full_name] for row in chosen) / total
    first = chosen[0].full_name
    text = (
        f"Rounded one at a time, {len(chosen)} of {len(rounded)} linears cause {100 * share:.0f} % "
        f"of the {what}: {_listed([row.full_name for row in chosen])}. {first} alone causes "
        f"{harm[first] / middle:.0f}× as much as the median one. The line below keeps the noisier "
        "side of each, input or weight, at 8 bits."
    )
    numbers = {row.full_name: harm[row.full_name] for row in chosen}
    return Finding(
        "protect", f"Protect {_counted(len(chosen), 'layer')}", text, numbers, _exceptions(chosen)
    )


def _harm(rounded: Sequence[Row]) -> tuple[dict[str, float] | None, str]:
    """By linear, what rounding it alone does, and what that is."""
    effects = {row.full_name: row.effect for row in rounded if row.effect is not None}
    if len(effects) < len(rounded):
        return None, ""
    if all(effect["kl_nats"] is not None for effect in effects.values()):
        found = {name: effect["kl_nats"] for name, effect in effects.items()}
        return found, "divergence of the bits"
    noise = {name: 10 ** (-effect["stream_snr_db"] / 10) for name, effect in effects.items()}
    return noise, "noise in the hidden state"


def _protect_by_output(rounded: Sequence[Row], spec: QuantSpec) -> Finding:
    """Without a sensitivity: whose output stays noisy with smoothing and a branch."""
    chosen = []
    for row in rounded:
        linear_spec = spec.for_module(row.full_name)
        assert linear_spec is not None
        if row.output["branch"] < expected_snr_db(linear_spec) - SNR_MARGIN_DB:
            chosen.append(row)
    chosen = sorted(chosen, key=lambda row: row.output["branch"])[:_MAX_PROTECTED]
    worst = min(rounded, key=lambda row: row.output["branch"])
    told = f"{worst.full_name} keeps {worst.output['branch']:.1f} dB"
    note = "What that does to the bits was not measured (--sensitivity)."
    if not chosen:
        text = (
            "With smoothing and a branch every output is as clean as its format allows; "
            f"{told}. {note}"
        )
        return Finding("protect", "No layer needs protection", text)
    text = (
        f"Even with smoothing and a branch, {_counted(len(chosen), 'output')} stay more than "
        f"{SNR_MARGIN_DB:.0f} dB below what the format keeps of normal values: "
        f"{_listed([row.full_name for row in chosen])}; {told}. {note}"
    )
    numbers = {row.full_name: row.output["branch"] for row in chosen}
    return Finding(
        "protect", f"Protect {_counted(len(chosen), 'layer')}", text, numbers, _exceptions(chosen)
    )


def _exceptions(rows: Iterable[Row]) -> str:
    """A recipe override that gives the noisier side of each linear 8 bits."""
    rules = []
    for row in rows:
        input_db, weight_db = (
            row.report[side]["snr_db"]["int4"]["group"]["symmetric"] for side in ("input", "weight")
        )
        side = "act" if input_db < weight_db else "weight"
        rules.append(f"{{pattern: {row.full_name}, {side}: sint8}}")
    return f"quant.exceptions=[{', '.join(rules)}]"


def _outliers(rows: Sequence[Row]) -> Finding:
    worst = max(rows, key=lambda row: row.ratio)
    by_kind = _medians(rows, lambda row: row.ratio)
    order = sorted(by_kind, key=lambda name: -by_kind[name])
    kurtosis = _medians(rows, lambda row: row.input["kurtosis"] or 0.0)
    text = (
        f"The largest value that {worst.full_name} reads is {worst.ratio:.0f}× the median "
        f"magnitude. In the median block it is {by_kind[order[0]]:.0f}× for {order[0]} (excess "
        f"kurtosis {kurtosis[order[0]]:.0f}) and {by_kind[order[1]]:.0f}× for {order[1]} "
        f"({kurtosis[order[1]]:.0f}), against {by_kind[order[-1]]:.0f}× for {order[-1]}."
    )
    strong = [name for name in order if by_kind[name] >= _STRONG_RATIO]
    verdict = f"Strong outliers in {_listed(strong)}" if strong else "Outliers are mild"
    return Finding("outliers", verdict, text, {"max_median_ratio": by_kind, "kurtosis": kurtosis})


# --- which remedies -------------------------------------------------------------------------------


def _smoothing(rounded: Sequence[Row]) -> Finding:
    rows = [row for row in rounded if row.output["smoothed"] is not None]
    gain = _medians(rows, lambda row: row.output["smoothed"] - row.output["plain"])
    overall = median(row.output["smoothed"] - row.output["plain"] for row in rows)
    best = max(gain, key=lambda name: gain[name])
    none = [name for name, value in gain.items() if value < 0.1]
    text = (
        f"A few tried factors raise the output's SNR by {overall:.1f} dB in the median linear, "
        f"most at {best} ({gain[best]:+.1f} dB)"
        + (f", and do nothing for {_listed(none)}" if none else "")
        + ". The search of varc quantize finds better ones."
    )
    pays = overall >= _PAYS_DB or gain[best] >= _PAYS_SOMEWHERE_DB
    verdict = "Smoothing pays" if pays else "Smoothing hardly pays"
    if pays and overall < _PAYS_DB:
        paying = [name for name, value in gain.items() if value >= _PAYS_SOMEWHERE_DB]
        verdict = f"Smoothing pays at {_listed(paying)}"
    return Finding("smoothing", verdict, text, {"gain_db": gain})


def _branch(rounded: Sequence[Row]) -> Finding:
    gain = _medians(rounded, lambda row: row.output["branch"] - row.output["smoothed"])
    overall = median(row.output["branch"] - row.output["smoothed"] for row in rounded)
    energy = median(row.report["weight"]["energy_in_rank"]["smoothed"] for row in rounded)
    ranks = sorted({row.report["weight"]["rank"] for row in rounded})
    best, least = (pick(gain, key=lambda name: gain[name]) for pick in (max, min))
    text = (
        f"The {'–'.join(map(str, ranks))} strongest directions hold {100 * energy:.0f} % of the "
        "median weight's energy. Kept at 16 bits they raise the output's SNR by another "
        f"{overall:.1f} dB in the median linear: {gain[best]:+.1f} dB at {best}, "
        f"{gain[least]:+.1f} dB at {least}."
    )
    verdict = "A low-rank branch pays" if overall >= _PAYS_DB else "A low-rank branch hardly pays"
    numbers = {"gain_db": gain, "energy": energy, "rank": ranks}
    return Finding("low_rank", verdict, text, numbers)


def _input_zero_points(rounded: Sequence[Row], spec: QuantSpec) -> Finding:
    def gain_of(row: Row) -> float:
        found = row.report["input"]["snr_db"]["int4"]["group"]
        return found["asymmetric"] - found["symmetric"]

    gain = _medians(rounded, gain_of)
    skew = _medians(rounded, lambda row: row.input["skewness"] or 0.0)
    best = max(gain, key=lambda name: gain[name])
    paying = [name for name, value in gain.items() if value >= _ZERO_POINT_PAYS_DB]
    others = [value for name, value in gain.items() if name not in paying]
    text = (
        f"With a zero point, 4-bit groups of {best}'s input gain {gain[best]:.1f} dB "
        f"(mean channel skewness {skew[best]:.2f})"
        + (f"; of the others, {min(others):.1f} to {max(others):.1f} dB" if others else "")
        + f". Below {_ZERO_POINT_PAYS_DB:.0f} dB the work at run time is not worth it."
    )
    unsigned = [name for name in paying if _act_format(spec, name) == "uint4"]
    if unsigned:
        text += f" The recipe has {_listed(unsigned)} unsigned already, which is as good."
    verdict = (
        f"Asymmetric inputs pay at {_listed(paying)}" if paying else "Symmetric inputs suffice"
    )
    return Finding("input_zero_points", verdict, text, {"gain_db": gain, "skewness": skew})


def _act_format(spec: QuantSpec, name: str) -> str | None:
    found = spec.for_module(name)
    return None if found is None else found.act.format


# --- the cache ------------------------------------------------------------------------------------


def _cache(profile: Mapping[str, Any], spec: QuantSpec) -> list[Finding]:
    nbits = 4 if spec.kv.format == "int4" else 8
    return [
        _granularity(profile),
        _cache_zero_points(profile, nbits),
        *_cache_effect(profile, spec),
    ]


def _granularity(profile: Mapping[str, Any]) -> Finding:
    """Channel or token, by the variation of ranges and by what rounding costs either way."""
    numbers, sentences, verdicts = {}, [], []
    for name in ("k", "v"):
        caches = [block["cache"][name] for block in profile["blocks"]]
        channels = sum(cache["all"]["dominance"] == "Channel" for cache in caches)
        cv = {
            key: median(cache["all"][key] or 0.0 for cache in caches)
            for key in ("cv_channel", "cv_token")
        }
        snr = {
            key: median(cache["snr_db"]["int4"][key]["asymmetric"] for cache in caches)
            for key in ("channel", "token")
        }
        better = max(snr, key=lambda key: snr[key])
        verdicts.append(f"{name.upper()} by {better}")
        sentences.append(
            f"{name.upper()}: ranges vary more between channels in {channels} of {len(caches)} "
            f"layers (median CV {cv['cv_channel']:.2f} between channels, {cv['cv_token']:.2f} "
            f"between tokens); 4 bits keep {snr['channel']:.1f} dB with a range per channel, "
            f"{snr['token']:.1f} dB per token."
        )
        numbers[name] = {**cv, "num_channel_dominant": channels, "int4_snr_db": snr}
    return Finding("cache_ranges", " and ".join(verdicts), " ".join(sentences), numbers)


def _cache_zero_points(profile: Mapping[str, Any], nbits: int) -> Finding:
    numbers, told = {}, []
    for name in ("k", "v"):
        caches = [block["cache"][name] for block in profile["blocks"]]
        by_kind = [cache["snr_db"][f"int{nbits}"]["channel"] for cache in caches]
        gain = median(found["asymmetric"] - found["symmetric"] for found in by_kind)
        skew = median(cache["all"]["skewness"] or 0.0 for cache in caches)
        peak = max(cache["all"]["max_skew"] or 0.0 for cache in caches)
        zero_point = median(cache["all"]["ideal_zero_point"] or 0.0 for cache in caches)
        told.append(
            f"{name.upper()} gains {gain:.1f} dB (mean channel skewness {skew:.2f}, largest "
            f"{peak:.1f}; ideal zero point {zero_point:.0f} steps of 255 from the middle)"
        )
        numbers[name] = {
            "gain_db": gain,
            "skewness": skew,
            "max_skew": peak,
            "ideal_zero_point": zero_point,
        }
    pays = max(one["gain_db"] for one in numbers.values()) >= _PAYS_DB
    text = (
        f"With zero points per channel, {nbits} bits: {'; '.join(told)}. In attention they cost "
        "nothing: K's cancel in the softmax, V's are added once to the output."
    )
    verdict = "Zero points pay in the cache" if pays else "The cache needs no zero points"
    return Finding("cache_zero_points", verdict, text, numbers)


def _cache_effect(profile: Mapping[str, Any], spec: QuantSpec) -> list[Finding]:
    layers = (profile["sensitivity"] or {"layers": {}})["layers"]
    caches = {name: one for name, one in layers.items() if name.endswith("self_attn.kv")}
    if not caches:
        return []
    worst = min(caches, key=lambda name: caches[name]["stream_snr_db"])
    found = caches[worst]
    linears = [one["stream_snr_db"] for name, one in layers.items() if name not in caches]
    text = (
        f"In {spec.kv.format}, with ranges found on the fly, the worst layer is {worst}: the "
        f"hidden state behind it keeps {found['stream_snr_db']:.1f} dB"
    )
    if found["same_bit"] is not None:
        text += f", and {100 * found['same_bit']:.2f} % of the bits stay the same"
    if linears:
        text += f". Linears rounded alone keep {median(linears):.1f} dB in the median."
    quieter = found["stream_snr_db"] > median(linears or [_QUIET_DB])
    verdict = "The cache is not the problem" if quieter else "The cache matters"
    numbers = {name: one["stream_snr_db"] for name, one in caches.items()}
    return [Finding("cache_effect", verdict, text, numbers)]


def _bytes(profile: Mapping[str, Any], spec: QuantSpec) -> Finding:
    found = profile["bytes"]
    before, after = found["transformer_before"], found["transformer_after"]
    cache_before, cache_after = found["cache_before"], found["cache_after"]
    saved = 1 - (after + cache_after) / (before + cache_before)
    text = (
        f"{spec.summary()} takes the transformer from {before / MIB:.1f} to {after / MIB:.1f} MiB, "
        f"and {spec.kv.format} the cache of one image from {cache_before / MIB:.2f} to "
        f"{cache_after / MIB:.2f} MiB."
    )
    return Finding("bytes", f"{100 * saved:.0f} % fewer bytes", text, dict(found))


# --- words ----------------------------------------------------------------------------------------


def _medians(rows: Iterable[Row], value: Callable[[Row], float]) -> dict[str, float]:
    """By kind of linear, in the order of a block."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row.name, []).append(value(row))
    return {name: median(values[name]) for name in MODULES if name in values}


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _worst_name(harm: Mapping[str, float]) -> str:
    return max(harm, key=lambda name: harm[name])
