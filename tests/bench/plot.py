"""A plot of results as SVG: for each a bar to its median, a line over its range, and the target, the same for all.

Rule: units differ, so what is drawn is how far each result is on the way to its target, in steps of a factor of two.
"""

import math
from html import escape
from pathlib import Path

from measure import Result

_LABELS, _PLOT, _VALUES, _ROW, _TOP = 330, 400, 200, 22, 34  # pixels
_LEAST, _MOST = 1 / 4, 16  # of the target, at the left and at the right end


def _x(reach: float) -> float:
    share = math.log2(min(max(reach, _LEAST), _MOST) / _LEAST) / math.log2(_MOST / _LEAST)
    return _LABELS + share * _PLOT


def svg(results: list[Result]) -> str:
    bottom = _TOP + _ROW * len(results)
    width, height = _LABELS + _PLOT + _VALUES, bottom + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    reach = _LEAST
    while reach <= _MOST:
        stroke = 'stroke="black" stroke-width="2"' if reach == 1 else 'stroke="#ddd"'
        label = "target" if reach == 1 else f"{reach:g}"
        lines.append(f'<line x1="{_x(reach):.1f}" x2="{_x(reach):.1f}" y1="{_TOP - 6}" y2="{bottom}" {stroke}/>')
        lines.append(f'<text x="{_x(reach):.1f}" y="{_TOP - 12}" text-anchor="middle">{label}</text>')
        reach *= 2
    for number, result in enumerate(results):
        middle = _TOP + _ROW * number + _ROW / 2
        ends = sorted((_x(result.reach(result.low)), _x(result.reach(result.high))))
        here = _x(result.reach(result.median))
        color = "#4a9" if result.reached else "#d75"
        value = f"{result.median:,.3g}" if result.median < 1000 else f"{result.median:,.0f}"
        lines += [
            f'<text x="{_LABELS - 8}" y="{middle + 4}" text-anchor="end">{escape(result.name)}</text>',
            f'<rect x="{_LABELS}" y="{middle - 7}" width="{here - _LABELS:.1f}" height="14" fill="{color}"/>',
            f'<line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{middle}" y2="{middle}" stroke="#333"/>',
            f'<text x="{_LABELS + _PLOT + 8}" y="{middle + 4}">{value} {escape(result.unit)}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def save(path: Path, results: list[Result]) -> None:
    path.write_text(svg(results))
