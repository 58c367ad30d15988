"""Chat messages to a prompt: the checkpoint's own template, rendered as transformers does."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import numpy as np

from echoatt_runtime.errors import ChatTemplateError, OptionError, PromptError, one_line
from echoatt_runtime.plain_values import as_list, kind_of
from echoatt_runtime.text.bounded_templates import BoundedEnvironment
from echoatt_runtime.text.tokenizer import TextTokenizer

Message: TypeAlias = Mapping[str, Any]

# What a template finds what an assistant thought under; the first is what most of them ask for
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")
# A message that has nothing else says nothing
_NAMES: Final = frozenset(("role", "name"))


def render_chat(
    tokenizer: TextTokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The prompt for `messages`, ending where the assistant's answer begins.

    Special tokens are part of the text: encode it with `add_special_tokens=False`.

    Args:
        tokenizer: The checkpoint's tokenizer, which carries the template.
        messages: Mappings with "role" and "content", as clients send them: a key whose value is
            None counts as absent, and a message with "tool_calls" needs no content. Where the
            template cannot do without content that is absent, it is given an empty text.
        tools: What the model may call, each a JSON schema; None names none.
        template_kwargs: Further arguments of the template, such as {"enable_thinking": False}.

    Raises:
        PromptError: No messages, or one without role or content.
        OptionError: `tools` or `template_kwargs` are of another kind.
        ChatTemplateError: There is no template, it refuses the messages, or it is out of bounds in
            what it takes.
    """
    try:
        given = _read_messages(messages)
        arguments = tokenizer.special_tokens | {"documents": None, "add_generation_prompt": True}
        arguments |= _read_arguments(template_kwargs) | {"tools": _read_tools(tools)}
    except RecursionError as error:
        raise PromptError("the chat holds itself, or is nested too deeply; flatten it") from error
    source = tokenizer.chat_template
    if tools is not None and tokenizer.tool_template is not None:
        source = tokenizer.tool_template
    if source is None:
        raise ChatTemplateError(
            "the checkpoint has no chat template; pass the prompt as text, "
            "or export the model again from a checkpoint that has one"
        )
    try:
        try:
            return _render(source, given, arguments)
        # A template that adds or quotes what is absent
        except (jinja2.UndefinedError, TypeError):
            filled = [{"content": ""} | message for message in given]
            if filled == given:
                raise
            return _render(source, filled, arguments)
    # A template is a program of the checkpoint's, and may fail in any way.
    except Exception as error:
        raise ChatTemplateError(
            f"the chat template refuses the messages ({one_line(error) or type(error).__name__}); "
            "see which roles and orders it allows"
        ) from error


def is_message(item: object) -> bool:
    """Whether something is a message: a mapping, or an object that clients make of one."""
    return isinstance(item, Mapping) or callable(getattr(item, "model_dump", None))


def _render(source: str, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> str:
    template = _environment([messages, arguments]).from_string(source)
    return template.render(arguments, messages=messages)


def _read_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as plain JSON, without what is null."""
    items = as_list(messages)
    if items is None:
        raise PromptError(f"a chat is a list of messages and not {kind_of(messages)}; give a list")
    if not items:
        raise PromptError("the chat has no messages; give at least one")
    read = []
    for index, item in enumerate(items):
        message = _plain(item) if is_message(item) else None
        if not isinstance(message, dict):
            raise PromptError(
                f"message {index} of the chat is {kind_of(item)}; give a mapping with role"
                " and content"
            )
        says = {key: value for key, value in message.items() if value is not None}
        if not isinstance(says.get("role"), str) or message.keys() <= _NAMES:
            raise PromptError(f"message {index} of the chat lacks a role or content; give both")
        thought = next((says[name] for name in _REASONING if name in says), None)
        if thought is not None:
            says = {"thinking": thought} | says | {"reasoning_content": thought}
        read.append(says)
    return read


def _read_tools(tools: object) -> list[Any] | None:
    if tools is None:
        return None
    read = as_list(tools)
    if read is None or not all(map(is_message, read)):
        raise OptionError("tools are no list of JSON schemas; give a mapping for each tool")
    return [_plain(tool) for tool in read]


def _read_arguments(arguments: object) -> dict[str, Any]:
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise OptionError(
            f"chat_template_kwargs are {kind_of(arguments)}; give a mapping, its keys texts"
        )
    if taken := sorted({"messages", "tools"} & arguments.keys()):
        raise OptionError(
            f"chat_template_kwargs name {' and '.join(taken)}; give them as arguments of their own"
        )
    return {name: _plain(value) for name, value in arguments.items()}


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
    """Copy values into plain JSON types, so that a template sees no object with methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    # Enumerations and the like
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value) if kind is not str else str.__str__(value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    # Messages of clients' libraries are pydantic's
    dump = getattr(value, "model_dump", None)
    return _plain(dump()) if callable(dump) else f"<{type(value).__name__}>"
