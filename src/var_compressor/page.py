"""Self-contained HTML pages of results: one style for light, dark and print, nothing from outside.

Every function takes plain text and escapes it; what they return is HTML, to be put together by
`write_page`.
"""

from __future__ import annotations

import html
import re
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

from var_compressor.artifact import write_atomically


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """One HTML file: the title, then ``parts``, which are HTML."""
    content = (
        _PAGE.replace("{style}", _STYLE)
        .replace("{title}", html.escape(title))
        .replace("{body}", "\n".join(parts))
    )
    write_atomically(path, content.encode())


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def section(title: str, *parts: str) -> str:
    body = "\n".join(parts)
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{body}\n</section>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values side by side."""
    cells = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in pairs
    )
    return f"<dl class='facts'>{cells}</dl>"


def verdict(words: str, text: str, advice: str | None) -> str:
    """A conclusion, what it rests on, and what to type."""
    code = "" if advice is None else f"<pre><code>{html.escape(advice)}</code></pre>"
    return (
        f"<article class='verdict'><h3>{html.escape(words)}</h3>"
        f"<p>{html.escape(text)}</p>{code}</article>"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column on the left, all others on the right; an interval stays on one line."""
    head = "".join(f"<th scope='col'>{html.escape(column)}</th>" for column in columns)
    body = "\n".join(
        f"<tr>{''.join(f'<td>{_unbroken(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f"<div class='wide'><table><thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _unbroken(cell: str) -> str:
    """With no break inside brackets of two numbers, such as [0.1, 0.2]."""
    return re.sub(r"(\[[^\[\], ]+), ", "\\1,\N{NO-BREAK SPACE}", html.escape(cell))


def folded(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>\n{content}\n</details>"


def drawing(svg: str, caption: str) -> str:
    """A picture as an SVG of our own, which is not escaped; the caption also describes it to those
    who cannot see it.
    """
    described = svg.replace(
        "<svg", f"<svg role='img' aria-label='{html.escape(caption, quote=True)}'", 1
    )
    return f"<figure>{described}<figcaption>{html.escape(caption)}</figcaption></figure>"


def picture(png: bytes, text: str) -> str:
    """An image in the page itself; ``text`` is for those who cannot see it."""
    return f"<img alt='{html.escape(text, quote=True)}' src='{data_url(png)}'>"


def pictures(images: Sequence[tuple[bytes, str]], caption: str, note: str) -> str:
    """Images of the same thing side by side, each with its text, above a caption and a note."""
    shown = "".join(picture(png, text) for png, text in images)
    return (
        f"<figure><div>{shown}</div><figcaption>{html.escape(caption)}<br>"
        f"<small>{html.escape(note)}</small></figcaption></figure>"
    )


def gallery(figures: Sequence[str]) -> str:
    """Figures in as many columns as the window holds."""
    return "<main>\n" + "\n".join(figures) + "\n</main>"


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + b64encode(png).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{style}</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #16191c; --soft: #5a626b; --paper: #ffffff; --panel: #f5f6f8; --grid: #d9dde1;
  --accent: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e8ea; --soft: #a2aab3; --paper: #14171a; --panel: #1d2125; --grid: #3a4047;
    --accent: #56b4e9;
  }
}
* { box-sizing: border-box; }
body {
  font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 76rem; margin: 2.5rem auto; padding: 0 1.2rem;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .8rem; }
h2 {
  font-size: 1.3rem; margin: 2.8rem 0 .6rem; padding-top: .9rem;
  border-top: 1px solid var(--grid);
}
h3 { font-size: 1.02rem; margin: 0 0 .25rem; }
p { margin: .3rem 0 .8rem; max-width: 62rem; }
.facts { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 0; }
.facts dt { color: var(--soft); font-size: .82rem; }
.facts dd { margin: 0; font-weight: 600; }
.verdict {
  background: var(--panel); border-left: 4px solid var(--accent); border-radius: 4px;
  padding: .7rem 1rem .55rem; margin: .7rem 0; break-inside: avoid;
}
.verdict p { margin: 0; }
pre {
  margin: .5rem 0 .3rem; padding: .5rem .7rem; background: var(--paper); border-radius: 4px;
  border: 1px solid var(--grid); white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem;
}
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1.2rem; }
figure { margin: 1rem 0 1.6rem; break-inside: avoid; }
main figure { margin: 0; }
figure svg { width: 100%; height: auto; display: block; }
figure div { display: flex; gap: 4px; }
figure img { flex: 1; min-width: 0; border-radius: 6px; }
p img, body > img { max-width: 100%; background: #fff; border-radius: 6px; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; max-width: 62rem; }
.wide { overflow-x: auto; margin: .8rem 0 1.4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--grid); text-align: right; }
td { white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody tr:hover { background: var(--panel); }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--accent); }
@media print {
  :root {
    color-scheme: light;
    --ink: #000; --soft: #444; --paper: #fff; --panel: #f4f4f4; --grid: #ccc; --accent: #0072b2;
  }
  body { max-width: none; margin: 0; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; margin-top: 1.4rem; }
  table { font-size: 7.5pt; }
  th, td { padding: .1rem .4rem; }
  tr, img { break-inside: avoid; }
  .wide { overflow: visible; }
  details { display: none; }
}
"""
