"""Text for calibration, training and evaluation: read files, tokenise, cut into windows.

Texts are used as they are written: Markdown keeps its marks and white space stays, because that is
what a model is judged on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from echoatt_exporter.errors import CheckpointError, TextError
from echoatt_exporter.share.tokenizer_files import has_tokenizer, open_tokenizer
from echoatt_runtime.text import unicode_fault

_PLAIN_SUFFIXES = (".txt", ".md", ".markdown")
_LINES_SUFFIX = ".jsonl"


@dataclass(frozen=True, slots=True)
class Text:
    """One document.

    Attributes:
        name: Where it is from: a path, and for JSONL the line, `reviews.jsonl:17`.
        content: Its characters.
    """

    name: str
    content: str


def read_texts(paths: Sequence[str | Path]) -> list[Text]:
    """Read documents from files and folders.

    Args:
        paths: `.txt` and `.md` files, one document each; `.jsonl` files, one document a line
            in the field `text`; folders, in which every such file is read in name order.

    Returns:
        The documents in the order of `paths`; empty ones are left out.

    Raises:
        TextError: A path that is absent, unreadable or of another kind, a line without a text, what
            is no Unicode, or no text in all of them.
    """
    texts = [text for path in paths for text in _read_path(Path(path)) if text.content.strip()]
    if not texts:
        raise TextError(f"no text in {', '.join(map(str, paths))}; give files that hold some")
    return texts


def _read_path(path: Path) -> Iterator[Text]:
    if path.is_dir():
        suffixes = (*_PLAIN_SUFFIXES, _LINES_SUFFIX)
        files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in suffixes)
        if not files:
            raise TextError(f"{path}: no {', '.join(suffixes)} file in this folder")
    else:
        files = [path]
    for file in files:
        suffix = file.suffix.lower()
        if file.exists() and suffix not in (*_PLAIN_SUFFIXES, _LINES_SUFFIX):
            raise TextError(
                f"{file}: not a kind of text file that is known; give .txt, .md, or .jsonl with a"
                ' field "text"'
            )
        try:
            # A byte order mark is no part of the text
            content = file.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise TextError(f"{file}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise TextError(f"{file}: not UTF-8 text (byte {error.start}); convert it") from error
        if suffix == _LINES_SUFFIX:
            yield from _read_lines(file, content)
        else:
            yield Text(str(file), content)


def _read_lines(file: Path, content: str) -> Iterator[Text]:
    # not splitlines(), which cuts at characters that JSON strings may hold
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        name = f"{file}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise TextError(f"{name}: not JSON ({error}); one object a line") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise TextError(f'{name}: no string "text" in this line')
        if fault := unicode_fault(text):
            raise TextError(f"{name}: no Unicode text ({fault}); write whole characters")
        yield Text(name, text)


def texts_digest(texts: Sequence[Text]) -> str:
    """The SHA-256 of the contents in order, 64 hexadecimal digits; names do not count."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.content.encode()
        digest.update(f"{len(encoded)}\0".encode())
        digest.update(encoded)
    return digest.hexdigest()


def load_tokenizer(
    model_dir: str | Path, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that text is read with: the one in a model directory.

    Raises:
        CheckpointError: There is none, or it cannot be loaded.
    """
    directory = Path(model_dir)
    if not has_tokenizer(directory):
        raise CheckpointError(
            f"{directory}: no tokenizer, and text needs one; copy the files of the checkpoint's"
            " tokenizer there"
        )
    return open_tokenizer(directory, trust_remote_code=trust_remote_code)


def encode_texts(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Token ids of each document, int64 [tokens], without special tokens."""
    contents = [text.content for text in texts]
    # verbose=False: documents are longer than the context, and are cut later
    rows: Any = tokenizer(contents, add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.from_numpy(np.asarray(row, dtype=np.int64)) for row in rows]


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text, such as `<s>`; often none."""
    marked = cast(list[int], tokenizer("a")["input_ids"])
    plain = cast(list[int], tokenizer("a", add_special_tokens=False)["input_ids"])
    for start in range(len(marked) - len(plain) + 1):
        if marked[start : start + len(plain)] == plain:
            return marked[:start]
    return []


def sample_windows(
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    seed: int = 0,
) -> torch.Tensor:
    """Windows of exactly `length` tokens, never padded, each the start or a later part of a text.

    Every document's first window is taken before any second one, so that `count` windows from at
    least as many documents are the paper's "texts cut to exactly 512 tokens" (arXiv 2409.14595).

    Args:
        texts: The documents; what is left at a document's end is not used.
        tokenizer: Its leading special tokens open every window and count.
        length: Tokens in a window.
        count: Windows wanted.
        seed: Which documents are taken when there are more than `count`.

    Returns:
        int64 [windows, length] with `count` windows, or fewer where the texts hold no more.

    Raises:
        TextError: No document fills a window.
    """
    lead = torch.tensor(leading_tokens(tokenizer), dtype=torch.int64)
    width = length - len(lead)
    if width < 1:
        raise TextError(f"windows of {length} tokens leave no room for text; make them longer")
    documents = encode_texts(texts, tokenizer)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    deepest = max((len(document) // width for document in documents), default=0)
    if not deepest:
        longest = max((len(document) for document in documents), default=0)
        raise TextError(
            f"too little text: no document has the {width} tokens that a window of {length} takes"
            f" (the longest has {longest}); give longer texts, or a smaller length"
        )
    windows: list[torch.Tensor] = []
    for depth in range(deepest):
        for index in order:
            part = documents[index][depth * width : (depth + 1) * width]
            if len(part) == width:
                windows.append(torch.cat([lead, part]))
            if len(windows) == count:
                return torch.stack(windows)
    return torch.stack(windows)
