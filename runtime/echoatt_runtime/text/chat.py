"""Chat messages to a prompt: the checkpoint's own template, rendered as transformers does."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from echoatt_runtime.errors import ChatTemplateError, PromptError, one_line
from echoatt_runtime.text.bounded_templates import BoundedEnvironment
from echoatt_runtime.text.tokenizer import TextTokenizer

Message = Mapping[str, Any]


def render_chat(tokenizer: TextTokenizer, messages: Sequence[Message]) -> str:
    """The prompt for `messages`, ending where the assistant's answer begins.

    Special tokens are part of the text: encode it with `add_special_tokens=False`.

    Args:
        tokenizer: The checkpoint's tokenizer, which carries the template.
        messages: Mappings with "role" and "content".

    Raises:
        PromptError: No messages, or one without role or content.
        ChatTemplateError: There is no template, it refuses the messages, or it is out of bounds in
            what it takes.
    """
    if not messages:
        raise PromptError("the chat has no messages; give at least one")
    for index, message in enumerate(messages):
        if "role" not in message or "content" not in message:
            raise PromptError(f"message {index} of the chat lacks a role or content; give both")
    if tokenizer.chat_template is None:
        raise ChatTemplateError(
            "the checkpoint has no chat template; pass the prompt as text, "
            "or export the model again from a checkpoint that has one"
        )
    given = _plain(list(messages))
    try:
        template = _environment(given).from_string(tokenizer.chat_template)
        return template.render(
            messages=given,
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **tokenizer.special_tokens,
        )
    # A template is a program of the checkpoint's, and may fail in any way.
    except Exception as error:
        raise ChatTemplateError(
            f"the chat template refuses the messages ({one_line(error) or type(error).__name__}); "
            "see which roles and orders it allows"
        ) from error


class _GenerationTag(jinja2.ext.Extension):
    """Templates mark the assistant's text with {% generation %}; rendering it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(given: object) -> BoundedEnvironment:
    environment = BoundedEnvironment(
        given,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.bound_filters()
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which models were not trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    # Templates want the user's own date, and naive local time is what transformers gives them.
    return dt.datetime.now().strftime(pattern)


def _plain(value: object) -> Any:
    """Copy messages into plain JSON types, so that a template sees no object with methods."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return f"<{type(value).__name__}>"
