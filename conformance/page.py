"""One self-contained HTML page: what a report looks like in a browser, with nothing fetched from anywhere."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import NamedTuple

import jinja2


class Section(NamedTuple):
    """A part of a page. text: paragraphs, parted by blank lines, then a table, then images (PNG bytes).

    A line that begins with four spaces keeps its spaces: code. Cells are shown as `str` shows them;
    one whose text begins with ✓ or ✗ is coloured, a column of figures is set right and not broken.
    """

    heading: str
    text: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    images: Sequence[bytes] = ()


def page(title: str, sections: Sequence[Section]) -> str:
    """The page as one string: everything escaped, styles inside, images as data, no outside address."""
    return _TEMPLATE.render(title=title, sections=sections)


def _paragraphs(text: str) -> list[tuple[bool, str]]:
    """(is code, text) of each paragraph; code that blank lines part stays one paragraph."""
    found: list[tuple[bool, str]] = []
    for part in text.strip("\n").split("\n\n"):
        code = part.startswith("    ")
        if code and found and found[-1][0]:
            found[-1] = (True, f"{found[-1][1]}\n\n{part}")
        elif part.strip():
            found.append((code, part))
    return found


FIGURE = re.compile(
    r"([≥≤] ?)?-?\d[\d.]*(e[+-]?\d+)?[%×xTG]?( (≈|×|MiB|[µu]s|GB/s|TFLOP/s)| · [\d.]+\S*)*( more)?$"
)
"""A number, its unit, further numbers."""


def _is_figure(cell: object) -> bool:
    return FIGURE.match(str(cell)) is not None


def _figures(rows: Sequence[Sequence[object]]) -> list[bool]:
    """Which columns hold figures: some cell does, and no other cell says anything long or a verdict."""
    return [
        any(map(_is_figure, column))
        and all(_is_figure(x) or str(x) in ("", "n/a", "✗ wrong") for x in column)
        for column in zip(*rows)
    ]


def _kind(cell: object, in_figures: bool) -> str:
    """CSS classes of a cell: a verdict, a figure or words."""
    verdict = {"✓": "good", "✗": "bad"}.get(str(cell)[:1], "")
    return f"{verdict} figure".strip() if in_figures else verdict


_ENVIRONMENT = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters["paragraphs"] = _paragraphs
_ENVIRONMENT.filters["figures"] = _figures
_ENVIRONMENT.filters["kind"] = _kind
_ENVIRONMENT.filters["base64"] = lambda image: base64.b64encode(image).decode()
_TEMPLATE = _ENVIRONMENT.from_string("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --quiet: #5c636b; --good: #1e7a3c; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --quiet: #a5abb3; --good: #62c784; --bad: #ff8a80; }
  img { filter: invert(.92) hue-rotate(180deg); } /* a picture's white ground would glare */
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h1, h2, p, td { overflow-wrap: break-word; }
p { max-width: 50rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem 1.1rem .2rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; color: var(--quiet); vertical-align: bottom; }
th:first-child, td:first-child { position: sticky; left: 0; background: Canvas; min-width: 9rem; }
.figure { text-align: right; } td.figure { white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; white-space: nowrap; }
td.bad:first-child { white-space: normal; }
pre { background: #8881; padding: .7rem 1rem; overflow-x: auto; font-size: 13px; }
img { display: block; margin-top: 1.2rem; width: 56rem; max-width: 100%; min-width: 40rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<section>
<h2>{{ section.heading }}</h2>
{% for code, text in section.text | paragraphs %}
{% if code %}
<pre>{{ text }}</pre>
{% else %}
<p>{{ text }}</p>
{% endif %}
{% endfor %}
{% if section.rows %}
{% set figures = section.rows | figures %}
<div class="scroll"><table>
<thead><tr>
{% for name in section.columns %}
<th{% if figures[loop.index0] %} class="figure"{% endif %}>{{ name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in section.rows %}
<tr>{% for cell in row %}<td class="{{ cell | kind(figures[loop.index0]) }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endif %}
{% for image in section.images %}
<div class="scroll"><img alt="{{ section.heading }}" src="data:image/png;base64,{{ image | base64 }}"></div>
{% endfor %}
</section>
{% endfor %}
</body>
</html>
""")
