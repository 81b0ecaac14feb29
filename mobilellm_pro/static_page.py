"""HTML pages in one file: sections of tables and pictures, which need no other file, no network and no script.

    html_page("Mix of phase 1", [Section("weights", "Weights", [table(header, rows), picture(png, "weights")])])

It stands below all rooms, since reports of several rooms are such pages.
"""

import base64
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

DIGITS = 6
"""Significant digits of numbers in a table."""

_STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#1f2328;background:#fff;max-width:76rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0 0 .5rem}
h2{font-size:1.2rem;border-bottom:1px solid #d1d9e0;padding-bottom:.2rem;margin:2.2rem 0 .8rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p{margin:.4rem 0}
nav a{margin-right:1rem}
a{color:#0a58b9;text-decoration:none}
.wide{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
td,th{border-bottom:1px solid #e3e7eb;padding:.22rem .6rem;text-align:right;vertical-align:top;white-space:nowrap}
th{border-bottom:2px solid #c5ccd3;font-weight:600}
td:first-child,th:first-child,.text{text-align:left}
td.text{white-space:normal}
tr.strong td{font-weight:600}
img{max-width:100%;height:auto;display:block}
code,pre{font:.85em ui-monospace,monospace}
pre{background:#f6f8fa;padding:.6rem;overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere}
.note,.absent{color:#59636e}
.state{padding:0 .5rem;border-radius:.7rem;background:#eceff2;white-space:nowrap}
.state.done{background:#dafbe1;color:#116329}
.state.running{background:#ddf4ff;color:#0550ae}
.state.failed,.state.killed{background:#ffebe9;color:#a40e26}
.state.stopped{background:#fff3cd;color:#7a4e00}
""".strip()


class Html(str):
    """Text that is HTML already, and is not escaped again."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    key: str
    """Its id in the page."""

    heading: str
    parts: Sequence[str]
    """HTML; empty ones count as none."""

    absent: str = "not part of this run"
    """Said where there is no part."""


def html_page(title: str, sections: Sequence[Section], *, lead: str = "", contents: bool = False) -> str:
    """The whole file.

    Args:
        title: plain text.
        sections: in their order.
        lead: HTML between the title and the first section.
        contents: whether links to the sections stand above them.
    """
    head, links = escape(title), ""
    if contents:
        anchors = (f'<a href="#{section.key}">{escape(section.heading)}</a>' for section in sections)
        links = f"<nav>{''.join(anchors)}</nav>\n"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{head}</title><style>{_STYLE}</style>'
        f"</head><body>\n<h1>{head}</h1>\n{lead}{links}{''.join(map(_section, sections))}</body></html>\n"
    )


def _section(section: Section) -> str:
    body = "".join(section.parts) or f'<p class="absent">{escape(section.absent)}</p>'
    return f'<section id="{section.key}"><h2>{escape(section.heading)}</h2>{body}</section>\n'


def table(
    header: Sequence[str], rows: Sequence[Sequence[Any]], *, text: Collection[str] = (), strong: Collection[int] = ()
) -> str:
    """A table; it scrolls by itself where the window is narrower.

    Args:
        header: of the columns.
        rows: cells: numbers are rounded to `DIGITS`, None is a dash, all but `Html` is escaped.
        text: columns that are text, aligned to the left and broken where they are long; the first always is.
        strong: numbers of the rows that stand out.
    """
    classes = [' class="text"' if name in text else "" for name in header]
    head = "".join(f"<th{name}>{escape(cell)}</th>" for name, cell in zip(classes, header))
    strong_row, body = '<tr class="strong">', ""
    for number, row in enumerate(rows):
        cells = "".join(f"<td{name}>{_cell(cell)}</td>" for name, cell in zip(classes, row, strict=True))
        body += f"{strong_row if number in strong else '<tr>'}{cells}</tr>"
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, Html):
        return value
    if value is None:
        return "–"
    return escape(f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value))


def paragraph(text: str, kind: str = "") -> str:
    """Plain text; `kind` is "note" for what explains, "absent" for what is not there."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def picture(image: bytes, alt: str) -> str:
    """A PNG or SVG file as part of the page."""
    kind = "png" if image.startswith(b"\x89PNG") else "svg+xml"
    return f'<p><img alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(image).decode()}"></p>'
