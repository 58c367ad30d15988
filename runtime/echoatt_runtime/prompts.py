"""What callers give as prompts: told apart, and refused where it is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from echoatt_runtime.errors import OptionError, PromptError
from echoatt_runtime.plain_values import as_integer, as_list, kind_of
from echoatt_runtime.sampling import SamplingParams
from echoatt_runtime.text import Message, TextTokenizer, is_message, render_chat

# Text, tokens, or the messages of a chat.
Prompt: TypeAlias = str | Sequence[int] | npt.NDArray[np.integer[Any]] | Sequence[Message]


def as_batch(prompts: object) -> list[object]:
    """A single prompt as a batch of one, and several as a list; none of them is looked at yet.

    Raises:
        PromptError: They are neither, or there are none.
    """
    if isinstance(prompts, str):
        return [prompts]
    items = _items(prompts)
    if not items:
        raise PromptError("there are no prompts; give at least one")
    if is_message(items[0]) or _is_token(items[0]):
        return [prompts]
    return items


def encode_prompts(
    prompts: Sequence[object],
    tokenizer: TextTokenizer,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Tokens of each prompt.

    Args:
        prompts: Text, tokens or messages each.
        tokenizer: The checkpoint's.
        tools: For those that are chats, see `render_chat`.
        chat_template_kwargs: For those that are chats, as `template_kwargs` of `render_chat`.

    Raises:
        PromptError: A prompt is of no such kind, or empty, or the tokenizer refuses it.
        OptionError: There is no chat for the arguments of its template.
        ChatTemplateError: As `render_chat`.
    """
    encoded, has_chat = [], False
    for prompt in prompts:
        read = _read_prompt(prompt)
        if isinstance(read, str):
            encoded.append(tokenizer.encode(read))
        elif is_message(read[0]):
            has_chat = True
            text = render_chat(
                tokenizer,
                cast(list[Message], read),
                tools=tools,
                template_kwargs=chat_template_kwargs,
            )
            encoded.append(tokenizer.encode(text, add_special_tokens=False))
        else:
            encoded.append([int(cast(int, token)) for token in read])
    if not has_chat and (tools is not None or chat_template_kwargs is not None):
        raise OptionError(
            "tools and chat_template_kwargs go into a chat's template, and no prompt is a chat;"
            " give messages"
        )
    return encoded


def one_each(params: object, count: int) -> list[SamplingParams]:
    """Sampling parameters for each prompt.

    Raises:
        OptionError: They are of another kind, or not as many as prompts.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    each = as_list(params)
    if each is None or not all(isinstance(own, SamplingParams) for own in each):
        raise OptionError(
            f"the sampling parameters are {kind_of(params)}; give SamplingParams, or a list of them"
        )
    if len(each) != count:
        raise OptionError(
            f"there are {len(each)} sampling parameters for {count} prompts; give one for all, or"
            " one for each"
        )
    return cast(list[SamplingParams], each)


def _read_prompt(prompt: object) -> str | list[object]:
    """A prompt's text, or its tokens or messages.

    Raises:
        PromptError: It has none of them.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("the prompt is empty; give at least one character")
        return prompt
    items = _items(prompt)
    if not items:
        raise PromptError("the prompt is empty; give at least one token or message")
    if all(map(is_message, items)) or all(map(_is_token, items)):
        return items
    raise PromptError(
        "a prompt mixes kinds; give text, a list of tokens, or a list of chat messages"
    )


def _items(prompt: object) -> list[object]:
    """What a prompt, or a list of them, is made of."""
    if is_message(prompt):
        raise PromptError("a chat is a list of messages; put the single message into a list")
    items = as_list(prompt)
    if items is None:
        raise PromptError(
            f"a prompt is {kind_of(prompt)}; give text, a list of tokens, or a list of chat"
            " messages"
        )
    return items


def _is_token(item: object) -> bool:
    return as_integer(item, -(2**63)) is not None
