"""Small charts as SVG text: lines, stacked areas and bars, with ticks, units, a legend and marks.

Colours are CSS classes of the page (`CSS` below, light and dark), chosen to be told apart with deficient colour vision;
lines differ in their dashes as well. The same input gives the same bytes. Not a library's: those that are pure Python
bring colours of their own or a dependency, and this room has none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LIGHT = ("#0072b2", "#c44e00", "#00805f", "#a6428a", "#6f5a00", "#5b4bb5", "#b3202c", "#4d4d4d")
DARK = ("#56b4e9", "#ff9d4d", "#2fd3a5", "#f08fc8", "#f0e442", "#b3a6ff", "#ff7b85", "#cfcfcf")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2 1 2", "1 2", "6 6")

CSS = (
    ":root{color-scheme:light dark;--bg:#fff;--fg:#1b1b1b;--dim:#5c5c5c;--grid:#dcdcdc;"
    + "".join(f"--c{i}:{colour};" for i, colour in enumerate(LIGHT))
    + "}\n@media(prefers-color-scheme:dark){:root{--bg:#16181c;--fg:#e9e9e9;--dim:#a8a8a8;--grid:#383c44;"
    + "".join(f"--c{i}:{colour};" for i, colour in enumerate(DARK))
    + "}}\nsvg{max-width:100%;height:auto}\nsvg text{fill:var(--fg);font:12px system-ui,sans-serif}\n"
    + "svg .dim{fill:var(--dim)}svg .grid{stroke:var(--grid);stroke-width:1}\n"
    + "svg .axis{stroke:var(--dim);stroke-width:1}\n"
    + "svg .mark{stroke:var(--fg);stroke-width:1.2;stroke-dasharray:3 3}svg .line{fill:none;stroke-width:1.8}\n"
    + "".join(
        f"svg .l{i}{{stroke:var(--c{i});stroke-dasharray:{DASHES[i] or 'none'}}}svg .f{i}{{fill:var(--c{i})}}\n"
        for i in range(len(LIGHT))
    )
    + "svg .f{fill-opacity:.75}"
)


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows: its label with the unit, and its ends where they are not those of the data."""

    label: str
    low: float | None = None
    high: float | None = None
    log: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """Points in order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """A value, and the ends of its interval."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def lines(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    marks: Sequence[tuple[float, str]] = (),
    levels: Sequence[tuple[float, str]] = (),
    size: tuple[int, int] = (680, 320),
) -> str:
    """Lines over each other; `marks` are vertical, `levels` horizontal. Points that are not finite are left out."""
    shown = [[point for point in one.points if _fits(point[0], x) and _fits(point[1], y)] for one in series]
    flat = [point for points in shown for point in points]
    frame = _Frame(
        title,
        _scale([p[0] for p in flat] + [at for at, _ in marks if _fits(at, x)], x, 0),
        _scale([p[1] for p in flat] + [at for at, _ in levels if _fits(at, y)], y, 1),
        x.label,
        y.label,
        [(f"l{i % len(LIGHT)}", one.name) for i, one in enumerate(series)],
        size,
    )
    for index, (one, points) in enumerate(zip(series, shown, strict=True)):
        path = _path([(frame.x(a), frame.y(b)) for a, b in points])
        if path:
            frame.add(f'<path class="line l{index % len(LIGHT)}" d="{path}"/>')
        if one.dots:
            for a, b in points:
                note = escape(f"{one.name}: {b:g} at {a:g}")
                frame.add(
                    f'<circle class="f{index % len(LIGHT)}" cx="{_n(frame.x(a))}" cy="{_n(frame.y(b))}" r="3.2">'
                    f"<title>{note}</title></circle>"
                )
    frame.mark(marks, levels)
    return frame.svg()


