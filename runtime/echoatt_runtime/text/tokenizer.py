"""The checkpoint's tokenizer, from the files beside the model, as transformers would apply it."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer
from tokenizers.decoders import Decoder
from tokenizers.normalizers import Normalizer

from echoatt_runtime.errors import DamagedBundleError, EchoAttError, PromptError, one_line

TOKENIZER_FILE: Final = "tokenizer.json"
TOKENIZER_CONFIG_FILE: Final = "tokenizer_config.json"
CHAT_TEMPLATE_FILE: Final = "chat_template.jinja"

_SPECIAL_TOKENS: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# What is replaced one for a few is normal; what is replaced again and again fills the memory
_LARGEST_GROWTH: Final = 1000.0
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BYTE_LEVEL: Final = "ByteLevel"
_BYTE_FALLBACK: Final = "ByteFallback"


class TextTokenizer:
    """Text to tokens and back.

    Attributes:
        special_tokens: Named special tokens, such as {"bos_token": "<s>"}, for chat templates.
        chat_template: The checkpoint's jinja chat template; None without one.
        tool_template: The one to use instead where there are tools; None without one of its own.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        special_tokens: dict[str, str],
        chat_template: str | None,
        tool_template: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.special_tokens = special_tokens
        self.chat_template = chat_template
        self.tool_template = tool_template
        self._decoders = _decoder_types(tokenizer)
        self._bytes_of: dict[int, bytes | None] = {}
        self._skipped_tokens = frozenset(
            token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        )

    @classmethod
    def from_directory(cls, directory: Path) -> TextTokenizer:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja of a checkpoint.

        Raises:
            DamagedBundleError: There is no tokenizer.json, or a file cannot be read.
        """

        def find(name: str) -> Path | None:
            return directory / name if (directory / name).is_file() else None

        return cls.from_files(find, directory)

    @classmethod
    def from_files(cls, find: Callable[[str], Path | None], directory: Path) -> TextTokenizer:
        """Read the same files from wherever they are.

        Args:
            find: Gives the place of a file by its name; None where there is no such file.
            directory: Where they should be, for messages.

        Raises:
            DamagedBundleError: As in `from_directory`.
        """
        path = find(TOKENIZER_FILE)
        if path is None:
            raise DamagedBundleError(
                f"{directory} has no {TOKENIZER_FILE} of this model; export it again from a"
                " checkpoint that has one"
            )
        with _failing_as(
            DamagedBundleError, f"{path} cannot be read", "copy it again from the checkpoint"
        ):
            tokenizer = Tokenizer.from_file(str(path))
            growth = _growth(tokenizer.normalizer) * _growth(tokenizer.decoder)
        if growth > _LARGEST_GROWTH:
            raise DamagedBundleError(
                f"{path} may make a text {growth:.0e} times as long; copy it again from the"
                " checkpoint"
            )
        # tokenizer.json alone says which tokens are added: transformers no longer heeds
        # `add_bos_token` in tokenizer_config.json. Padding and truncation are left from training.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        config = _read_config(find(TOKENIZER_CONFIG_FILE))
        special_tokens = {
            name: text for name in _SPECIAL_TOKENS if (text := _token_text(config.get(name)))
        }
        templates = _read_templates(find(CHAT_TEMPLATE_FILE), config)
        return cls(tokenizer, special_tokens, templates.get("default"), templates.get("tool_use"))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokens of `text`, with those that the tokenizer itself adds, such as BOS, or without.

        Raises:
            PromptError: The tokenizer has no tokens for the text, or it is no valid Unicode.
        """
        if fault := unicode_fault(text):
            raise PromptError(f"the prompt is no Unicode text ({fault}); give whole characters")
        with _failing_as(
            PromptError,
            "the checkpoint's tokenizer refuses the text",
            f"see that {TOKENIZER_FILE} is whole",
        ):
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, without special tokens.

        Raises:
            DamagedBundleError: The tokenizer fails on tokens that the model has.
        """
        with _failing_as(
            DamagedBundleError,
            "the checkpoint's tokenizer cannot make text of tokens",
            f"see that {TOKENIZER_FILE} is whole, and copy it again from the checkpoint",
        ):
            return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def bytes_of(self, token_id: int) -> bytes | None:
        """What the token adds to a text in UTF-8; None where that depends on the tokens before.

        It does not in vocabularies of bytes, and for the tokens that stand for one byte of what a
        vocabulary lacks.
        """
        if token_id not in self._bytes_of:
            self._bytes_of[token_id] = _token_bytes(
                self._tokenizer.id_to_token(token_id), self._decoders
            )
        return self._bytes_of[token_id]

    def is_left_out(self, token_id: int) -> bool:
        """Whether `decode` leaves the token out, because it is special or none of the tokenizer's.

        Many models have a few more tokens than their tokenizers.
        """
        return token_id in self._skipped_tokens or self._tokenizer.id_to_token(token_id) is None


def unicode_fault(text: str) -> str | None:
    """What in a text is no Unicode, such as half of a surrogate pair; None where all of it is.

    Python has such texts from JSON that was cut inside a character, and from arguments and file
    names that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start} is {text[error.start]!a}, which stands for none"
    return None


