"""Chat templates render as `transformers` renders them, and fail as the client's error."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import ModelError, RequestError
from gateway.chat import ChatTemplate
from tests.gateway.tokenizers_made import byte_level, save

# In the manner of templates that models ship with, reduced to what differs between them.
TEMPLATES = {
    "chatml": """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""",
    "alternating": """
{{ bos_token }}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}
{% else %}
{{ message['content'] | trim + eos_token }}
{% endif %}
{% endfor %}
""",
    "parts and tools": """
{%- set ns = namespace(seen=0) -%}
{%- if tools %}
    {{- tools | tojson(indent=2) }}
{% endif %}
{%- for message in messages if message.content is not none %}
    {%- if ns.seen > 2 %}{% break %}{% endif %}
    {%- set ns.seen = ns.seen + 1 %}
    {{- '<' ~ message.role ~ '>' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
    {%- endif %}
    {%- generation %}{{ '</' + message.role + '>' }}{% endgeneration %}
{%- endfor %}
{{- {'html': '<&>', 'é': 1} | tojson }}
""",
    "dated": "{{ strftime_now('%Y') }} {{ messages | length }} {{ eos_token }}{{ nothing }}",
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "  Hi there\n"}],
    "turns": [
        {"role": "user", "content": "Grüße, <b>東京</b>"},
        {"role": "assistant", "content": " Hello. \n"},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "bye"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"q": "string"}}}]
SPECIAL = {"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>", "lstrip": False}, "model_max_length": 100}


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_what_transformers_renders(tmp_path: Path, name: str, chat: str, generation: bool) -> None:
    if chat == "parts" and name in ("chatml", "alternating"):
        return  # templates for plain text only
    from transformers import PreTrainedTokenizerFast

    save(byte_level(), tmp_path, {**SPECIAL, "chat_template": TEMPLATES[name]})
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|bos|>", eos_token="<|eos|>"
    )
    wanted = oracle.apply_chat_template(
        CHATS[chat], chat_template=TEMPLATES[name], tools=TOOLS, tokenize=False, add_generation_prompt=generation
    )
    template = ChatTemplate.read(tmp_path)
    assert template is not None
    assert template.source == TEMPLATES[name]
    assert template.render(CHATS[chat], generation=generation, tools=TOOLS) == wanted


def test_the_date_can_be_given() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {})
    assert template.render([], now=datetime.datetime(2026, 7, 4)) == "04 Jul 2026"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ raise_exception('only one system message') }}", "refused by the model's chat template: only one system"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[5].content }}", "UndefinedError"),
        ("{{ messages[0].__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError"),
    ],
)
def test_what_a_template_rejects_is_the_clients_error(source: str, why: str) -> None:
    with pytest.raises(RequestError, match="messages: .*" + why) as raised:
        ChatTemplate(source, {}).render(CHATS["one"])
    assert raised.value.code == "INVALID_ARGUMENT"


def write(folder: Path, config: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert ChatTemplate.read(tmp_path) is None
    assert ChatTemplate.read(write(tmp_path, {"eos_token": "x"})) is None
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d{{ eos_token }}"}]
    listed = ChatTemplate.read(write(tmp_path, {"chat_template": named, "eos_token": "!"}))
    assert listed is not None
    assert listed.render([]) == "d!"
    (tmp_path / "chat_template.jinja").write_text("f{{ eos_token }}")
    filed = ChatTemplate.read(tmp_path)
    assert filed is not None
    assert filed.render([]) == "f!"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"chat_template": "{% if %}"}, "chat_template: line 1"),
        ({"chat_template": [{"name": "rag", "template": "r"}]}, "one named 'default' among 'rag'"),
        ({"chat_template": 7}, "chat_template: got int"),
        ([], "got list, wanted a JSON object"),
    ],
)
def test_a_damaged_template_is_the_models_error(tmp_path: Path, config: object, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        ChatTemplate.read(write(tmp_path, config))