def stack(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    marks: Sequence[tuple[float, str]] = (),
    size: tuple[int, int] = (680, 240),
) -> str:
    """Areas on top of each other, the first at the bottom; all series have the same x. A value holds until the next."""
    times = [at for at, _ in series[0].points] if series else []
    below = [0.0] * len(times)
    bands: list[tuple[list[float], list[float]]] = []
    for one in series:
        above = [base + value for base, (_, value) in zip(below, one.points, strict=True)]
        bands.append((below, above))
        below = above
    frame = _Frame(
        title,
        _scale(times + [at for at, _ in marks], x, 0),
        _scale([0.0, *below], y, 1),
        x.label,
        y.label,
        [(f"f{i % len(LIGHT)}", one.name) for i, one in enumerate(series)],
        size,
    )
    for index, (low, high) in enumerate(bands):
        if not any(a < b for a, b in zip(low, high, strict=True)):
            continue
        up = _steps([(frame.x(at), frame.y(value)) for at, value in zip(times, high, strict=True)])
        down = _steps([(frame.x(at), frame.y(value)) for at, value in zip(times, low, strict=True)])
        frame.add(f'<path class="f f{index % len(LIGHT)}" d="{_path([*up, *reversed(down)])}Z"/>')
    frame.mark(marks, ())
    return frame.svg()


def bars(
    title: str, groups: Sequence[tuple[str, Sequence[Bar]]], y: Axis, *, size: tuple[int, int] = (680, 320)
) -> str:
    """Bars from 0, in groups that share their order of colours; whiskers where there is an interval."""
    every = [bar for _, group in groups for bar in group]
    names = list(dict.fromkeys(bar.name for bar in every))
    tops = [value for bar in every for value in (bar.value, bar.high) if value is not None and math.isfinite(value)]
    count = max(1, len(groups))
    frame = _Frame(
        title,
        _Scale(0.0, float(count), False, ()),
        _scale([0.0, *tops], y, 1),
        "",
        y.label,
        [(f"f{i % len(LIGHT)}", name) for i, name in enumerate(names)],
        size,
    )
    width = 0.8 / max(1, len(names))
    for index, (label, group) in enumerate(groups):
        frame.text(frame.x(index + 0.5), frame.bottom + 16, label, "middle")
        for bar in group:
            place = names.index(bar.name)
            left, right = frame.x(index + 0.1 + place * width), frame.x(index + 0.1 + (place + 0.92) * width)
            top = frame.y(bar.value)
            note = escape(f"{label}, {bar.name}: {bar.value:.4g}")
            frame.add(
                f'<rect class="f f{place % len(LIGHT)}" x="{_n(left)}" y="{_n(top)}" width="{_n(right - left)}" '
                f'height="{_n(frame.bottom - top)}"><title>{note}</title></rect>'
            )
            frame.text((left + right) / 2, top - 5, f"{bar.value:.3g}", "middle")
            if bar.low is not None and bar.high is not None:
                middle = _n(right - (right - left) / 6)
                frame.add(
                    f'<path class="axis" fill="none" d="M{middle} {_n(frame.y(bar.low))}V{_n(frame.y(bar.high))}"/>'
                )
    return frame.svg()


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """0 at the low end, 1 at the high one; what is beyond stays at the end."""
        value = min(self.high, max(self.low, value))
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


