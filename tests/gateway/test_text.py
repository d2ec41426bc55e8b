"""Text comes out in pieces that are final, add up, and end at the first stop string."""

from __future__ import annotations

import functools
import itertools
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from core.errors import ModelError, RequestError
from gateway.text import Detokenizer, Piece, StopStrings, TextStream, Tokenizer
from tests.gateway.tokenizers_made import CORPUS, MADE, byte_level, save, words_only


@functools.cache
def load(kind: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer(save(MADE[kind](), Path(folder)))


def pieces(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special)
    return [*(detokenizer.feed((token,)) for token in ids), detokenizer.flush()]


def tokens(tokenizer: Tokenizer, *texts: str) -> list[int]:
    found = [tokenizer.token_id(text) for text in texts]
    return [token for token in found if token is not None]


KINDS = pytest.mark.parametrize("kind", MADE)


@KINDS
@given(data=st.data())
def test_pieces_add_up_to_decode_for_any_ids(kind: str, data: st.DataObject) -> None:
    tokenizer = load(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary + 3), max_size=40))
    skip = data.draw(st.booleans())
    assert "".join(pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special=skip)


@pytest.mark.parametrize("kind", ["byte fallback", "byte fallback without strip"])
@given(data=st.data())
def test_pieces_add_up_where_bytes_are_common(kind: str, data: st.DataObject) -> None:
    tokenizer = load(kind)
    some = tokens(tokenizer, *(f"<0x{byte:02X}>" for byte in b"\xe2\x82\xac\x41\xff\xf0\x9f\x91\x8d"))
    some += tokens(tokenizer, "▁", "▁▁", "▁the", "a", "", "</s>")
    assert len(some) == 15
    ids = data.draw(st.lists(st.sampled_from(some), max_size=30))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@given(data=st.binary(max_size=60))
def test_any_bytes_add_up(data: bytes) -> None:
    tokenizer = load("byte level")
    of_byte = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocabulary)}
    ids = [of_byte[bytes([byte])] for byte in data]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == data.decode("utf-8", errors="replace")


@given(text=st.text(max_size=60), cut=st.integers(0, 60))
def test_text_comes_back_and_no_piece_shows_a_broken_character(text: str, cut: int) -> None:
    tokenizer = load("byte level")
    ids = list(tokenizer.encode(text, special=False))
    got = pieces(tokenizer, ids)
    assert "".join(got) == text
    assert got[-1] == ""
    # Cut anywhere: what was sent is a beginning of the text, and only the flush may show U+FFFD.
    *sent, rest = pieces(tokenizer, ids[:cut])
    assert text.startswith("".join(sent))
    assert rest.strip("\ufffd") == ""


@pytest.mark.parametrize("text", CORPUS)
def test_a_character_is_sent_with_its_last_byte(text: str) -> None:
    tokenizer = load("byte level")
    data = b""
    detokenizer = Detokenizer(tokenizer)
    sent = ""
    for token in tokenizer.encode(text, special=False):
        data += tokenizer.token_bytes(token)
        sent += detokenizer.feed((token,))
        assert sent == data.decode("utf-8", errors="ignore")


@given(data=st.data())
def test_batches_of_ids_make_no_difference(data: st.DataObject) -> None:
    tokenizer = load("byte level")
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary - 1), max_size=30))
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.feed(ids[:cut]) + detokenizer.feed(ids[cut:]) + detokenizer.flush() == tokenizer.decode(ids)


def test_special_tokens_stay_out_of_the_text_unless_wanted() -> None:
    tokenizer = load("byte level")
    ids = [*tokenizer.encode("fox"), *tokens(tokenizer, "<|eos|>")]
    assert tokenizer.decode(ids) == "".join(pieces(tokenizer, ids)) == "fox"
    assert "".join(pieces(tokenizer, ids, skip_special=False)) == "<|bos|>fox<|eos|>"


def test_a_special_token_between_pieces_leaves_the_space() -> None:
    tokenizer = load("byte fallback")
    ids = tokens(tokenizer, "▁the", "</s>", "▁fox")
    assert pieces(tokenizer, ids) == ["the", "", " fox", ""]


@given(text=st.text(st.sampled_from("aedoTh wbx.  \n世ö日本語Ġ" + "".join(CORPUS)), max_size=300))
def test_a_text_has_at_least_as_many_tokens_as_are_told_beforehand(text: str) -> None:
    for kind in MADE:
        tokenizer = load(kind)
        assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text, special=False))
    assert load("byte level").least_tokens("x" * 1000) > 20
    assert load("byte fallback").least_tokens("x" * 1000) == 0


def test_encode_adds_what_the_model_wants_around_a_prompt() -> None:
    tokenizer = load("byte level")
    bos = tokenizer.token_id("<|bos|>")
    assert tokenizer.encode("fox") == (bos, *tokenizer.encode("fox", special=False))
    with pytest.raises(RequestError, match="text: "):
        tokenizer.encode("broken \ud800 surrogate")


def test_truncation_and_padding_stored_with_the_file_are_not_applied(tmp_path: Path) -> None:
    made = byte_level()
    made.enable_truncation(4)
    made.enable_padding(length=50)
    length = len(Tokenizer(save(made, tmp_path)).encode(CORPUS[0]))
    assert length > 4
    assert length != 50


