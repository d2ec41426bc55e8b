"""Renders chat messages into a prompt with the model's own template, the way `transformers` does.

A template comes with a model and is not trusted: it runs in Jinja's immutable sandbox. It may refuse a conversation
(`raise_exception`), which is the client's error.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from core.errors import ModelError, RequestError


class ChatTemplate:
    """A model's chat template; `source` is its text.

    `special` holds the special tokens by the name that templates use (``bos_token``, ``eos_token`` ...).
    """

    def __init__(self, source: str, special: Mapping[str, str], name: str = "chat template") -> None:
        """Compiles `source`; ModelError, naming `name`, if it is not a template."""
        self.source = source
        self._special = dict(special)
        try:
            self._template = ENVIRONMENT.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"{name}: chat_template: line {getattr(error, 'lineno', 0)}: {error}") from error

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate | None:
        """The default template of the model in `folder`, None if it has none; ModelError if it is damaged.

        A file chat_template.jinja goes before tokenizer_config.json, as it does for `transformers`.
        """
        path = folder / "tokenizer_config.json"
        config = read_config(path)
        special = {name: text for name in config if name.endswith("_token") and (text := token_text(config[name]))}
        file = folder / "chat_template.jinja"
        try:
            return cls(file.read_text(encoding="utf-8"), special, str(file))
        except FileNotFoundError:
            source = default_template(config.get("chat_template"), str(path))
        except (OSError, ValueError) as error:
            raise ModelError(f"{file}: cannot be read: {error}") from error
        return None if source is None else cls(source, special, str(path))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        generation: bool = True,
        now: datetime.datetime | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`; with `generation`, up to where the assistant's next words begin.

        `variables` reach the template by name (``tools``, ``enable_thinking`` ...), `now` is what it is told the time
        is (default: the clock). RequestError where the template refuses the messages or fails on them.
        """

        def strftime_now(form: str) -> str:
            return (now or datetime.datetime.now()).strftime(form)

        known = {"tools": None, "documents": None, **self._special, **variables, "strftime_now": strftime_now}
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=generation, **known)
        except Refusal as refusal:
            raise RequestError(
                "INVALID_ARGUMENT", f"messages: refused by the model's chat template: {refusal}"
            ) from None
        except Exception as error:  # a template can fail with any error that an expression can
            what = f"{type(error).__name__}: {error}"
            raise RequestError("INVALID_ARGUMENT", f"messages: the model's chat template failed: {what}") from error


class Refusal(jinja2.TemplateError):
    """What a template says through `raise_exception`."""


class Generation(jinja2.ext.Extension):
    """Lets templates mark the assistant's words for training (``{% generation %}``); here the mark means nothing."""

    tags = {"generation"}  # noqa: RUF012 - the type that jinja declares

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str) -> NoReturn:
    raise Refusal(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    return made


ENVIRONMENT = make_environment()


def default_template(value: object, name: str) -> str | None:
    """The template to use of what tokenizer_config.json holds: one text, or a list of named ones."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        named = {part.get("name"): part.get("template") for part in value if isinstance(part, dict)}
        found = named.get("default")
        if isinstance(found, str):
            return found
        wanted = f"one named 'default' among {', '.join(map(repr, named))}"
        raise ModelError(f"{name}: chat_template: wanted a text, or {wanted}")
    raise ModelError(f"{name}: chat_template: got {type(value).__name__}, wanted a text or a list of named ones")


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty if there is no such file; ModelError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: got {type(found).__name__}, wanted a JSON object")
    return found


def token_text(value: object) -> str:
    """The text of a special token, which configs write as a string or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
