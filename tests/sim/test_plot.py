"""Charts are well-formed SVG: every point inside its frame, text escaped, round ticks, the same bytes twice."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.plot import CSS, DARK, DASHES, LIGHT, Axis, Bar, Series, bars, lines, stack

X, Y = Axis("time (s)"), Axis("requests")


def parsed(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    return root


def texts(svg: str) -> list[str]:
    return [each.text or "" for each in parsed(svg).iter("text")]


def inside(svg: str) -> bool:
    """No coordinate of a line or a bar lies outside the picture."""
    root = parsed(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for path in root.iter("path"):
        for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.attrib["d"]):
            if not (0 <= float(x) <= width and 0 <= float(y) <= height):
                return False
    return all(float(rect.attrib["height"]) >= 0 for rect in root.iter("rect"))


def test_ticks_are_round_and_axes_have_their_units() -> None:
    found = texts(lines("A title", [Series("one", [(0.0, 0.0), (10.0, 37.0)])], X, Y))
    assert found[:2] == ["A title", "one"]
    assert {"time (s)", "requests"} <= set(found)
    assert found[2:7] == ["0", "10", "20", "30", "40"]
    few = texts(lines("t", [Series("s", [(0.002, 1.0), (0.3, 2.0)])], Axis("seconds", log=True), Y))
    assert {"0.002", "0.005", "0.01", "0.1", "0.2"} <= set(few)
    many = texts(lines("t", [Series("s", [(0.001, 1.0), (1000.0, 2.0)])], Axis("seconds", log=True), Y))
    assert {"0.001", "1", "1000"} <= set(many)
    assert "0.002" not in many


def test_a_line_goes_where_its_points_say() -> None:
    svg = lines("t", [Series("s", [(0.0, 0.0), (5.0, 50.0), (10.0, 100.0)])], X, Axis("%", low=0.0, high=100.0))
    path = next(
        each.attrib["d"]
        for each in parsed(svg).iter("path")
        if "line l0" in each.attrib["class"] and "L" in each.attrib["d"]
    )
    (x0, y0), (x1, y1), (x2, y2) = [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(y1 - y2)
    assert y0 > y2


def test_what_lies_beyond_a_fixed_end_stays_at_it() -> None:
    svg = lines(
        "t", [Series("s", [(-5.0, -50.0), (5.0, 500.0)])], Axis("x", low=0.0, high=1.0), Axis("y", low=0.0, high=1.0)
    )
    assert inside(svg)


def test_text_is_escaped() -> None:
    evil = '<script>&"'
    for svg in (
        lines(
            evil,
            [Series(evil, [(0.0, 1.0)], dots=True)],
            Axis(evil),
            Axis(evil),
            marks=[(0.0, evil)],
            levels=[(1.0, evil)],
        ),
        stack(evil, [Series(evil, [(0.0, 1.0), (1.0, 1.0)])], Axis(evil), Axis(evil)),
        bars(evil, [(evil, [Bar(evil, 1.0)])], Axis(evil)),
    ):
        assert "<script" not in svg
        assert evil in texts(svg)


VALUES = st.floats(-1e6, 1e6) | st.sampled_from([math.inf, -math.inf, math.nan, 0.0])


@given(st.lists(st.lists(st.tuples(VALUES, VALUES), max_size=6), max_size=10), st.booleans())
def test_any_points_make_a_picture(points: list[list[tuple[float, float]]], log: bool) -> None:
    series = [Series(f"s{index}", some, dots=True) for index, some in enumerate(points)]
    svg = lines("t", series, Axis("x", log=log), Y, marks=[(1.0, "m"), (math.inf, "never")])
    assert inside(svg)
    assert "nan" not in svg.lower()
    assert svg == lines("t", series, Axis("x", log=log), Y, marks=[(1.0, "m"), (math.inf, "never")])


@given(st.lists(st.lists(st.floats(0, 1e5), min_size=4, max_size=4), max_size=9))
def test_areas_stand_on_each_other(values: list[list[float]]) -> None:
    series = [Series(f"s{index}", list(enumerate(some))) for index, some in enumerate(values)]
    assert inside(stack("t", series, X, Y))


def test_bars_are_as_high_as_their_values() -> None:
    svg = bars("t", [("a", [Bar("p", 1.0, 0.5, 1.5), Bar("q", 2.0)]), ("b", [Bar("p", 4.0)])], Axis("per GPU"))
    heights = [float(each.attrib["height"]) for each in parsed(svg).iter("rect") if each.attrib["width"] != "22"]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert heights[2] == pytest.approx(4 * heights[0], abs=0.2)
    assert inside(svg)
    assert inside(bars("t", [], Axis("y")))


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_stand_out_from_both_grounds_and_dashes_differ() -> None:
    for ground, colours in (("#ffffff", LIGHT), ("#16181c", DARK)):
        for colour in colours:
            high, low = sorted((luminance(colour), luminance(ground)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4, colour
            assert colour in CSS
    assert len(LIGHT) == len(DARK) == len(DASHES) == len(set(DASHES))
