"""Texts match what they must, whatever the logits say; what may follow is a function of the tokens so far."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from core.constraint import MAX_CHARACTERS, Constraint, Language
from core.errors import RequestError
from core.sampling import Sampling
from engine.grammar import GrammarMissing, Grammars
from tests.gateway.tokenizers_made import MADE, save

JSON, REGEX, GRAMMAR = Language.JSON_SCHEMA, Language.REGEX, Language.GRAMMAR
END, PAD, WORD = 0, 1, 2
"""Special tokens of the small vocabulary; the last one stands between the model's tokens and nothing else."""
PIECES = ("ab", "abc", "bb", "ca", "cab", "aa", "bc", '"a', '":', "true", " \n")


def small() -> tokenizers.Tokenizer:
    """Every byte, a few words of letters a to c, and special tokens."""
    names = ["<end>", "<pad>", "<word>"]
    vocabulary = {name: token for token, name in enumerate(names)}
    mark = {chr(byte): char for byte, char in zip(range(256), _alphabet(), strict=True)}
    for text in (*map(chr, range(256)), *PIECES):
        vocabulary["".join(mark[char] for char in text)] = len(vocabulary)
    made = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in names])
    return made


def _alphabet() -> Iterator[str]:
    """GPT-2's stand-in for each byte, in order."""
    extra = itertools.count(256)
    for byte in range(256):
        printable = 0x21 <= byte < 0x7F or 0xA1 <= byte < 0xAD or byte >= 0xAE
        yield chr(byte) if printable else chr(next(extra))


