"""A tokenizer for tiny models: the word `w7` is token 7."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[[bool], PreTrainedTokenizerBase]:
    """`tokenizer_of(leads)`: with or without `<s>` before every text."""
    from tests.tiny_models import VOCAB_SIZE
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def build(leads: bool) -> PreTrainedTokenizerBase:
        words = {"<unk>": 0, "<s>": 1} | {f"w{index}": index for index in range(2, VOCAB_SIZE)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if leads:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 1)]
            )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")

    return build
