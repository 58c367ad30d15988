"""One sequence, fed tokens by hand."""

import pytest
from tests.runtime.conftest import byte_fallback_tokenizer
from tokenizers import decoders

from echoatt_runtime import DamagedBundleError, SamplingParams
from echoatt_runtime.generation import TokenSequence
from echoatt_runtime.text import TextTokenizer

TOKENS = byte_fallback_tokenizer()


def tokens_of(text):
    return [TOKENS.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


@pytest.fixture
def pieces(make_specification):
    """`pieces(new_tokens, **params)`: what a sequence shows after each token until it ends."""

    def feed(new_tokens, **params):
        sequence = TokenSequence(
            [TOKENS.token_to_id("▁a")],
            SamplingParams(**params),
            make_specification(vocab_size=TOKENS.get_vocab_size()),
            TextTokenizer(TOKENS, {}, None),
        )
        shown = []
        for token in new_tokens:
            piece = sequence.take_choice(token, finite=True)
            shown.append(None if piece is None else piece.text)
            if sequence.finished:
                break
        return shown, sequence.result

    return feed


def test_a_stop_string_of_byte_tokens_ends_at_its_last_byte(pieces):
    shown, result = pieces(tokens_of("\n" * 100), stop=["\n\n"])
    assert shown == [None, ""]
    assert (result.text, result.new_tokens, result.finish_reason) == ("", 2, "stop")
    shown, result = pieces(tokens_of("x世🙂 y"), stop=["世🙂"])
    assert shown == ["x", *[None] * 6, ""]
    assert (result.text, result.new_tokens, result.finish_reason) == ("x", 8, "stop")


def test_byte_tokens_are_shown_as_they_come(pieces):
    shown, result = pieces(tokens_of("\n\né\n"), stop=["\n\n\n"], max_new_tokens=5)
    assert shown == [None, None, None, "\n\né", "\n"]
    assert (result.text, result.finish_reason) == ("\n\né\n", "length")
    assert pieces(tokens_of("\n\n"), max_new_tokens=2)[0] == ["\n", "\n"]


def test_a_character_cut_short_is_shown_at_the_end(pieces):
    shown, result = pieces(tokens_of("世")[:2], max_new_tokens=2, stop=["世"])
    assert shown == [None, "\N{REPLACEMENT CHARACTER}"]
    assert result.finish_reason == "length"


def test_a_tokenizer_that_fails_on_its_tokens_ends_it_alone(make_specification):
    tokenizer = byte_fallback_tokenizer()
    # Takes more off the end of some tokens than there is
    tokenizer.decoder = decoders.Strip("b", 0, 9)
    sequence = TokenSequence(
        [tokenizer.token_to_id("▁a")],
        SamplingParams(),
        make_specification(vocab_size=tokenizer.get_vocab_size()),
        TextTokenizer(tokenizer, {}, None),
    )
    token = tokenizer.token_to_id("b")
    piece = sequence.take_choice(token, finite=True)
    assert piece.finish_reason == "error"
    assert sequence.result.token_ids == (token,)
    with pytest.raises(DamagedBundleError, match="cannot make text of tokens"):
        raise sequence.result.error
