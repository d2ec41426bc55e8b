"""Turns text into token ids and token ids back into text, piece by piece, such that the pieces add up exactly.

The joined pieces of a `Detokenizer` always equal one decode of all ids, and no piece ever changes afterwards. That
rules out decoding token by token (a token may hold a part of a character) and the usual prefix windows (they emit
wrong text where a run of bytes turns out not to be UTF-8, or where a special token opens the window). Tokenizers fall
into two families here, told apart by the decoder in tokenizer.json:

- byte level (GPT-2, Llama 3, Qwen, DeepSeek): every token is bytes, so an incremental UTF-8 decoder suffices;
- pieces (SentencePiece with byte fallback, WordPiece, BPE suffixes): a token's text depends on its left neighbour only,
  but a run of byte tokens (``<0xE2>`` ...) is judged as a whole, so it is held until the run ends.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from core.errors import ModelError, RequestError


class Tokenizer:
    """A model's own tokenizer; safe to share between requests.

    `special_ids` never become text. `byte_level` and `byte_fallback` say how its decoder makes text, see above.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the tokenizer of the model in `folder`; ModelError if it has none, or a damaged or unsupported one."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{path}: missing, wanted a tokenizer in the format of Hugging Face's `tokenizers`")
        try:
            self._inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"{path}: cannot be read: {error}") from error
        # Both may be stored with the file, from training; neither belongs to serving.
        self._inner.no_truncation()
        self._inner.no_padding()
        self.vocabulary: int = self._inner.get_vocab_size()
        added = self._inner.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(token for token, what in added.items() if what.special)
        whole = json.loads(self._inner.to_str())
        steps = decoder_steps(whole.get("decoder"))
        kinds = [str(step["type"]) for step in steps]
        self.byte_level = kinds == ["ByteLevel"]
        self.byte_fallback = "ByteFallback" in kinds
        if not self.byte_level and not all(map(is_local, steps, fused(kinds))):
            wanted = f"ByteLevel alone, or steps of {', '.join(sorted(LOCAL_STEPS))} with at most one Strip after Fuse"
            raise ModelError(f"{path}: decoder: got {' + '.join(kinds)}, wanted {wanted}")
        self._bytes: dict[int, bytes] = {}
        self._longest = self._longest_piece(whole, added.values())

    def least_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, told without tokenizing; 0 if that cannot be told."""
        return len(text) // self._longest if self._longest else 0

    def _longest_piece(self, whole: dict[str, Any], added: Iterable[Any]) -> int:
        """Most characters in one token, 0 if a token may stand for any number of them."""
        split, vocabulary = json.dumps(whole.get("pre_tokenizer")), self._inner.get_vocab()
        drops = whole.get("normalizer") is not None or "Removed" in split or "Whitespace" in split
        drops = drops or any(what.lstrip or what.rstrip for what in added)
        if drops or not self.byte_level or not ALPHABET.keys() <= vocabulary.keys():
            return 0
        return max(map(len, vocabulary))

    def encode(self, text: str, special: bool = True) -> tuple[int, ...]:
        """The ids of `text`; with `special`, also those that the model wants around a prompt (bos ...)."""
        try:
            return tuple(self._inner.encode_batch_fast([text], add_special_tokens=special)[0].ids)
        except (TypeError, UnicodeEncodeError) as error:  # lone surrogates: JSON can carry them, UTF-8 cannot
            raise RequestError("INVALID_ARGUMENT", f"text: got what is not Unicode text: {error}") from error

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; an id outside the vocabulary gives nothing."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_id(self, token: str) -> int | None:
        """The id of one token by its text in the vocabulary, None if it has none."""
        found: int | None = self._inner.token_to_id(token)
        return found

    def token_text(self, token: int) -> str | None:
        """A token as the vocabulary writes it, None for an unknown id."""
        text: str | None = self._inner.id_to_token(token)
        return text

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token of a byte-level vocabulary; an unknown id has none."""
        held = self._bytes.get(token)
        if held is None:
            text = self.token_text(token)
            held = b"" if text is None else alphabet_bytes(text)
            self._bytes[token] = held
        return held


# Decoder steps whose text for a token depends on its left neighbour at most, and on nothing to its right.
LOCAL_STEPS = frozenset(("BPEDecoder", "ByteFallback", "Fuse", "Metaspace", "None", "Replace", "Strip", "WordPiece"))


def decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a tokenizer.json decoder, flattened."""
    if decoder is None:
        return [{"type": "None"}]
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in decoder_steps(part)]
    return [decoder]


def fused(kinds: Sequence[str]) -> list[bool]:
    """For each step, whether it works on the whole text instead of on single tokens."""
    return ["Fuse" in kinds[:at] for at in range(len(kinds))]


def is_local(step: dict[str, Any], whole: bool) -> bool:
    if whole:
        # One character at the start is stripped from a window just as from the text; more, or the end, are not.
        return bool(step["type"] == "Strip" and step["start"] <= 1 and step["stop"] == 0)
    return step["type"] in LOCAL_STEPS


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


ALPHABET = byte_alphabet()


def alphabet_bytes(text: str) -> bytes:
    """The bytes behind a byte-level token; text outside the alphabet (added tokens) stands for itself."""
    try:
        return bytes([ALPHABET[char] for char in text])
    except KeyError:
        return text.encode()


BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f+][0-9A-Fa-f]>")  # the sign is a quirk of the decoder's number parser


class Detokenizer:
    """One generation's text, as far as it is final, while its ids arrive.

    `feed` returns the text that the new ids made final; `flush` returns the rest (U+FFFD for a character that never
    became whole). What they return, joined, is `tokenizer.decode` of all ids. Held back is only what the next id can
    still change: an unfinished character, or an unfinished run of byte tokens.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._window: list[int] = []  # pieces: ids from the last final token with text on
        self._final = ""  # pieces: the text of the window that was returned

    def feed(self, ids: Iterable[int]) -> str:
        """The text that became final with `ids`; an unknown id has none."""
        kept = (token for token in ids if token not in self._skipped)
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"".join(map(self._tokenizer.token_bytes, kept)))
        return "".join(map(self._feed_piece, kept))

    def flush(self) -> str:
        """The text that was held back; the detokenizer is used up."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._tokenizer.decode(self._window, skip_special=False)[len(self._final) :]

    def _feed_piece(self, token: int) -> str:
        text = self._tokenizer.token_text(token)
        if text is None:
            return ""
        self._window.append(token)
        if self._tokenizer.byte_fallback and BYTE_TOKEN.fullmatch(text):
            return ""
        whole = self._tokenizer.decode(self._window, skip_special=False)
        fresh = whole[len(self._final) :]
        if text:
            # Decoders treat the first token specially (no space before it). A window opened by the last token with
            # text of its own is treated so in both of its decodes, which cancels out.
            self._window = [token]
            self._final = self._tokenizer.decode(self._window, skip_special=False)
        else:
            self._final = whole
        return fresh


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that may be sent, and what is known with it."""

    text: str
    tokens: int
    """Ids used so far, up to and including the one that completed `stop`."""
    stop: str | None = None
    """The stop string that ended the text, None while none has; after it nothing more comes."""


class StopStrings:
    """Finds the first of some strings in a text that arrives in pieces, and lets no part of it out before.

    The first is the one that is complete first; of two complete at the same character, the longer. So the outcome does
    not depend on how the text was cut. Held back is exactly the longest end of the text that begins a stop string.
    One that is complete with the first `after` tokens does not count.
    """

    def __init__(self, stops: Iterable[str], after: int = 0) -> None:
        self.stops = tuple(dict.fromkeys(stops))
        self._after = after
        if not all(self.stops):
            raise RequestError("INVALID_ARGUMENT", "stop: got an empty string, wanted at least one character")
        self._held = ""
        self._tokens = 0
        self._stop: str | None = None
        beginnings = {stop[:length] for stop in self.stops for length in range(1, len(stop))}
        # By last character, the longest first: most pieces end in a character that no beginning ends in.
        self._beginnings: dict[str, list[str]] = {}
        for part in sorted(beginnings, key=len, reverse=True):
            self._beginnings.setdefault(part[-1], []).append(part)

    def feed(self, text: str, tokens: int = 1) -> Piece:
        """Takes the text of the next `tokens` ids and gives what is safe to send: nothing from a stop string on."""
        if self._stop is not None:
            return Piece("", self._tokens, self._stop)
        self._tokens += tokens
        whole, old = self._held + text, len(self._held)
        found = ((whole.find(stop, max(0, old + 1 - len(stop))), stop) for stop in self.stops)
        first = min(((at + len(stop), at, stop) for at, stop in found if at >= 0), default=None)
        if first is not None and self._tokens > self._after:
            _, at, self._stop = first
            self._held = ""
            return Piece(whole[:at], self._tokens, self._stop)
        self._held = next((part for part in self._beginnings.get(whole[-1:], ()) if whole.endswith(part)), "")
        return Piece(whole[: len(whole) - len(self._held)], self._tokens)

    def flush(self) -> Piece:
        """The text held back, once it is known that no more comes."""
        text, self._held = self._held, ""
        return Piece(text, self._tokens, self._stop)


class TextStream:
    """One generation's ids as text, cut at its stop strings; none of them counts in the first `min_tokens`."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Iterable[str] = (), *, skip_special: bool = True, min_tokens: int = 0
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special)
        self._stops = StopStrings(stops, min_tokens)

    def feed(self, ids: Sequence[int]) -> Piece:
        """The text that `ids` made safe to send; ids behind the one that completed a stop string are not counted."""
        if not self._stops.stops:
            return self._stops.feed(self._detokenizer.feed(ids), len(ids))
        text: list[str] = []
        piece = self._stops.feed("", 0)
        for token in ids:  # one by one, so that the count is that of the completing token
            piece = self._stops.feed(self._detokenizer.feed((token,)))
            text.append(piece.text)
            if piece.stop is not None:
                break
        return Piece("".join(text), piece.tokens, piece.stop)

    def flush(self) -> Piece:
        """The rest, once the ids have ended; a stop string that is completed only by this counts, too."""
        last = self._stops.feed(self._detokenizer.flush(), 0)
        return Piece(last.text + self._stops.flush().text, last.tokens, last.stop)
