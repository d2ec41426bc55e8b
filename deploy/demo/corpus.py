"""Builds the demo model's training text from the documentation that a stock CPython carries.

The text is the docstrings of builtins and of well-known standard-library modules, classes and functions, and the
language topics of ``pydoc_data.topics``; all of it is under the PSF licence. The result depends on the Python version
only: no clock, no network and no randomness enters it.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import inspect
import json
import re
import warnings
from dataclasses import dataclass
from pydoc_data import topics

from deploy.demo.selection import BUILTINS, EXCEPTIONS, LIBRARY, MODULES, PASSAGES, TOPICS

ANSWER_CHARS = 210
ANSWER_SENTENCES = 3

PHRASINGS = {
    "name": (
        "What does {} do?",
        "What is {}?",
        "Explain {}.",
        "Describe {}.",
        "How do I use {}?",
        "Tell me about {}.",
        "What is {} for?",
        "what does {} do",
        "what is {}",
        "{}",
    ),
    "module": (
        "What does the {} module do?",
        "What is the {} module?",
        "Explain the {} module.",
        "Describe the {} module.",
        "How do I use the {} module?",
        "Tell me about the {} module.",
        "What is the {} module for?",
        "what does the {} module do",
        "what is the {} module",
        "the {} module",
    ),
    "exception": (
        "What does {} mean?",
        "What is {}?",
        "Explain {}.",
        "Describe {}.",
        "When do I get {}?",
        "Tell me about {}.",
        "When is {} raised?",
        "what does {} mean",
        "what is {}",
        "{}",
    ),
    "topic": (
        "What does {} do?",
        "What is {}?",
        "Explain {}.",
        "Describe {}.",
        "How does {} work?",
        "Tell me about {}.",
        "What is {} for?",
        "what does {} do",
        "what is {}",
        "{}",
    ),
}

# Wordings beyond those, so that a name is answered in more surroundings than a few fixed ones.
LOOSE = (
    "Can you tell me about {}?",
    "I need help with {}.",
    "I want to know what {} does.",
    "Could you explain {} to me?",
    "Give me a short description of {}.",
    "Do you know what {} is?",
    "What can you say about {}?",
    "help {}",
    "{}?",
)
# And what people put around a question.
FRAMES = (
    "Please answer: {}",
    "And {}",
    "Hello! {}",
    "Hi, {}",
    "One more question: {}",
    "You are a helpful assistant. {}",
    "Be brief. {}",
    "{} Thanks.",
    "{} Answer in one sentence.",
)

IMPERATIVES = """
accept add adjust append apply build capitalize change choose clear close collapse combine compile compute consider
construct convert convolve copy count create decode delay delete deserialize determine disable drop dump encode
escape estimate evaluate execute expand extend fetch fill find force format generate get give hash identify import
insert iterate join keep kill list load look make match merge modify move normalize open parse pop pretty-print
prevent print provide push quote raise read remove rename repeat replace resolve return reverse round run scan
schedule see serialize set shuffle sort split suspend swap test transform translate truncate try unpack
update use wait walk wrap write yield
"""
VERBS = frozenset(IMPERATIVES.split())


MARKUP = re.compile(r">>>|::=|----|====|\*\*\*\*|^\s*[-*] ", re.M)
# A second order in the same sentence: "Return x, and close y." has no third person that one verb's ending gives.
CHAINED = re.compile(rf"(?:, | and | then |; )(?:{'|'.join(sorted(VERBS - {'list', 'set'}))})\b")


@dataclass(frozen=True)
class Item:
    """One thing the model is taught: what it is called, and the one answer to every question about it."""

    kind: str
    name: str
    answer: str

    @property
    def subject(self) -> str:
        """The name as a sentence says it."""
        return f"the {self.name} module" if self.kind == "module" else self.name

    def questions(self) -> list[str]:
        """Every trained phrasing of the question, in a fixed order."""
        return [form.format(self.name) for form in PHRASINGS[self.kind]]

    def variations(self) -> list[str]:
        """Looser wordings that are trained on too, but are not what the recitation is measured on."""
        asked = self.questions()
        return [
            *(form.format(self.subject) for form in LOOSE),
            *(form.format(question) for form in FRAMES for question in asked[:8]),
        ]


def _third_person(verb: str) -> str:
    if verb.endswith(("s", "sh", "ch", "x", "z")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


def _clean(text: str) -> str:
    """Plain prose on one line: reST markup, typographic quotes and section references are gone."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"``([^`]*)``", r"\1", text)
    text = re.sub(r"`([^`']*)[`']", r"\1", text)
    text = re.sub(r"(?<![\w*])\*(\w[^*\n]*?)\*(?![\w*])", r"\1", text)
    text = re.sub(r"(?<![\w*)])\*\*(\w[^*]*?)\*\*(?![\w*])", r"\1", text)
    for old, new in (("“", '"'), ("”", '"'), ("\u2019", "'"), ("—", "-"), ("…", "..."), ("\\", "")):
        text = text.replace(old, new)
    text = re.sub(r"(?<=pseudo-) (?=compiled)", "", text)
    return re.sub(r" \((?:see|See|for example|that is,)[^()]*\)", "", text.strip())


def _sentences(text: str) -> list[str]:
    """The sentences of cleaned prose, closed by their full stop; one that runs on (a colon, no stop) is left out."""
    parts = re.split(r"(?<=[.!])\s+(?=[A-Z\"'(])", text)
    joined: list[str] = []
    for part in parts:
        if joined and re.search(r"\b(e\.g|i\.e|etc|vs|cf|a\.k\.a)\.$", joined[-1]):
            joined[-1] += " " + part
        else:
            joined.append(part)
    if joined and joined[-1].endswith(":") and len(joined) == 1:
        joined[-1] = joined[-1][:-1] + "."
    asides = ("See ", "TODO", "Equivalent to: def", "Example:", "See also", "(See ")
    return [part for part in joined if part.endswith((".", "!", ".)")) and not part.startswith(asides)]


def _fit(sentences: list[str], budget: int = ANSWER_CHARS) -> str:
    """As many leading sentences as the answer length allows, or nothing where the first alone is too long."""
    taken: list[str] = []
    for sentence in sentences[:ANSWER_SENTENCES]:
        if sum(len(part) + 1 for part in taken) + len(sentence) > budget:
            break
        taken.append(sentence)
    return " ".join(taken)


def _prose(doc: str) -> list[str]:
    """The paragraphs of a docstring that are prose: no signatures, examples, tables, lists or headings."""
    kept: list[str] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        lines = block.splitlines()
        while lines and re.match(r"[\w.]+\(.*?\)?(\s*--?>.*)?$", lines[0].strip()) and "(" in lines[0].split(" ")[0]:
            arrow = re.match(r"[\w.]+\(.*\)\s*(?:->\s*\S+\s+)?[-:.]\s+([A-Z].*)$", lines[0].strip())
            lines = [arrow.group(1), *lines[1:]] if arrow else lines[1:]
        if not lines:
            continue
        if any(line.startswith("  ") for line in lines) or MARKUP.search(block):
            break
        text = _clean(" ".join(lines))
        if re.search(r"https?://|www\.|XXX|Copyright", text) or text.endswith(":"):
            break
        if not text.endswith((".", "!", ")")):
            text += "."
        kept.append(text)
    return kept


def _sayable(name: str, text: str) -> str:
    """The text as a statement about the name: "Return x." becomes "name returns x."."""
    head, _, rest = text.partition(" ")
    verb = head.lower()
    opening = text.split(".")[0]
    second, _, onward = rest.partition(" ")
    if verb == "recursively" and second in VERBS and not CHAINED.search(opening):
        return f"{name} {verb} {_third_person(second)} {onward}"
    if verb in VERBS and CHAINED.search(opening):
        pair = re.match(r"(\w+) and (\w+) ", text)
        if not pair or pair.group(2) not in VERBS or len(re.findall(r", and |, then ", opening)):
            return f"{name}: {text}"
        return f"{name} {_third_person(verb)} and {_third_person(pair.group(2))} {text[pair.end() :]}"
    if verb in VERBS:
        return f"{name} {_third_person(verb)} {rest}"
    if verb.endswith("s") and (verb[:-1] in VERBS or verb[:-2] in VERBS):
        return f"{name} {verb} {rest}"
    return f"{name}: {text}"


def _resolve(name: str) -> object:
    """The object a dotted name stands for, importing the longest module prefix."""
    parts = name.split(".")
    if hasattr(builtins, parts[0]):
        found: object = getattr(builtins, parts[0])
        rest = parts[1:]
    else:
        for cut in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:cut]))
            except ImportError:
                continue
            rest = parts[cut:]
            break
        else:
            raise LookupError(name)
    for part in rest:
        found = getattr(found, part)
    return found


def _described(kind: str, name: str, found: object) -> Item | None:
    prose = _prose(str(found.__doc__ or ""))
    text = _fit([sentence for part in prose[:2] for sentence in _sentences(part)], ANSWER_CHARS - len(name))
    text = re.sub(rf"^{re.escape(name)}(?:\.py)? +-+ +", "", text)
    if len(text) < 12:
        return None
    if kind == "name":
        return Item(kind, name, _sayable(name, text))
    label = f"The {name} module" if kind == "module" else name
    if kind == "module":
        text = re.sub(rf"^The {name} module: |^[\w ]+ module\. (?=\w)", "", text)
        text = re.sub(rf"^(?:Module )?{name} (?:module )?-+ |^{name} ~+\. ", "", text)
        text = re.sub(rf"^(?:This|(?:The )?{name}) (?:(?:extension )?module )?(?=[a-z]+s )", "This module ", text)
        if text.startswith("This module "):
            return Item(kind, name, f"{label} {text.removeprefix('This module ')}")
    return Item(kind, name, f"{label}: {text}")


def _topic(name: str, key: str, opening: str) -> Item:
    text = str(topics.topics[key])
    at = re.search(re.escape(opening).replace(r"\ ", r"\s+"), text)
    if at is None:
        raise LookupError(f"{key}: {opening}")
    block = re.split(r"\n\s*\n", text[at.start() :])[0]
    answer = _fit(_sentences(_clean(block)))
    return Item("topic", name, re.sub(r"^(?:It|This object) ", name[0].upper() + name[1:] + " ", answer))


def items() -> list[Item]:
    """All items in a fixed order, one answer each, no answer shared by two."""
    found: list[Item | None] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (BUILTINS + LIBRARY).split():
            found.append(_described("name", name, _resolve(name)))
        for name in MODULES.split():
            found.append(_described("module", name, importlib.import_module(name)))
        for name in EXCEPTIONS.split():
            found.append(_described("exception", name, getattr(builtins, name)))
    found.extend(_topic(*entry) for entry in TOPICS)
    return [item for item in found if item is not None and item.answer]


def passages() -> list[str]:
    """Language-reference prose, a topic each, to stand in front of a question as a long context."""
    kept: list[str] = []
    for key in PASSAGES:
        blocks = re.split(r"\n\s*\n", str(topics.topics[key]))
        prose = [_clean(block) for block in blocks if not re.search(r"::=|\*\*\*\*|====|^\s{3,}\S|\|", block)]
        kept.append("\n".join(part for part in prose if len(part) > 60))
    return kept


def digest() -> str:
    """The SHA-256 of everything the model is trained on, to tell one corpus from another."""
    whole = [[item.name, item.answer, item.questions(), item.variations()] for item in items()]
    return hashlib.sha256(json.dumps([whole, passages()]).encode()).hexdigest()


def main() -> None:
    """Prints every item, for reading."""
    for item in items():
        print(f"[{item.kind}] {item.name}\n    {item.answer}")
    texts = [item.answer for item in items()]
    print(f"{len(texts)} items, {sum(map(len, texts))} characters of answers, longest {max(map(len, texts))}")
    print(f"{len(passages())} passages, {[len(text) for text in passages()]}, sha256 {digest()}")


if __name__ == "__main__":
    main()
