"""What the text of a request must match: a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from core.errors import RequestError

MAX_CHARACTERS = 65_536
"""It travels with the request wherever that goes, and is compiled wherever that arrives."""


class Language(StrEnum):
    """What a constraint is written in."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"
    """Lark's notation, or llama.cpp's (GBNF)."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """The text, from its first token to the stop token that ends it, matches this in full.

    Which tokens may follow is a function of the constraint and the tokens so far, and so is the same on every worker.
    Raises `RequestError` (INVALID_ARGUMENT) if it is too long; whether it makes sense, only a compiler can say.
    """

    language: Language
    text: str = field(repr=False)
    """Clients' own words: not for logs."""

    def __post_init__(self) -> None:
        if len(self.text) > MAX_CHARACTERS:
            why = f"got {len(self.text)} characters, want at most {MAX_CHARACTERS}"
            raise RequestError("INVALID_ARGUMENT", f"{self.language}: {why}")
