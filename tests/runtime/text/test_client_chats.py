"""Chats as clients send them, through templates in the manner of well-known families."""

from pathlib import Path

import jinja2
import numpy as np
import pytest

from echoatt_runtime import ChatTemplateError
from echoatt_runtime.text import TextTokenizer, render_chat

FOLDER = Path(__file__).parents[1] / "data" / "chat-templates"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.iterdir())}

CALL = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "get_w", "arguments": {"city": "Paris"}},
}
WEATHER = {"role": "tool", "tool_call_id": "abcdef123", "name": "get_w", "content": "sunny"}
ASK, THEN = {"role": "user", "content": "a"}, {"role": "user", "content": "c"}
CHATS = {
    "nulls": [
        ASK,
        {"role": "assistant", "content": "b", "tool_calls": None, "refusal": None},
        {**THEN, "name": None},
    ],
    "content null": [ASK, {"role": "assistant", "content": None}, THEN],
    "call without content": [ASK, {"role": "assistant", "tool_calls": [CALL]}, WEATHER],
    "call, content null": [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        WEATHER,
    ],
    "call, content empty": [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        WEATHER,
    ],
    "reasoning": [ASK, {"role": "assistant", "content": "b", "reasoning": "hm"}, THEN],
    "thinking": [ASK, {"role": "assistant", "content": "b", "thinking": "hm"}, THEN],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_w",
            "description": "Weather <of> a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
OPTIONS = {
    "plain": ({}, None),
    "tools": ({}, TOOLS),
    "arguments": ({"enable_thinking": False, "date_string": "1 Jan 2026"}, None),
    "overriding": (
        {"bos_token": "<x>", "add_generation_prompt": False, "custom_tools": TOOLS},
        None,
    ),
}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture
def theirs(byte_tokenizer):
    """`theirs(template, chat, tools, arguments)`: the prompt by transformers."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer, **SPECIAL_TOKENS
    )

    def render(template, chat, tools, arguments):
        options = {"add_generation_prompt": True} | arguments
        return tokenizer.apply_chat_template(
            chat, tools=tools, chat_template=template, tokenize=False, **options
        )

    return render


def without_undefined(chat):
    return [{"content": ""} | {k: v for k, v in m.items() if v is not None} for m in chat]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_clients_chats_agree_with_transformers(byte_tokenizer, theirs, template, chat, options):
    arguments, tools = OPTIONS[options]
    messages, source = CHATS[chat], TEMPLATES[template]
    tokenizer = TextTokenizer(byte_tokenizer, SPECIAL_TOKENS, source)
    try:
        expected = theirs(source, messages, tools, arguments)
    except jinja2.TemplateError as error:
        # Where it fails for want of content, an empty turn is what was meant
        if "has no attribute 'content'" not in str(error):
            with pytest.raises(ChatTemplateError, match="refuses the messages"):
                render_chat(tokenizer, messages, tools=tools, template_kwargs=arguments)
            return
        expected = theirs(source, without_undefined(messages), tools, arguments)
    assert "None" not in expected
    found = render_chat(tokenizer, messages, tools=tools, template_kwargs=arguments)
    assert found == expected


def test_no_template_fails_for_want_of_content(byte_tokenizer):
    for source in TEMPLATES.values():
        tokenizer = TextTokenizer(byte_tokenizer, SPECIAL_TOKENS, source)
        assert "get_w" not in render_chat(tokenizer, CHATS["content null"])
        assert render_chat(tokenizer, CHATS["call without content"], tools=TOOLS)


def test_what_a_template_is_given_shows(byte_tokenizer):
    thinking = TextTokenizer(byte_tokenizer, {}, TEMPLATES["thinking"])
    assert render_chat(thinking, [ASK]).endswith("assistant\n")
    off = render_chat(thinking, [ASK], template_kwargs={"enable_thinking": np.False_})
    assert off.endswith("assistant\n<think></think>")
    assert "<think>hm</think>b" in render_chat(thinking, CHATS["reasoning"])
    qwen = TextTokenizer(byte_tokenizer, {}, TEMPLATES["qwen-2.5"])
    assert '"Weather <of> a city"' in render_chat(qwen, [ASK], tools=TOOLS)


def test_a_template_for_tools_is_used_where_there_are_tools(byte_tokenizer):
    tokenizer = TextTokenizer(byte_tokenizer, {}, "plain", "{{ tools | length }} tools")
    assert render_chat(tokenizer, [ASK]) == "plain"
    assert render_chat(tokenizer, [ASK], tools=TOOLS) == "1 tools"