def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: missing"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer(tmp_path)
    for steps in (
        [decoders.CTC()],
        [decoders.ByteLevel(), decoders.Fuse()],
        [decoders.Fuse(), decoders.Strip(" ", 0, 1)],
        [decoders.Fuse(), decoders.Strip(" ", 2, 0)],
        [decoders.Fuse(), decoders.Replace("a", "b")],
    ):
        made = words_only()
        made.decoder = decoders.Sequence(steps)
        with pytest.raises(ModelError, match="decoder: got "):
            Tokenizer(save(made, tmp_path))


# ---------------------------------------------------------------- stop strings

# Few letters, so that overlaps and false starts are the rule.
SOME_TEXT = st.text("ab\n", max_size=30)
SOME_STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


def first_stop(text: str, stops: list[str], after: int = 0) -> tuple[int, str] | None:
    """The plain definition: the stop complete first behind `after` characters, the longest of those that end there."""
    for end in range(after + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return end - len(stop), stop
    return None


def split(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(text=SOME_TEXT, stops=SOME_STOPS, cuts=st.lists(st.integers(0, 30), max_size=10), least=st.integers(0, 6))
def test_the_first_stop_is_found_however_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int], least: int
) -> None:
    """It is the first that is completed behind the least number of tokens."""
    matcher = StopStrings(stops, least)
    parts = split(text, cuts)
    got = [matcher.feed(part) for part in parts]
    sent = "".join(piece.text for piece in got)
    wanted = first_stop(text, stops, len("".join(parts[:least])))
    if wanted is None:
        assert all(piece.stop is None for piece in got)
        assert got[-1].tokens == len(parts)
        assert sent + matcher.flush().text == text
        return
    at, stop = wanted
    assert sent == text[:at]
    assert matcher.flush().text == ""
    assert {piece.stop for piece in got} <= {None, stop}
    assert got[-1].stop == stop
    # The count is that of the part that holds the stop's last character.
    lengths = [len("".join(parts[: n + 1])) for n in range(len(parts))]
    assert got[-1].tokens == 1 + next(n for n, length in enumerate(lengths) if length >= at + len(stop))


@given(text=SOME_TEXT, stops=SOME_STOPS)
def test_no_more_is_held_back_than_what_may_become_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    sent, seen = "", ""
    for char in text:
        piece = matcher.feed(char)
        seen, sent = seen + char, sent + piece.text
        if piece.stop is not None:
            break
        held = seen[len(sent) :]
        starts = [seen[at:] for at in range(len(seen)) if any(stop.startswith(seen[at:]) for stop in stops)]
        assert held == max(starts, key=len, default="")


def test_of_two_stops_complete_together_the_longer_counts() -> None:
    piece = StopStrings(["</s>", "END</s>"]).feed("the END</s> more")
    assert (piece.text, piece.stop) == ("the ", "END</s>")


def test_a_stop_that_begins_in_the_first_tokens_and_ends_behind_them_counts() -> None:
    matcher = StopStrings(["ab", "ba"], after=2)
    assert [matcher.feed(part) for part in ("ab", "xa")] == [Piece("a", 1), Piece("bx", 2)]
    assert matcher.feed("b") == Piece("", 3, "ab")


def test_no_stop_counts_in_the_least_number_of_tokens_of_a_stream() -> None:
    tokenizer = load("byte level")
    ids = [tokenizer.encode(letter, special=False)[0] for letter in "aeaea"]
    for least, used in ((0, 2), (1, 2), (2, 4), (3, 4), (4, 5)):
        stream = TextStream(tokenizer, ["ae"], min_tokens=least)
        piece = stream.feed(ids)
        assert (piece.tokens, piece.stop) == (used, "ae" if least < 4 else None)
        assert piece.text + stream.flush().text == "aeaea"[: used - (2 if least < 4 else 0)]


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(RequestError, match="stop: "):
        StopStrings(["a", ""])


@given(data=st.data())
def test_a_stream_is_the_text_up_to_the_first_stop(data: st.DataObject) -> None:
    tokenizer = load("byte level")
    text = data.draw(st.text("aé東👍 .", max_size=25))
    stops = data.draw(st.lists(st.text("aé東👍 .", min_size=1, max_size=3), max_size=3))
    ids = list(tokenizer.encode(text, special=False))
    stream = TextStream(tokenizer, stops)
    sent, used, stop, at = "", 0, None, 0
    while at < len(ids) and stop is None:
        step = data.draw(st.integers(1, 4))
        piece = stream.feed(ids[at : at + step])
        at, sent, used, stop = at + step, sent + piece.text, piece.tokens, piece.stop
    sent += stream.flush().text
    wanted = first_stop(text, stops)
    if wanted is None:
        assert (sent, used, stop) == (text, len(ids), None)
        return
    assert (sent, stop) == (text[: wanted[0]], wanted[1])
    # One token fewer does not complete it, and those behind it are not counted.
    end = wanted[0] + len(wanted[1])
    assert len(whole_characters(tokenizer, ids[: used - 1])) < end <= len(whole_characters(tokenizer, ids[:used]))


def whole_characters(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", errors="ignore")


def test_a_stop_completed_by_the_flush_counts() -> None:
    tokenizer = load("byte fallback")
    ids = tokens(tokenizer, "▁the", "<0xE2>", "<0x82>", "<0xAC>")
    stream = TextStream(tokenizer, ["€"])
    assert stream.feed(ids).text == "the"
    last = stream.flush()
    assert (last.text, last.tokens, last.stop) == ("", 4, "€")
