"""A document as one HTML file that asks for nothing from outside: styles and charts stand in it.

Light, dark and on paper; tables can be copied as they are. It forbids itself scripts, fonts and
pictures from anywhere, so that it can be opened, mailed and archived without a thought.
"""

from __future__ import annotations

from html import escape

from coordinator.charts import CSS as CHART_CSS
from coordinator.document import (
    Bullets,
    Code,
    Document,
    Figure,
    Part,
    Section,
    Table,
    Words,
    numbered,
)

CSS = """\
:root { color-scheme: light dark; --paper: #fff; --ink: #16191d; --quiet: #545a61;
  --edge: #c9ced4; --soft: #f2f4f6; --link: #00539b }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e8ebee; --quiet: #a9b1ba;
  --edge: #3a424b; --soft: #1d2228; --link: #82bfff } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
main { max-width: 70rem; margin: 0 auto; padding: 1rem 1rem 4rem }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .5rem }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .5rem;
  border-top: 1px solid var(--edge) }
p, li { max-width: 46rem }
.lead { color: var(--quiet); margin: 0 0 1.5rem }
ul { padding-left: 1.25rem }
li { margin: .35rem 0 }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; list-style: none }
a { color: var(--link) }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
figure { margin: 1.5rem 0 }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 0 2rem; align-items: start }
.charts figure { margin: 1rem 0 }
figcaption { font-size: .9rem; color: var(--quiet); max-width: 46rem; padding: .5rem 0 0 }
.table figcaption { padding: 0 0 .5rem }
figcaption b { color: var(--ink) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; border-top: 2px solid var(--ink);
  border-bottom: 2px solid var(--ink); min-width: min(100%, 24rem) }
thead th { border-bottom: 1px solid var(--ink); vertical-align: bottom; line-height: 1.25 }
th, td { padding: .3rem .7rem; text-align: right; vertical-align: top; font-weight: 400;
  overflow-wrap: normal }
th { white-space: pre-line }
thead th { font-weight: 600 }
td { white-space: nowrap }
th.words, td.words { text-align: left }
td.words { white-space: normal; min-width: 7rem; max-width: 32rem }
tbody th { text-align: left; white-space: nowrap }
tbody tr:nth-child(even) { background: var(--soft) }
details { margin: .5rem 0; font-size: .9rem }
summary { cursor: pointer; color: var(--link) }
pre { background: var(--soft); padding: .75rem; overflow-x: auto; font-size: .8rem }
.wide { font-size: .85rem }
.wide th, .wide td { padding: .3rem .5rem }
@media print {
  @page { margin: 15mm }
  body { font-size: 9.5pt }
  main { max-width: none; padding: 0 }
  nav, details { display: none }
  h2 { break-after: avoid }
  figure, tr { break-inside: avoid }
  figcaption { font-size: 8.5pt }
  .charts { grid-template-columns: 1fr 1fr; gap: 0 1rem }
  table { font-size: 8pt }
  .wide { font-size: 6.5pt }
  th, td { padding: 1.5pt 4pt }
  .wide th, .wide td { padding: 1.5pt 2pt }
  .scroll { overflow: visible }
}
"""


def html(document: Document) -> str:
    """The whole page."""
    numbers = numbered(document)
    links = "".join(
        f'<li><a href="#s{n}">{escape(s.title)}</a></li>' for n, s in enumerate(document.sections)
    )
    body = "".join(_section(n, s, numbers) for n, s in enumerate(document.sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(document.title)}</title><style>{CSS}{CHART_CSS}</style></head><body><main>"
        f'<h1>{escape(document.title)}</h1><p class="lead">{escape(document.lead)}</p>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>{body}</main></body></html>\n'
    )


def _section(number: int, section: Section, numbers: dict[int, str]) -> str:
    """Neighbouring figures stand beside each other where there is room."""
    made, charts = [], []
    for part in (*section.parts, None):
        if isinstance(part, Figure):
            charts.append(_part(part, numbers))
            continue
        if charts:
            made.append(f'<div class="charts">{"".join(charts)}</div>')
            charts = []
        if part is not None:
            made.append(_part(part, numbers))
    title = f'<h2 id="s{number}">{escape(section.title)}</h2>'
    return f'<section aria-labelledby="s{number}">{title}{"".join(made)}</section>\n'


def _part(part: Part, numbers: dict[int, str]) -> str:
    if isinstance(part, Words):
        return f"<p>{escape(part.text)}</p>"
    if isinstance(part, Bullets):
        return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in part.items) + "</ul>"
    if isinstance(part, Code):
        return (
            f"<details><summary>{escape(part.caption)}</summary>"
            f'<pre tabindex="0">{escape(part.text)}</pre></details>'
        )
    caption = f"<b>{numbers[id(part)]}.</b> {escape(part.caption)}"
    if isinstance(part, Figure):
        return (
            f"<figure>{part.svg}<figcaption>{caption}</figcaption><details><summary>Values of "
            f"{numbers[id(part)]}</summary>{_table(part.values, '')}</details></figure>"
        )
    return _table(part, caption)


def _table(table: Table, caption: str) -> str:
    def cell(tag: str, column: int, text: str, scope: str = "") -> str:
        look = ' class="words"' if column < table.text_columns else ""
        return f"<{tag}{scope}{look}>{escape(text)}</{tag}>"

    head = "".join(cell("th", n, c, ' scope="col"') for n, c in enumerate(table.columns))
    rows = "".join(
        "<tr>" + cell("th", 0, row[0], ' scope="row"')
        + "".join(cell("td", n, c) for n, c in enumerate(row[1:], 1)) + "</tr>"
        for row in table.rows
    )  # fmt: skip
    # The caption stays outside, or it would scroll away with a table wider than a phone.
    name = escape(table.caption[:80], quote=True)
    made = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">'
        f'<table{" class=wide" if table.wide else ""} aria-label="{name}">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    words = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="table">{words}{made}</figure>'
