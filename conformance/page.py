"""One self-contained HTML page: what a report looks like in a browser, with nothing fetched from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import NamedTuple

import jinja2


class Section(NamedTuple):
    """A part of a page. text: paragraphs, parted by blank lines, then a table, then images (PNG bytes).

    A line that begins with four spaces keeps its spaces: code. Cells are shown as `str` shows them;
    one whose text begins with ✓ or ✗ is coloured.
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


def _kind(cell: object) -> str:
    """CSS class of a cell: a verdict, a figure or words."""
    text = str(cell)
    if text[:1] in "✓✗" and text:
        return "good" if text[0] == "✓" else "bad"
    return "figure" if isinstance(cell, (int, float)) else ""


_ENVIRONMENT = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters["paragraphs"] = _paragraphs
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
:root { color-scheme: light dark; --line: #8884; --quiet: #777; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; color: var(--quiet); }
td.figure { text-align: right; }
td.good { color: #2a8a4a; } td.bad { color: #c8372d; font-weight: 600; }
pre { background: #8881; padding: .7rem 1rem; overflow-x: auto; font-size: 13px; }
img { max-width: 100%; background: #fff; }
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
<div class="scroll"><table>
<thead><tr>{% for name in section.columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in section.rows %}
<tr>{% for cell in row %}<td class="{{ cell | kind }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endif %}
{% for image in section.images %}
<p><img alt="{{ section.heading }}" src="data:image/png;base64,{{ image | base64 }}"></p>
{% endfor %}
</section>
{% endfor %}
</body>
</html>
""")
