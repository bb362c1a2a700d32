"""A comparison of models as one HTML file that needs nothing else: a table and a picture of size against quality."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hf_softheads.report.tables import Table, human_bytes

_WIDTH, _HEIGHT, _EDGE = 640, 320, 60
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem; border-bottom: 1px solid #ccc; text-align: right; }
th:first-child, td:first-child { text-align: left; } svg text { font-size: 12px; } pre { overflow-x: auto; }
"""


def page(
    title: str, table: Table, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> str:
    """The text of the file.

    Args:
        rows: `name`, `nbytes` and `perplexity` of each model, for the picture.
        about: what is shown below as JSON: settings and provenance.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in table.rows
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>\n"
        "<p>Perplexity is strict: over the whole vocabulary, ± its standard error over tokens. The error of a ratio is "
        "that of the difference token by token.</p>\n"
        f"{_picture(rows)}\n<details><summary>Settings and provenance</summary>"
        f"<pre>{escape(json.dumps(about, indent=1))}</pre></details>\n</body></html>\n"
    )


def _picture(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bytes on disk to the right, perplexity upwards."""
    x = _axis([row["nbytes"] for row in rows], _EDGE, _WIDTH - 2 * _EDGE)
    y = _axis([row["perplexity"] for row in rows], _HEIGHT - _EDGE, _EDGE)
    points = [
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="5" fill="#1f77b4"/>'
        f'<text x="{a + 9:.1f}" y="{b + 4:.1f}">{escape(row["name"])}</text>'
        for a, b, row in zip(x, y, rows, strict=True)
    ]
    sizes, losses = [r["nbytes"] for r in rows], [r["perplexity"] for r in rows]
    base, right = _HEIGHT - _EDGE + 25, _WIDTH - 2 * _EDGE
    labels = [
        f'<line x1="{_EDGE - 15}" y1="{base - 15}" x2="{right + 15}" y2="{base - 15}" stroke="#888"/>',
        f'<line x1="{_EDGE - 15}" y1="{base - 15}" x2="{_EDGE - 15}" y2="{_EDGE - 15}" stroke="#888"/>',
        f'<text x="{_EDGE}" y="{base}">{human_bytes(min(sizes))}</text>',
        f'<text x="{right}" y="{base}" text-anchor="end">{human_bytes(max(sizes))} on disk</text>',
        f'<text x="{_EDGE - 20}" y="{_HEIGHT - _EDGE}" text-anchor="end">{min(losses):.2f}</text>',
        f'<text x="{_EDGE - 20}" y="{_EDGE}" text-anchor="end">{max(losses):.2f}</text>',
        f'<text x="{_EDGE - 50}" y="{_EDGE - 25}">perplexity</text>',
    ]
    return (
        f'<svg role="img" aria-label="size against perplexity" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}">{"".join(labels + points)}</svg>'
    )


def _axis(values: Sequence[float], start: float, stop: float) -> list[float]:
    low, high = min(values), max(values)
    span = high - low or 1.0
    return [start + (value - low) / span * (stop - start) for value in values]
