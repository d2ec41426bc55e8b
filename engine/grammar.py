"""Which tokens may follow where a text must match a JSON schema, a regular expression or a grammar. No torch here.

What may follow is a function of the constraint and of the tokens so far. So nothing but tokens ever travels: whoever
goes on with a text, after a hand-off, a move, a loss or a swap, replays them, and stands where the other one stood.

Two rules are ours, the rest is llguidance's (the extra `grammar`):

- A stop token may be chosen where the text matches in full, and nowhere else: a text that ends so matches. That is
  so for every stop token of the request, be it the model's end token or a word; one that the grammar needs for its
  text, too, can only end it.
- A special token, which never becomes text, may be chosen only where a grammar names it.

Compiling takes milliseconds and is done on a thread of its own, from when a request is heard of on; a constraint that
was compiled is kept for the next request that has it. A mask is made between a forward pass and its choice, so what one
text may take for its masks has bounds, which no ordinary constraint comes near:

| parameter | unit | default | |
|---|---|---|---|
| KEPT | constraints | 64 | that stay compiled |
| FUEL | of llguidance's lexer | 50,000 | for the first mask of a constraint, and for each later one: some 4 ms |
| STATES | of llguidance's lexer | 50,000 | that a compiled constraint may grow to: some 75 MB |
| FIRST_S | s | 0.25 | that the masks of one text may take on the CPU, and |
| EACH_S | s | 0.01 | for each of its tokens beside that; then the text ends, as where nothing may follow |
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.constraint import Constraint, Language
from core.errors import BatonError, RequestError

Mask = NDArray[np.bool_]

KEPT = 64
FUEL = 50_000
STATES = 50_000
FIRST_S = 0.25
EACH_S = 0.01
MOST_SAID = 300
"""Characters of what a compiler says."""
SPACES = r"( |\r?\n[ \t]{0,32})?"
"""Between the parts of a JSON text: a space, or a new line and what it is indented by. Without a bound, a weak model
may write nothing else until its tokens run out."""


class GrammarMissing(BatonError):
    """Constraints cannot be compiled here: one sentence says why, and what to install where that helps."""


def available() -> bool:
    """Whether llguidance is installed."""
    return importlib.util.find_spec("llguidance") is not None


class Grammars:
    """Compiles constraints for the model in a folder, whose logits have `vocab` entries; its end tokens are `ends`.

    Safe to use from several threads. Raises `GrammarMissing` without llguidance, or where it cannot make text of the
    model's tokens.
    """

    def __init__(self, folder: str | Path, vocab: int, ends: Sequence[int]) -> None:
        try:
            import llguidance
            from llguidance.gbnf_to_lark import any_to_lark
        except ImportError:
            raise GrammarMissing("llguidance is not installed: it comes with the extra grammar") from None
        self._inner: Any = llguidance
        self._to_lark = any_to_lark
        self.vocab = vocab
        self.version = f"llguidance {importlib.metadata.version('llguidance')}"
        """What compiles them: masks of equal versions are equal."""
        path = Path(folder) / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
            size, special = _known(json.loads(text))
            # It wants an end token, and would guess. End tokens that the tokenizer does not know have no text anyway.
            named = [token for token in ends if token < size] or special[:1] or None
            self._tokenizer = llguidance.LLTokenizer(text, n_vocab=max(vocab, size), eos_token=named)
        except Exception as error:  # llguidance raises ValueError, and who knows what else of a file that is none
            raise GrammarMissing(f"{path}: {self.version} cannot use it: {_said(error)}") from error
        self._limits = llguidance.LLParserLimits(
            initial_lexer_fuel=FUEL, step_lexer_fuel=FUEL, max_lexer_states=STATES, verbose_errors=False
        )
        self._kept: OrderedDict[Constraint, Any] = OrderedDict()
        self._turn = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "grammar")

    def check(self, constraint: Constraint) -> None:
        """Raise `RequestError` (INVALID_ARGUMENT), with the compiler's words, if nothing can be made of it.

        That takes a core while it lasts, but never more than one.
        """
        self._thread.submit(self._compiled, constraint).result()

    def prepare(self, constraint: Constraint) -> None:
        """A text with this constraint is to come: compile it meanwhile."""
        self._thread.submit(self._compiled, constraint)

    def walk(self, constraint: Constraint, output: Sequence[int], stops: Sequence[int]) -> Walk:
        """Begin to find out where a text stands after `output`; returns at once. Stop tokens are `stops`."""
        return Walk(self._thread.submit(self._replayed, constraint, list(output)), self.vocab, stops)

    def _replayed(self, constraint: Constraint, output: list[int]) -> Any:
        matcher = self._compiled(constraint).deep_copy()
        matcher.consume_tokens(output)
        return matcher

    def _compiled(self, constraint: Constraint) -> Any:
        """A matcher at the beginning of its text, to be copied."""
        with self._turn:
            if (found := self._kept.get(constraint)) is not None:
                self._kept.move_to_end(constraint)
                return found
        try:
            found = self._inner.LLMatcher(self._tokenizer, self._grammar(constraint), log_level=0, limits=self._limits)
            found.compute_bitmask()  # of some that cannot be used this is the first to know
            wrong = found.get_error() if found.is_error() else ""
        except Exception as error:
            wrong = str(error)
        if wrong:
            raise RequestError("INVALID_ARGUMENT", f"{constraint.language}: {_said(wrong)}")
        with self._turn:
            self._kept[constraint] = found
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return found

    def _grammar(self, constraint: Constraint) -> str:
        kinds = self._inner.LLMatcher
        match constraint.language:
            case Language.JSON_SCHEMA:
                defaults = {"whitespace_pattern": SPACES}
                return str(kinds.grammar_from_json_schema(constraint.text, defaults=defaults))
            case Language.REGEX:
                return str(kinds.grammar_from_regex(constraint.text))
            case Language.GRAMMAR:
                return str(kinds.grammar_from_lark(self._to_lark(constraint.text)))


class Walk:
    """Where one text stands in its grammar. One thread uses it."""

    def __init__(self, begun: Future[Any], vocab: int, stops: Sequence[int]) -> None:
        self._begun = begun
        self._vocab = vocab
        self._stops = np.array([token for token in stops if 0 <= token < vocab], np.int64)
        self._allowed: Mask | None = None
        self._left_s = FIRST_S
        self.error = ""
        """Why nothing may follow any more, if that is not the grammar's own doing."""

    def allowed(self) -> Mask:
        """Which tokens ``[vocab]`` may come next; waits for the compiler, the first time. None may, where it failed."""
        if self._allowed is None:
            self._allowed = self._mask()
        return self._allowed

    def add(self, token: int) -> None:
        """A token was chosen, one of those allowed; a stop token ends the text, and is none of it."""
        self._allowed = None
        self._left_s += EACH_S
        if token not in self._stops:
            self._begun.result().consume_token(token)

    def _mask(self) -> Mask:
        try:
            matcher = self._begun.result()
            began = time.thread_time()
            words = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            self._left_s -= time.thread_time() - began
            allowed = np.unpackbits(words, bitorder="little", count=self._vocab).view(np.bool_)
            ends = matcher.is_accepting()
            self.error = matcher.get_error() if matcher.is_error() else ""
            if self._left_s < 0:
                self.error = self.error or "its masks take too long"
        except Exception as error:
            self.error = str(error)
        if self.error:
            return np.zeros(self._vocab, np.bool_)
        allowed[self._stops] = ends
        return allowed


def _known(document: dict[str, Any]) -> tuple[int, list[int]]:
    """Tokens in a ``tokenizer.json``, up to the highest, and which of them are special."""
    vocabulary, added = document["model"]["vocab"], document.get("added_tokens") or ()
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return 1 + max([*ids, *(each["id"] for each in added)]), [each["id"] for each in added if each["special"]]


def _said(error: object) -> str:
    """What a compiler says, without the pictures that it draws."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return told[:MOST_SAID]
