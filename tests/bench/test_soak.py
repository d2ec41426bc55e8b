"""What a soak calls a leak."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.soak import PARTS, WARM, Soaked, plot, rows


def soaked(
    *, grows_kb: int = 0, files: int = 0, ends: Counter[str] | None = None, held: tuple[str, ...] = ()
) -> Soaked:
    """Of one process that fills up while it gets warm, and grows by so much after that."""
    after = [max(0, step - WARM) for step in range(PARTS)]
    memory = [{"decode-0": 90_000 + 3_000 * min(step, WARM) + grows_kb * more} for step, more in enumerate(after)]
    return Soaked(200, memory, [{"decode-0": 20 + files * more} for more in after], ends or Counter(OK=200), list(held))


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (soaked(), []),
        (soaked(grows_kb=200), []),
        (soaked(grows_kb=300), ["decode-0: 4200 KiB more"]),
        (soaked(files=1), ["decode-0: 14 more files"]),
        (soaked(held=("decode-0 baton_pages pulling 3",)), ["decode-0 baton_pages pulling 3"]),
        (soaked(ends=Counter(OK=9, left=4, INVALID_ARGUMENT=3, INTERNAL=1)), ["1 requests ended as INTERNAL"]),
    ],
)
def test_what_grows_once_warm_is_named(run, said):
    assert run.broken() == said


def test_the_plot_and_the_rows_name_every_process():
    assert "decode-0" in plot(soaked())
    assert [row.case for row in rows(soaked())][1:3] == ["decode-0: memory", "decode-0: open files"]
