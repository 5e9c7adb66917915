"""The README.md of a model on the hub, from what its files say and what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from var_compressor.artifact import KV_FILE, Manifest, read_tensors
from var_compressor.artifact_inspection import artifact_parts
from var_compressor.layers.kv_cache import PlainCache, num_cache_bytes
from var_compressor.layers.kv_params import CacheFormat, params_from_tensors
from var_compressor.models.config import InfinityConfig, config_from_dict
from var_compressor.models.directory import ModelIndex, read_transformer_config
from var_compressor.models.hub import is_repo_id
from var_compressor.models.inspection import Part, inspect_path
from var_compressor.models.schedule import Schedule
from var_compressor.spec import QuantSpec

UNKNOWN = "other"
LIBRARY = "var-compressor"
_METRICS = ("benchmark", "metric", "value", "95 % interval", "images", "full precision", "drawn")


@dataclass(frozen=True)
class Measured:
    """One number of an evaluation, with the ends of its 95 % interval, over ``num_samples`` images.

    ``full_precision``: the metric of the uncompressed model's images at the same seeds, or what the
    images are compared with. ``drawn``: what drew them and how, in words.
    """

    benchmark: str
    metric: str
    value: float
    low: float
    high: float
    num_samples: int
    full_precision: str
    drawn: str


def card(
    name: str,
    transformer: Path,
    manifest: Manifest | None,
    index: ModelIndex,
    results: Sequence[Measured],
) -> str:
    """Markdown under YAML that the hub reads.

    ``transformer``: its folder; ``manifest`` of a compressed one; ``index``: what model_index.json
    says, the licence in ``provenance["license"]``. Nothing stands in it that is not in the files or
    in ``results``.
    """
    licence = str(index.provenance.get("license", UNKNOWN)).lower()
    source = "" if manifest is None else str(manifest.base["source"])
    front: dict[str, Any] = {"license": licence}
    if is_repo_id(source):
        front |= {"base_model": source, "base_model_relation": "quantized"}
    front |= {"library_name": LIBRARY, "pipeline_tag": "text-to-image"}
    front["tags"] = ["infinity", "visual-autoregressive", *_tags(manifest)]
    config = (
        read_transformer_config(transformer)
        if manifest is None
        else config_from_dict(InfinityConfig, manifest.config, str(transformer))
    )
    parts = _parts(transformer, manifest)
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name.rsplit('/', 1)[-1]}",
        _what(manifest, config, index),
        _use(name),
        f"## Size\n\n{_table(('part', 'bytes'), _sizes(parts, transformer, manifest, config))}",
        f"## Measured\n\n{_measured(results)}",
    ]
    if manifest is not None:
        sections += [_made(manifest), _base(manifest)]
    sections.append(f"## Licence\n\n{_licence(licence, manifest)}")
    return "\n\n".join(sections) + "\n"


def _tags(manifest: Manifest | None) -> Iterator[str]:
    if manifest is not None:
        yield "quantized"
        # such as w4a4
        yield QuantSpec.from_dict(manifest.spec).summary().split()[0].lower()


def _what(manifest: Manifest | None, config: InfinityConfig, index: ModelIndex) -> str:
    shape = f"{config.depth} blocks, {config.embed_dim} channels, {config.pixel_budget} pixels"
    text = {None: "It has no text encoder.", "": "Its VAE and text encoder are with it."}.get(
        index.text_encoder, f"Its VAE is with it; its text encoder is {index.text_encoder}."
    )
    if manifest is None:
        return (
            f"An [Infinity](https://arxiv.org/abs/2412.04431) text-to-image model: {shape}. {text}"
        )
    kv = "16-bit" if manifest.kv is None else str(manifest.kv["format"].get("name")).upper()
    return (
        f"{_base_name(manifest)}, an [Infinity](https://arxiv.org/abs/2412.04431) text-to-image "
        f"model ({shape}), compressed: {QuantSpec.from_dict(manifest.spec).summary()}; "
        f"{kv} KV cache. {text}"
    )


def _base_name(manifest: Manifest) -> str:
    source = Path(manifest.base["source"])
    return source.name if source.is_absolute() else str(source)


def _use(name: str) -> str:
    return f"""## Use

```bash
pip install {LIBRARY}
```

```python
from var_compressor import InfinityPipeline

pipe = InfinityPipeline.from_pretrained("{name}")
pipe("a large red cube on a wooden floor.").images[0].save("cube.png")
```"""


def _parts(transformer: Path, manifest: Manifest | None) -> Sequence[Part]:
    if manifest is None:
        return inspect_path(transformer, with_hashes=False).parts
    return artifact_parts(transformer, manifest)


def _sizes(
    parts: Sequence[Part], transformer: Path, manifest: Manifest | None, config: InfinityConfig
) -> Iterator[tuple[str, ...]]:
    for part in parts:
        yield part.name, f"{part.num_bytes:,}"
    yield "**transformer**", f"**{sum(part.num_bytes for part in parts):,}**"
    schedule = Schedule.of(1.0, config.pixel_budget)
    # with guidance, an image takes two rows
    if manifest is None or manifest.kv is None:
        import torch

        plain = PlainCache(config, schedule, rows=2, dtype=torch.bfloat16, device="meta")
        num_bytes = plain.num_bytes
    else:
        file = transformer / KV_FILE
        format = CacheFormat.of(manifest.kv, f"{file}: ")
        params = params_from_tensors(read_tensors(file, "cpu"), format, config, str(file))
        num_bytes = num_cache_bytes(params, config, schedule, rows=2)
    yield "KV cache of one square image, guidance on", f"{num_bytes:,}"


def _measured(results: Sequence[Measured]) -> str:
    if not results:
        return "No evaluation came with this model; `varc evaluate` makes one."
    rows = [
        (
            one.benchmark,
            one.metric,
            f"{one.value:.4g}",
            f"{one.low:.4g} to {one.high:.4g}",
            str(one.num_samples),
            one.full_precision,
            one.drawn,
        )
        for one in results
    ]
    return _table(_METRICS, rows)


def _made(manifest: Manifest) -> str:
    rows = [("made by", manifest.created_by)]
    kv = None if manifest.kv is None else manifest.kv.get("calibration")
    for what, told in (("calibration", manifest.calibration), ("KV calibration", kv)):
        for key, value in (told or {}).items():
            rows.append((f"{what}: {re.sub('_', ' ', str(key))}", _plain(value)))
    recipe = yaml.safe_dump({"quant": manifest.spec}, sort_keys=False).rstrip()
    return f"""## How it was made

{_table(("", ""), rows)}

The recipe, as `varc quantize` takes it:

```yaml
{recipe}
```"""


def _base(manifest: Manifest) -> str:
    rows = [
        (f"{part}/{file}", f"`{digest}`")
        for part in ("transformer", "vae")
        for file, digest in manifest.base.get(part, {}).items()
    ]
    table = _table(("file", "sha256"), rows)
    return f"## Made of\n\n{_base_name(manifest)}, whose weights are these:\n\n{table}"


def _licence(licence: str, manifest: Manifest | None) -> str:
    whose = "this model" if manifest is None else f"the base model, {_base_name(manifest)}"
    if licence == UNKNOWN:
        return f"Unknown: the files say nothing of the licence of {whose}. Ask whoever made it."
    return f"{licence}, as stated with {whose}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]] | Iterator[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items())
    return str(value)
