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
    content = _PAGE.replace("{title}", html.escape(title)).replace("{body}", "\n".join(parts))
    write_atomically(path, content.encode())


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column on the left, all others on the right; an interval stays on one line."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
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
<meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; }
td { font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .7rem; border-bottom: 1px solid #8884; text-align: right; }
td:first-child, th:first-child { text-align: left; }
tbody tr:hover { background: #8882; }
.wide { overflow-x: auto; }
p { max-width: 54rem; }
p img, body > img { max-width: 100%; background: #fff; border-radius: 6px; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; break-inside: avoid; }
figure div { display: flex; gap: 4px; }
figure img { flex: 1; min-width: 0; border-radius: 6px; }
figcaption { font-size: .85rem; }
@media print {
  body { max-width: none; margin: 0; font-size: 10pt; }
  td, th { padding: .1rem .5rem; }
  .wide { overflow: visible; }
  tr, img { break-inside: avoid; }
}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""