@contextlib.contextmanager
def _failing_as(error_type: type[EchoAttError], what: str, advice: str) -> Iterator[None]:
    """Turn whatever tokenizers raises into an error of ours."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    # tokenizers raises Exception itself, and where its Rust code panics no Exception at all
    except BaseException as error:
        raise error_type(f"{what} ({one_line(error)}); {advice}") from error


def _growth(part: Normalizer | Decoder | None) -> float:
    """How many times as long a tokenizer's part may make a text by what it replaces."""
    return 1.0 if part is None else _growth_of_state(json.loads(part.__getstate__()))


def _growth_of_state(state: dict[str, Any]) -> float:
    steps = state.get("normalizers") or state.get("decoders") or ()
    growth = math.prod(map(_growth_of_state, steps), start=1.0)
    if state.get("type") == "Replace":
        replaced = state["pattern"].get("String")
        # An expression may find nothing, between any two characters
        growth *= len(state["content"]) / len(replaced) if replaced else len(state["content"]) + 1
    return max(growth, 1.0)


def _decoder_types(tokenizer: Tokenizer) -> list[str]:
    """Of the decoders that make text of tokens, one after the other."""
    decoder = tokenizer.decoder
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return [part["type"] for part in state.get("decoders") or [state]]


def _token_bytes(text: str | None, decoders: list[str]) -> bytes | None:
    """See `TextTokenizer.bytes_of`."""
    if text is None:
        return None
    if decoders == [_BYTE_LEVEL]:
        # As the decoder does, which also meets added tokens, whose characters are their own
        if all(character in _BYTE_OF for character in text):
            return bytes(_BYTE_OF[character] for character in text)
        return text.encode()
    if _BYTE_FALLBACK in decoders and _BYTE_TOKEN.fullmatch(text):
        return bytes([int(text[3:5], 16)])
    return None


def _byte_characters() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for.

    Printable bytes of Latin-1 are their own characters, the others come behind it in order.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in own]
    return {chr(byte): byte for byte in own} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF: Final = _byte_characters()


def _read_config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        config = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise DamagedBundleError(
            f"{path} is not JSON ({one_line(error)}); copy it again from the checkpoint"
        ) from error
    if not isinstance(config, dict):
        raise DamagedBundleError(f"{path} is not a JSON object; copy it again from the checkpoint")
    return config


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedBundleError(
            f"{path} cannot be read ({one_line(error)}); copy it again from the checkpoint"
        ) from error


def _token_text(token: object) -> str | None:
    """A token's text; checkpoints write it bare or inside an object with its options."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_templates(path: Path | None, config: dict[str, Any]) -> dict[str, str]:
    """The checkpoint's chat templates by name; where it has one, its name is "default"."""
    if path is not None:
        return {"default": _read_text(path)}
    template = config.get("chat_template")
    if not isinstance(template, list):
        template = [{"name": "default", "template": template}]
    return {
        entry["name"]: entry["template"]
        for entry in template
        if isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
    }