class _Frame:
    """The axes, the grid and what is drawn inside."""

    def __init__(
        self,
        title: str,
        x: _Scale,
        y: _Scale,
        x_label: str,
        y_label: str,
        legend: Sequence[tuple[str, str]],
        size: tuple[int, int],
    ) -> None:
        self._title, self._x, self._y = title, x, y
        self._width, height = size
        self._left, self._right = 62, self._width - 14
        rows, at, places = 1, self._left, []
        for kind, name in legend:
            wide = 34 + 7 * len(name)
            if at + wide > self._width and at > self._left:
                rows, at = rows + 1, self._left
            places.append((at, rows, kind, name))
            at += wide
        self._top = 26 + 18 * rows
        self._height = height + 18 * rows
        self.bottom = self._height - 40
        self._parts: list[str] = []
        self.text(self._left, 16, title, "start", "title")
        for left, row, kind, name in places:
            level = 18 + 18 * row
            if kind.startswith("l"):
                self.add(f'<path class="line {kind}" d="M{left} {level - 4}h22"/>')
            else:
                self.add(f'<rect class="f {kind}" x="{left}" y="{level - 9}" width="22" height="10"/>')
            self.text(left + 27, level, name, "start")
        for tick in y.ticks:
            self.add(f'<path class="grid" d="M{self._left} {_n(self.y(tick))}H{self._right}"/>')
            self.text(self._left - 6, self.y(tick) + 4, f"{tick:g}", "end", "dim")
        for tick in x.ticks:
            self.add(f'<path class="grid" d="M{_n(self.x(tick))} {self._top}V{self.bottom}"/>')
            self.text(self.x(tick), self.bottom + 16, f"{tick:g}", "middle", "dim")
        self.add(f'<path class="axis" d="M{self._left} {self.bottom}H{self._right}"/>')
        self.text((self._left + self._right) / 2, self._height - 6, x_label, "middle", "dim")
        turned = f"translate(14 {_n((self._top + self.bottom) / 2)}) rotate(-90)"
        self.add(f'<text class="dim" text-anchor="middle" transform="{turned}">{escape(y_label)}</text>')

    def x(self, value: float) -> float:
        return self._left + self._x.at(value) * (self._right - self._left)

    def y(self, value: float) -> float:
        return self.bottom - self._y.at(value) * (self.bottom - self._top)

    def add(self, part: str) -> None:
        self._parts.append(part)

    def text(self, x: float, y: float, text: str, anchor: str, kind: str = "") -> None:
        named = f' class="{kind}"' if kind else ""
        self.add(f'<text{named} x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{escape(text)}</text>')

    def mark(self, marks: Sequence[tuple[float, str]], levels: Sequence[tuple[float, str]]) -> None:
        """Dashed lines with their names, across everything."""
        for index, (at, name) in enumerate(marks):
            if math.isfinite(at):
                self.add(f'<path class="mark" d="M{_n(self.x(at))} {self._top}V{self.bottom}"/>')
                near_end = self.x(at) > (self._left + self._right) / 2
                beside = self.x(at) + (-4 if near_end else 4)
                self.text(beside, self._top + 12 + 13 * (index % 3), name, "end" if near_end else "start")
        for at, name in levels:
            self.add(f'<path class="mark" d="M{self._left} {_n(self.y(at))}H{self._right}"/>')
            self.text(self._left + 4, self.y(at) - 4, name, "start")

    def svg(self) -> str:
        body = "\n".join(self._parts)
        return (
            f'<svg viewBox="0 0 {self._width} {self._height}" width="{self._width}" role="img" '
            f'aria-label="{escape(self._title)}">\n{body}\n</svg>'
        )


def _fits(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and (not axis.log or value > 0)


def _scale(values: Sequence[float], axis: Axis, room: int) -> _Scale:
    """Ends that hold the data, at ticks where `room` is given."""
    low = axis.low if axis.low is not None else min(values, default=1.0 if axis.log else 0.0)
    high = axis.high if axis.high is not None else max(values, default=low)
    if axis.log:
        high = max(high, low * 2)
        return _Scale(low, high, True, tuple(_decades(low, high)))
    if not room and axis.low is None and low > 0 and low < high / 4:
        low = 0.0
    if high <= low:
        high = low + 1.0
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    if room and axis.low is None:
        low = step * math.floor(low / step)
    if room and axis.high is None:
        high = step * math.ceil(high / step)
    begin, end = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return _Scale(low, high, False, tuple(index * step for index in range(begin, end + 1)))


def _decades(low: float, high: float) -> list[float]:
    few = math.log10(high / low) < 3
    found = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for factor in (1, 2, 5) if few else (1,):
            # Written out, because 10.0 ** -3 * 2 is not 0.002 to the last digit.
            tick = float(f"{factor}e{power}")
            if low <= tick <= high:
                found.append(tick)
    return found


def _steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A value holds until the next."""
    found = list(points[:1])
    for (_, before), (x, y) in itertools.pairwise(points):
        found += [(x, before), (x, y)]
    return found


def _path(points: Sequence[tuple[float, float]]) -> str:
    """A polyline without points that are not seen: those equal at a tenth of a unit."""
    seen: list[tuple[str, str]] = []
    for point in ((_n(x), _n(y)) for x, y in points):
        if not seen or seen[-1] != point:
            seen.append(point)
    return "M" + "L".join(f"{x} {y}" for x, y in seen) if seen else ""


def _n(value: float) -> str:
    text = f"{value:.1f}"
    return text.removesuffix(".0")