VOCAB = 3 + 256 + len(PIECES)
TEXTS = {token: small().decode([token], skip_special_tokens=False) for token in range(3, VOCAB)}
PADDED = VOCAB + 5
"""Models often have logits for tokens that their tokenizer does not."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(small(), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def grammars(folder) -> Grammars:
    return Grammars(folder, PADDED, [END])


# ---------------------------------------------------------------- regular expressions, by Brzozowski's derivatives


@dataclass(frozen=True)
class Expression:
    """A regular expression over a, b, c: `nothing`, `empty`, a letter, or one of parts."""

    kind: str
    parts: tuple[Any, ...] = ()

    @property
    def nullable(self) -> bool:
        match self.kind:
            case "empty" | "star":
                return True
            case "then":
                return all(part.nullable for part in self.parts)
            case "or":
                return any(part.nullable for part in self.parts)
        return False

    @property
    def written(self) -> str:
        match self.kind:
            case "letter":
                return str(self.parts[0])
            case "star":
                return f"({self.parts[0].written})*"
            case "then":
                return "".join(f"({part.written})" for part in self.parts)
            case "or":
                return "|".join(f"({part.written})" for part in self.parts)
        return ""


NOTHING, EMPTY = Expression("nothing"), Expression("empty")


def then(first: Expression, second: Expression) -> Expression:
    if NOTHING in (first, second):
        return NOTHING
    return second if first == EMPTY else first if second == EMPTY else Expression("then", (first, second))


def either(first: Expression, second: Expression) -> Expression:
    if first in (NOTHING, second):
        return second
    return first if second == NOTHING else Expression("or", (first, second))


@cache
def after(expression: Expression, letter: str) -> Expression:
    """What must follow `letter`; nothing can if the letter may not come."""
    match expression.kind:
        case "letter":
            return EMPTY if expression.parts[0] == letter else NOTHING
        case "star":
            return then(after(expression.parts[0], letter), expression)
        case "or":
            return either(*(after(part, letter) for part in expression.parts))
        case "then":
            first, second = expression.parts
            onward = then(after(first, letter), second)
            return either(onward, after(second, letter)) if first.nullable else onward
    return NOTHING


expressions = st.recursive(
    st.sampled_from("abc").map(lambda letter: Expression("letter", (letter,))),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda two: then(*two)),
        st.tuples(inner, inner).map(lambda two: either(*two)),
        inner.map(lambda one: Expression("star", (one,))),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(expression=expressions, seed=st.integers(0, 2**32))
def test_a_token_may_follow_if_and_only_if_the_text_can_still_match(grammars, expression, seed):
    """All tokens of the vocabulary, after each of up to 12 random ones, against derivatives of the expression.

    Where only one letter may come next, of several tokens that begin with it some may be left out: the ones that the
    tokenizer itself would not take for this text.
    """
    rng = random.Random(seed)
    walk = grammars.walk(Constraint(REGEX, expression.written), [], [END, WORD])
    for _ in range(12):
        allowed = walk.allowed()
        assert allowed.shape == (PADDED,)
        want = {}
        for token, text in TEXTS.items():
            left = expression
            for letter in text:
                left = after(left, letter)
            if left != NOTHING:
                want[token] = left
        found = {*np.flatnonzero(allowed).tolist()}
        assert found & {END, WORD} == ({END, WORD} if expression.nullable else set())
        found -= {END, WORD}
        assert found == want.keys() or (found < want.keys() and len({TEXTS[token][0] for token in want}) == 1)
        assert found or not want
        if not want:
            assert expression.nullable, "a text that can go nowhere has ended"
            return
        token = rng.choice(sorted(found))
        walk.add(token)
        expression = want[token]


# ---------------------------------------------------------------- JSON schemas


def schemas(depth: int = 2) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of small texts."""
    flat = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.tuples(st.integers(-20, 20), st.integers(0, 30)).map(
            lambda two: {"type": "integer", "minimum": two[0], "maximum": two[0] + two[1]}
        ),
        st.tuples(st.integers(0, 2), st.integers(0, 3)).map(
            lambda two: {"type": "string", "minLength": two[0], "maxLength": two[0] + two[1]}
        ),
        st.lists(st.sampled_from(["a", "ab", "true", 3, None, True]), min_size=1, max_size=3, unique_by=repr).map(
            lambda values: {"enum": values}
        ),
    )
    if not depth:
        return flat
    inner = schemas(depth - 1)
    arrays = st.tuples(inner, st.integers(0, 2), st.integers(0, 1)).map(
        lambda it: {"type": "array", "items": it[0], "minItems": it[1], "maxItems": it[1] + it[2]}
    )
    objects = st.dictionaries(st.sampled_from(["a", "bb", "c d", "é"]), inner, max_size=3).flatmap(
        lambda of: st.sets(st.sampled_from(sorted(of)) if of else st.nothing()).map(
            lambda needed: {
                "type": "object", "properties": of, "required": sorted(needed), "additionalProperties": False,
            }
        )
    )  # fmt: skip
    return st.one_of(flat, arrays, objects, st.tuples(flat, arrays).map(lambda two: {"anyOf": list(two)}))


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is one of the schemas above."""
    if "anyOf" in schema:
        return any(fits(value, each) for each in schema["anyOf"])
    if "enum" in schema:
        return any(type(each) is type(value) and each == value for each in schema["enum"])
    match schema["type"]:
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            whole = type(value) is int or (type(value) is float and value.is_integer())
            return whole and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
        case "array":
            counted = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
            return counted and all(fits(each, schema["items"]) for each in value)
    known = schema["properties"]
    return (
        isinstance(value, dict)
        and value.keys() >= {*schema["required"]}
        and all(name in known and fits(each, known[name]) for name, each in value.items())
    )


def wander(grammars: Grammars, constraint: Constraint, rng: random.Random, most: int = 300) -> list[int]:
    """Any tokens that may follow each other; ends soon after the text may end, else after `most`."""
    walk, tokens = grammars.walk(constraint, [], [END]), list[int]()
    while len(tokens) < most:
        allowed = np.flatnonzero(walk.allowed()).tolist()
        assert allowed
        if END in allowed and rng.random() < 0.5:
            break
        some = [token for token in allowed if token != END] or [END]
        if some == [END]:
            break
        tokens.append(rng.choice(some))
        walk.add(tokens[-1])
    else:
        pytest.fail(f"no end after {most} tokens")
    return tokens


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=schemas(), seed=st.integers(0, 2**32))
def test_what_a_schema_lets_through_parses_and_fits_it(grammars, schema, seed):
    tokens = wander(grammars, Constraint(JSON, json.dumps(schema)), random.Random(seed))
    text = small().decode(tokens, skip_special_tokens=False)
    assert fits(json.loads(text), schema), text


def test_any_object_may_have_anything_in_it(grammars):
    walk = grammars.walk(Constraint(JSON, '{"type": "object"}'), [], [END])
    text = '{"a": [1, {"é": null}], "b":"\\n"}'
    for token in small().encode(text).ids:
        assert walk.allowed()[token]
        assert not walk.allowed()[END]
        walk.add(token)
    assert np.flatnonzero(walk.allowed()).tolist() == [END]


@pytest.mark.parametrize(
    ("spaces", "good"),
    [
        *((good, True) for good in ("", " ", "\n", "\r\n\t\t", "\n" + " " * 32)),
        *((bad, False) for bad in ("  ", "\n\n", "\n" + " " * 33, "\t", " \n")),
    ],
)
def test_white_space_between_the_parts_has_a_bound(grammars, spaces, good):
    for text in (f'{{{spaces}"a":1', f'{{"a"{spaces}:1', f'{{"a":{spaces}1', f'{{"a":1{spaces}}}'):
        walk, fits = grammars.walk(Constraint(JSON, '{"type": "object"}'), [], [END]), True
        for token in (small().encode(char).ids[0] for char in text):
            fits = fits and bool(walk.allowed()[token])
            walk.add(token)
        assert fits is good, text


# ---------------------------------------------------------------- grammars


LARK = 'start: greeting " " NAME\ngreeting: "ab" | "ba"\nNAME: /[abc]{1,3}/'
GBNF = 'root ::= greeting " " [abc] [abc]? [abc]?\ngreeting ::= "ab" | "ba"'


@pytest.mark.parametrize("text", [LARK, GBNF], ids=["lark", "gbnf"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_grammar_in_either_notation(grammars, text, seed):
    tokens = wander(grammars, Constraint(GRAMMAR, text), random.Random(seed))
    assert re.fullmatch("(ab|ba) [abc]{1,3}", small().decode(tokens))


def test_a_grammar_that_no_regular_expression_is(grammars):
    for seed in range(20):
        tokens = wander(grammars, Constraint(GRAMMAR, 'start: "a" start "b" | "c"'), random.Random(seed))
        found = re.fullmatch("(a*)c(b*)", small().decode(tokens))
        assert found is not None
        assert len(found[1]) == len(found[2])


def test_a_special_token_may_come_only_where_a_grammar_names_it(grammars):
    walk = grammars.walk(Constraint(REGEX, ".{0,9}"), [], [END])
    assert not walk.allowed()[[PAD, WORD]].any()
    walk = grammars.walk(Constraint(GRAMMAR, 'start: "a" <word> "b"'), [], [END])
    walk.add(small().encode("a").ids[0])
    assert np.flatnonzero(walk.allowed()).tolist() == [WORD]
    walk.add(WORD)
    assert small().encode("b").ids[0] in np.flatnonzero(walk.allowed())


def test_a_stop_token_that_is_a_word_can_only_end_the_text(grammars):
    first, letter = small().encode("a").ids[0], small().encode("b").ids[0]
    walk = grammars.walk(Constraint(REGEX, "a(bc)?"), [], [END, letter])
    assert not walk.allowed()[[END, letter]].any()
    walk.add(first)
    assert np.flatnonzero(walk.allowed()).tolist() == [END, letter, 265]
    walk.add(letter)
    assert np.flatnonzero(walk.allowed()).tolist() == [END, letter, 265], "it is none of the text"


# ---------------------------------------------------------------- what cannot be compiled


BAD = {
    "no JSON": (JSON, '{"type": '),
    "no type": (JSON, '{"type": "objekt"}'),
    "nothing fits": (JSON, '{"type": "integer", "minimum": 5, "maximum": 4}'),
    "not supported": (JSON, '{"type": "array", "uniqueItems": true}'),
    "no object": (JSON, "true"),
    "too deep": (JSON, "[" * 5000),
    "another's schema": (JSON, '{"$ref": "https://example.com/schema"}'),
    "an open group": (REGEX, "(a"),
    "look-ahead": (REGEX, "(?=a)a"),
    "a back-reference": (REGEX, r"(a)\1"),
    "no rule": (GRAMMAR, "start: other"),
    "no grammar": (GRAMMAR, "%%%"),
    "no start": (GRAMMAR, 'other: "a"'),
    "unknown special token": (GRAMMAR, "start: <nobody>"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_makes_no_sense_is_the_callers_fault_and_said(grammars, what):
    language, text = BAD[what]
    with pytest.raises(RequestError) as refused:
        grammars.check(Constraint(language, text))
    assert refused.value.code == "INVALID_ARGUMENT"
    assert re.fullmatch(f"{language}: .{{5,}}", refused.value.message)
    walk = grammars.walk(Constraint(language, text), [], [END])
    assert not walk.allowed().any()
    assert walk.error


def test_a_text_whose_masks_take_too_long_ends(grammars, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("engine.grammar.time.thread_time", lambda: 1e-4 * next(ticks))
    monkeypatch.setattr("engine.grammar.EACH_S", 1e-7)
    walk, tokens = grammars.walk(Constraint(REGEX, "(a|b){200}"), [], [END]), 0
    walk._left_s = 2e-3
    while walk.allowed().any():
        assert not walk.error
        tokens += 1
        walk.add(small().encode("b").ids[0])
    assert walk.error == "its masks take too long"
    assert 0 < tokens < 200


@pytest.mark.parametrize(
    "text", ["(((a{1000}){1000}){1000}){1000}", "a{100000}", "b|(a{500}){500}", "(a|b)*a(a|b){300}"]
)
def test_what_is_large_is_refused_or_ends_or_takes_little(folder, text):
    """Whatever it is, neither compiling it nor forty of its masks may keep a core busy for long."""
    fresh, began = Grammars(folder, VOCAB, [END]), time.process_time()
    with contextlib.suppress(RequestError):
        fresh.check(Constraint(REGEX, text))
        walk = fresh.walk(Constraint(REGEX, text), [], [END])
        for _ in range(40):
            if not walk.allowed().any():
                break
            walk.add(int(np.flatnonzero(walk.allowed())[0]))
    assert time.process_time() - began < 20


def test_a_constraint_has_a_largest_size():
    Constraint(REGEX, "a" * MAX_CHARACTERS)
    with pytest.raises(RequestError, match="regex: got 65537 characters, want at most 65536"):
        Constraint(REGEX, "a" * (MAX_CHARACTERS + 1))
    assert "secret" not in repr(Constraint(REGEX, "secret"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ignore_eos": True, "stop_token_ids": (1,)}, "ignore_eos: got True, want False with a regex"),
        ({}, r"stop_token_ids: got \(\), want one at least with a regex"),
    ],
)
def test_a_text_that_must_match_must_be_able_to_end(fields, message):
    with pytest.raises(RequestError, match=message):
        Sampling(5, constraint=Constraint(REGEX, "a"), **fields)


@pytest.mark.parametrize("name", MADE)
def test_tokenizers_of_every_family_are_used_or_refused_by_a_sentence(name, tmp_path):
    """Whatever is chosen, its text, as the tokenizer itself writes it, matches."""
    made = MADE[name]()
    save(made, tmp_path)
    end = 1 if name == "byte level" else 2
    try:
        known = Grammars(tmp_path, made.get_vocab_size(), [end])
    except GrammarMissing:
        assert name not in ("byte level", "byte fallback")
        return
    walk, tokens, rng = known.walk(Constraint(REGEX, "the fox é?(ow|er)"), [], [end]), [], random.Random(1)
    while not (allowed := walk.allowed())[end]:
        tokens.append(rng.choice(np.flatnonzero(allowed).tolist()))
        walk.add(tokens[-1])
    assert re.fullmatch("the fox é?(ow|er)", made.decode(tokens))


def test_without_a_tokenizer_or_with_a_broken_one_there_are_no_grammars(tmp_path):
    for text in (None, "{}", "no JSON"):
        if text is not None:
            (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(GrammarMissing, match=r"tokenizer\.json: llguidance 1\.\S+ cannot use it: "):
            Grammars(tmp_path, 300, [END])


def test_without_llguidance_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(GrammarMissing, match="llguidance is not installed: it comes with the extra grammar"):
        Grammars(folder, VOCAB, [END])


def test_only_so_many_stay_compiled(folder, monkeypatch):
    monkeypatch.setattr("engine.grammar.KEPT", 3)
    few = Grammars(folder, VOCAB, [END])
    made, was = [], few._grammar

    def grammar(constraint: Constraint) -> str:
        made.append(constraint.text)
        return was(constraint)

    monkeypatch.setattr(few, "_grammar", grammar)
    for text in "abcadba":
        few.check(Constraint(REGEX, text))
    assert made == ["a", "b", "c", "d", "b"]
    few.walk(Constraint(REGEX, "a"), [], [END]).allowed()
    assert len(made) == 5
    few.walk(Constraint(REGEX, "c"), [], [END]).allowed()
    assert len(made) == 6
