"""A checkpoint's tokenizer: its files as they are, and what transformers makes of them.

Which tokens a text has says `tokenizer.json`, where there is one: it is copied byte for byte and
read by itself. transformers builds tokenizers anew from the class that a configuration names, which
may give others.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from echoatt_exporter.errors import CheckpointError
from echoatt_exporter.share.model_directory import CONFIG
from echoatt_exporter.share.quiet import quiet_transformers
from echoatt_exporter.share.unfit_checkpoints import short
from echoatt_exporter.share.weight_files import read_json_object
from echoatt_runtime.text import (
    CHAT_TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TextTokenizer,
)

_EOS_FILES = (TOKENIZER_CONFIG_FILE, "special_tokens_map.json")
_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, "tokenizer.model", "vocab.json")
# Where ways to split a text part: digits, blank lines, indents, contractions, scripts, white space
_SAMPLES = (
    "In 2024, 12345 of 650841823 were 3.14159 or 007.",
    "Steps:\n\n1. Mix\n\n\n2. Bake\r\n\tdone",
    "def f(x):\n    return {'a': x[0] != -1}  # ok\n",
    "Don't, I'LL, we've; Déjà vu: naïve café, Ærøskøbing, İstanbul",
    "今天天气很好。日本語のテキスト、한국어 텍스트",
    "🎉👩‍👩‍👧 → ½ ﬁ Ⅷ  \u00a0 end ",
    " leading, and  double  spaces",
)


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds any tokenizer."""
    return any((directory / name).is_file() for name in _FILES)


def refuse_missing_package(directory: Path) -> None:
    """Refuse a vocabulary that only an absent package can read.

    Raises:
        CheckpointError: Names the package.
    """
    if (directory / TOKENIZER_FILE).is_file():
        return
    for path in sorted(directory.glob("*.model")):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            # A protocol buffer begins with its first field's mark, tiktoken's lines with base64
            sentencepiece = file.read(1) == b"\n"
        packages = ("sentencepiece", "protobuf") if sentencepiece else ("tiktoken",)
        if missing := [package for package in packages if not _is_installed(package)]:
            raise CheckpointError(
                f"{path}: a vocabulary that is read with {' and '.join(packages)}, and"
                f" {' and '.join(missing)} is not installed: pip install {' '.join(missing)}; or"
                f" put a {TOKENIZER_FILE} beside it"
            )


def open_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a model directory.

    Args:
        directory: Of a checkpoint or a bundle.
        trust_remote_code: Allow the tokenizer's own Python code to run, where there is no
            `tokenizer.json`.

    Returns:
        What `tokenizer.json` says, with `eos_token` set if there is one; else what transformers
        makes of other files.

    Raises:
        CheckpointError: There is none, or it cannot be loaded.
    """
    refuse_missing_package(directory)
    with _one_line_errors(directory):
        if (directory / TOKENIZER_FILE).is_file():
            return _own(directory)
        return _made(directory, trust_remote_code)


def save_tokenizer(
    source: Path, directory: Path, *, trust_remote_code: bool = False
) -> Sequence[str]:
    """Put the tokenizer and chat template in `source`, if there are any, into `directory`.

    Args:
        source: A checkpoint's directory.
        directory: An existing one.
        trust_remote_code: As in `open_tokenizer`.

    Returns:
        What a user should know, in a line each; often nothing.

    Raises:
        CheckpointError: There is a tokenizer, and it cannot be loaded.
    """
    if not has_tokenizer(source):
        return []
    refuse_missing_package(source)
    with _one_line_errors(source):
        if not (source / TOKENIZER_FILE).is_file():
            _made(source, trust_remote_code).save_pretrained(directory)
            if (directory / TOKENIZER_FILE).is_file():
                return []
            return [
                f"{source}: its tokenizer is Python code of transformers, of which no"
                f" {TOKENIZER_FILE} can be made; a bundle of it runs on token ids"
            ]
        own = TextTokenizer.from_directory(source)
        rebuilt: PreTrainedTokenizerBase | None = None
        # Code that is not trusted, or a package that is absent: nothing to compare with
        with contextlib.suppress(Exception):
            rebuilt = _rebuilt(source, trust_remote_code)
        # This class keeps to tokenizer.json, and saves what other files say of it in one form
        plain = rebuilt if type(rebuilt) is PreTrainedTokenizerFast else _plain(source)
        plain.save_pretrained(directory)
        for name in (TOKENIZER_FILE, CHAT_TEMPLATE_FILE):
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
        return [] if rebuilt is None else _differences(source, own, rebuilt)


def _differences(
    source: Path, own: TextTokenizer, rebuilt: PreTrainedTokenizerBase
) -> Sequence[str]:
    """One line if transformers' tokenizer gives other tokens than the checkpoint's."""
    differ = [text for text in _SAMPLES if rebuilt(text)["input_ids"] != own.encode(text)]
    if not differ:
        return []
    return [
        f"{source}: {type(rebuilt).__name__}, which transformers makes for it, gives other tokens"
        f" than its {TOKENIZER_FILE} in {len(differ)} of {len(_SAMPLES)} texts, such as"
        f" {differ[0]!r}; EchoAtt goes by {TOKENIZER_FILE}"
    ]


def _own(directory: Path) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / TOKENIZER_FILE), clean_up_tokenization_spaces=False
    )
    # Only named, not added: the tokens of a text stay those that the file says
    if (end := _end_of_text(directory, tokenizer)) is not None:
        tokenizer.eos_token = end
    return tokenizer


def _end_of_text(directory: Path, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The token that ends a text, by the tokenizer's files, or else by the model's configuration.

    transformers' classes know it of models whose tokenizer's files do not name it, such as GPT-2.
    """
    vocabulary = tokenizer.backend_tokenizer
    for name in _EOS_FILES:
        named: Any = _read(directory / name).get("eos_token")
        text = named.get("content") if isinstance(named, dict) else named
        if isinstance(text, str) and vocabulary.token_to_id(text) is not None:
            return text
    config = _read(directory / CONFIG)
    number = config.get("text_config", config).get("eos_token_id")
    known = type(number) is int and 0 <= number < vocabulary.get_vocab_size()
    return vocabulary.id_to_token(number) if known else None


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _made(directory: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """What transformers makes of a vocabulary without `tokenizer.json`."""
    tokenizer = _rebuilt(directory, trust_remote_code)
    # Of a class that needs no file to begin with, transformers makes an empty one
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise CheckpointError(
            f"{directory}: its tokenizer has no vocabulary; download {TOKENIZER_FILE}, or what the"
            " checkpoint has in its place"
        )
    return tokenizer


def _plain(directory: Path) -> PreTrainedTokenizerBase:
    with quiet_transformers():
        found: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
            directory, local_files_only=True
        )
    return found


def _rebuilt(directory: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    with quiet_transformers():
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
    return found


@contextlib.contextmanager
def _one_line_errors(directory: Path) -> Iterator[None]:
    """Turn whatever transformers and tokenizers raise into an error of ours."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, CheckpointError):
        raise
    # Where its Rust code panics, tokenizers raises no Exception
    except BaseException as error:
        raise CheckpointError(
            f"{directory}: its tokenizer cannot be loaded ({short(error)}); copy or download its"
            " files again"
        ) from error


def _is_installed(package: str) -> bool:
    module = {"protobuf": "google.protobuf"}.get(package, package)
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
