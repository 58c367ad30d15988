"""Between text and tokens: tokenizer, chat templates, streamed text."""

from echoatt_runtime.text.chat import Message, is_message, render_chat
from echoatt_runtime.text.text_stream import Detokenizer, StopMatcher
from echoatt_runtime.text.tokenizer import (
    CHAT_TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TextTokenizer,
    unicode_fault,
)

__all__ = [
    "CHAT_TEMPLATE_FILE",
    "TOKENIZER_CONFIG_FILE",
    "TOKENIZER_FILE",
    "Detokenizer",
    "Message",
    "StopMatcher",
    "TextTokenizer",
    "is_message",
    "render_chat",
    "unicode_fault",
]
