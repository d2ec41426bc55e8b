"""The picture of a ticket's life in docs/architecture.md, drawn from the tables that the machines run by.

``python -m tests.transfer.diagram`` draws it anew; a test compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transfer import sink, source

DOC = Path(__file__).parents[2] / "docs" / "architecture.md"
BEGIN, END = "<!-- python -m tests.transfer.diagram -->\n", "<!-- end -->\n"


def side(name: str, table: dict[Any, Any]) -> list[str]:
    """One machine: events that lead from one state to another on one arrow."""
    arrows: dict[tuple[str, ...], list[str]] = {}
    for (state, event), after in table.items():
        for to in after:
            if to is not state:
                word = "deadline" if event is None else event.__name__
                ends = tuple(f"{name}_{each}" if each else "[*]" for each in (state, to))
                arrows.setdefault(ends, []).append(word)
    lines = [f"    state {name} {{"]
    lines += [f"        {start} --> {stop}: {', '.join(words)}" for (start, stop), words in arrows.items()]
    return [*lines, "    }"]


def drawn() -> str:
    """Both machines as Mermaid."""
    lines = [*side("source", source.TRANSITIONS), *side("sink", sink.TRANSITIONS)]
    return "".join(f"{line}\n" for line in ("```mermaid", "stateDiagram-v2", *lines, "```"))


def committed() -> str:
    """The picture in the docs."""
    return DOC.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def main() -> None:
    """Draw it anew."""
    before, behind = DOC.read_text(encoding="utf-8").split(BEGIN + committed() + END)
    DOC.write_text(before + BEGIN + drawn() + END + behind, encoding="utf-8")


if __name__ == "__main__":
    main()
