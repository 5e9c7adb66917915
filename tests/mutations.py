"""Damage to files, drawn by seed: of bytes, and of what JSON, safetensors, torch and YAML hold."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import torch

ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**70, 1e308, float("nan"), "", "x" * 300, "../../etc/passwd",
    "/etc/passwd", "..", "a/../../b", "\0", "\ud800", "${oc.env:HOME}", [], {}, [[[[]]]], [1, "a"],
    {"a": {"b": None}},
)  # fmt: skip


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """Cut off, flipped, overwritten, left out, doubled, moved, or nothing of it at all."""
    size = len(data)
    a, b = sorted(draw.randrange(size + 1) for _ in range(2))
    kind = draw.randrange(10)
    if kind == 0:
        return data[:a]
    if kind in (1, 2):
        flipped = bytearray(data)
        for _ in range(draw.choice([1, 1, 1, 8])):
            flipped[draw.randrange(size)] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    if kind == 3:
        return data[:a] + draw.randbytes(min(64, size - a)) + data[a + 64 :]
    if kind == 4:
        return data[:a] + data[min(b, a + 200) :]
    if kind == 5:
        return data[:b] + data[a : min(b, a + 5000)] + data[b:]
    if kind == 6:
        return data[:a] + bytes(min(4096, b - a)) + data[min(b, a + 4096) :]
    if kind == 7:
        return data + draw.randbytes(draw.choice([1, 100]))
    if kind == 8:
        # where headers are
        front = min(size, 200)
        return draw.randbytes(1).join(
            [data[: draw.randrange(front)], data[draw.randrange(front) :]]
        )
    return draw.choice([b"", b"\0", b"{}", b"[]", b"PK\x03\x04", b"\x80\x02.", draw.randbytes(64)])


def places_in(value: Any, prefix: tuple = ()) -> list[tuple]:
    """The path of everything inside nested dicts and lists."""
    found = []
    items = value.items() if isinstance(value, dict) else []
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        found += [(*prefix, key), *places_in(inner, (*prefix, key))]
    return found


def edited(content: Any, draw: random.Random, odd: Callable[[], Any]) -> Any:
    """One thing in it replaced, taken out, added or called otherwise."""
    content = copy.copy(content) if not isinstance(content, dict | list) else copy.deepcopy(content)
    places = places_in(content)
    if not places or draw.random() < 0.03:
        return odd()
    *path, last = draw.choice(places)
    inside = content
    for key in path:
        inside = inside[key]
    kind = draw.randrange(5)
    if kind == 0:
        del inside[last]
    elif kind == 1 and isinstance(inside, dict):
        inside[draw.choice(["", "../x", "/x", "x\n", f"{last}x", "9" * 30])] = inside.pop(last)
    elif kind == 2 and isinstance(inside, dict):
        inside[draw.choice(["more", "__class__", "../../x"])] = odd()
    else:
        inside[last] = odd()
    return content


def damaged_json(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.05:
        return b"[" * 100_000 + b"]" * 100_000
    content = edited(json.loads(data), draw, lambda: copy.deepcopy(draw.choice(ODD_VALUES)))
    return json.dumps(content).encode()


def damaged_safetensors(data: bytes, draw: random.Random) -> bytes:
    """Of its header: other shapes, dtypes, offsets, names, length."""
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    odd: list[Any] = [
        *ODD_VALUES,
        [2**40, 2**40],
        [-1],
        [0],
        "F64",
        "I8",
        "BOOL",
        [0, 2**62],
        [5, 2],
    ]
    header = edited(header, draw, lambda: copy.deepcopy(draw.choice(odd)))
    packed = json.dumps(header).encode()
    length = draw.choice([len(packed)] * 8 + [2**63, 0, len(packed) + 1])
    return struct.pack("<Q", length) + packed + rest


class Runs:
    """What a pickle that runs a program looks like; loading it must not."""

    def __reduce__(self):
        return (eval, ("__import__('os').environ.__setitem__('VARC_HACKED', '1')",))


def odd_tensor(draw: random.Random) -> Any:
    return draw.choice(
        (
            *ODD_VALUES,
            torch.zeros(0),
            torch.zeros(()),
            torch.zeros(1).expand(2**40),
            torch.zeros(1, 1).expand(128, 128),
            torch.full((128,), float("nan")),
            torch.full((128,), float("inf")),
            torch.ones(128, dtype=torch.int64),
            torch.ones(128, dtype=torch.complex64),
            torch.ones(128, dtype=torch.bool),
            torch.ones(128, 128).to_sparse(),
            torch.empty(128, device="meta"),
            torch.nn.Parameter(torch.ones(128)),
            -torch.ones(128),
            Runs(),
        )
    )


def damaged_torch(data: bytes, draw: random.Random) -> bytes:
    """Other objects in it, or a compressed or rearranged archive."""
    out = io.BytesIO()
    if draw.random() < 0.8:
        content = torch.load(io.BytesIO(data), weights_only=True)
        torch.save(edited(content, draw, lambda: odd_tensor(draw)), out)
        return out.getvalue()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        victim = draw.choice(names)
        for name in names:
            part = old.read(name)
            other = draw.choice([name, f"../{name}", "x", name])
            if name == victim and draw.random() < 0.5:
                # a pickle of another size, or a bomb
                new.writestr(other, draw.choice([b"", bytes(10**7)]), zipfile.ZIP_DEFLATED)
            elif name != victim or draw.random() < 0.5:
                new.writestr(other if name == victim else name, damaged_bytes(part, draw)
                             if name == victim and draw.random() < 0.5 else part)  # fmt: skip
    return out.getvalue()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BOMB_IN_ONE = "a: [&a [x, x, x, x, x, x, x, x, x]" + "".join(
    f", &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
ODD_YAML = (
    BOMB,
    f"{BOMB_IN_ONE}]\n",
    "!!python/object/apply:os.system ['true']\n",
    "[" * 3000,
    "{a: " * 3000,
    "? [a]\n: b\n",
    "a: &x [*x]\n",
    "null\n",
    "- 1\n- 2\n",
    "just a word\n",
    "a: b: c\n",
    "\t\n",
    "2001-99-99: 1\n",
    "? {a: b}\n",
    "a: 0x\n",
    "a: !!int x\n",
    "a: !!timestamp 2001-99-99\n",
    "a: !!binary '**'\n",
    "a: .inf\nb: .nan\n",
    "\ufeff",
    "--- a\n--- b\n",
    "%YAML 9.9\n---\na: 1\n",
)


def damaged_yaml(data: bytes, draw: random.Random) -> bytes:
    """A line, or all of it, replaced by an odd one."""
    lines = data.decode().splitlines(keepends=True)
    odd = draw.choice(ODD_YAML)
    if draw.random() < 0.3:
        return odd.encode()
    place = draw.randrange(len(lines))
    line = lines[place]
    if ":" in line and draw.random() < 0.5:
        key = line.split(":")[0]
        value = draw.choice(
            ["null", "[]", "{}", "1e999", "-5", "'../x'", "!!float x", "*y", "&z 1"]
        )
        lines[place] = f"{key}: {value}\n"
    else:
        lines[place] = odd
    return "".join(lines).encode()
