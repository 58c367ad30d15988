import itertools
import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from echoatt_runtime.text.text_stream import Detokenizer, StopMatcher
from echoatt_runtime.text.tokenizer import TextTokenizer

TEXT = "Grüße, 世界! 🙂🙃 naïve — ☃\n\tfin"


def byte_fallback_tokenizer():
    """In the manner of Llama 2: words with a leading space mark, bytes for everything else."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁the", "é"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: token for token, piece in enumerate(pieces)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.fixture(params=["bytes", "byte_fallback"])
def text_tokenizer(request, byte_tokenizer):
    chosen = byte_tokenizer if request.param == "bytes" else byte_fallback_tokenizer()
    return TextTokenizer(chosen, {}, None)


def stream(tokenizer, prompt, new_tokens):
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.add(token) for token in new_tokens), detokenizer.finish()]


def continuation(tokenizer, prompt, new_tokens):
    whole = tokenizer.decode([*prompt, *new_tokens])
    return whole[len(tokenizer.decode(prompt)) :]


def test_pieces_never_break_a_character(text_tokenizer):
    prompt, tokens = text_tokenizer.encode("a"), text_tokenizer.encode(TEXT)
    pieces = stream(text_tokenizer, prompt, tokens)
    assert "".join(pieces) == continuation(text_tokenizer, prompt, tokens)
    assert "".join(pieces).lstrip() == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_byte_level_text_comes_character_by_character(byte_tokenizer):
    tokenizer = TextTokenizer(byte_tokenizer, {}, None)
    pieces = stream(tokenizer, [0], tokenizer.encode("é世🙂a"))
    assert pieces == ["", "é", "", "", "世", "", "", "", "🙂", "a", ""]


@pytest.mark.parametrize("seed", range(40))
def test_pieces_of_any_tokens_join_to_the_full_decode(text_tokenizer, seed):
    # Random tokens are mostly broken characters, with special tokens and spaces among them.
    generator = np.random.default_rng(seed)
    size = text_tokenizer._tokenizer.get_vocab_size()
    weights = np.ones(size)
    weights[-8:] = size / 8
    weights /= weights.sum()
    prompt = [int(token) for token in generator.choice(size, 5, p=weights)]
    new_tokens = [int(token) for token in generator.choice(size, 60, p=weights)]
    prompt.append(next(token for token in range(size) if not text_tokenizer.is_byte_token(token)))
    if text_tokenizer.decode(prompt).endswith("\N{REPLACEMENT CHARACTER}"):
        prompt.append(text_tokenizer.encode("b")[-1])
    pieces = stream(text_tokenizer, prompt, new_tokens)
    assert "".join(pieces) == continuation(text_tokenizer, prompt, new_tokens)


def test_a_leading_space_survives():
    tokenizer = TextTokenizer(byte_fallback_tokenizer(), {}, None)
    prompt, the = tokenizer.encode("a"), tokenizer.encode("the")
    assert "".join(stream(tokenizer, prompt, the)).startswith(" the"[:1])
    assert "".join(stream(tokenizer, prompt, [tokenizer._tokenizer.token_to_id("▁the")])) == " the"


def test_a_special_token_does_not_eat_the_next_space():
    tokenizer = TextTokenizer(byte_fallback_tokenizer(), {}, None)
    to_id = tokenizer._tokenizer.token_to_id
    prompt = [to_id("▁a")]
    assert stream(tokenizer, prompt, [to_id("b"), to_id("</s>"), to_id("▁the")]) == [
        "b",
        "",
        " the",
        "",
    ]


def test_a_prompt_that_ends_with_special_tokens_keeps_the_space():
    tokenizer = TextTokenizer(byte_fallback_tokenizer(), {}, None)
    to_id = tokenizer._tokenizer.token_to_id
    prompt = [to_id("▁a"), *[to_id("</s>")] * 9]
    assert stream(tokenizer, prompt, [to_id("▁the")]) == [" the", ""]


def test_shared_tokenizers_stream_their_own_text(shared_models):
    text = "Once upon a time 🙂 there was naïve 世界.\n\nThe end"
    for directory in ("stories260k", "books12"):
        tokenizer = TextTokenizer.from_directory(shared_models / directory)
        tokens = tokenizer.encode(text, add_special_tokens=False)
        for cut in range(1, len(tokens)):
            prompt, new_tokens = tokens[:cut], tokens[cut:]
            if tokenizer.decode(prompt).endswith("\N{REPLACEMENT CHARACTER}"):
                continue
            joined = "".join(stream(tokenizer, prompt, new_tokens))
            assert joined == continuation(tokenizer, prompt, new_tokens)


def split_everywhere(text):
    """Every way to divide `text` into pieces."""
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        pieces, piece = [], text[0]
        for cut, character in zip(cuts, text[1:], strict=True):
            if cut:
                pieces.append(piece)
                piece = ""
            piece += character
        yield [*pieces, piece]


def matched(stop, pieces):
    matcher = StopMatcher(stop)
    out = []
    for piece in pieces:
        out.append(matcher.add(piece))
        if matcher.found:
            return "".join(out), True
    return "".join([*out, matcher.finish()]), False


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (["END"], "ab END cd", ("ab ", True)),
        (["END"], "ab EN cd", ("ab EN cd", False)),
        (["aab"], "aaaabc", ("aa", True)),
        (["abc", "b"], "xabc", ("xa", True)),
        (["xabcd", "bc"], "0xabcz", ("0xa", True)),
        (["\n\n"], "a\nb\n\nc", ("a\nb", True)),
        (["abcd"], "xxabc", ("xxabc", False)),
        ([], "anything", ("anything", False)),
        (["x"], "x", ("", True)),
    ],
)
def test_stop_strings_cut_the_same_text_however_it_is_divided(stop, text, expected):
    for pieces in split_everywhere(text):
        assert matched(stop, pieces) == expected, pieces


def test_only_what_may_begin_a_stop_string_is_held_back():
    matcher = StopMatcher(["###", "END"])
    assert [matcher.add(piece) for piece in ["a#", "#b", "E", "x", "EN"]] == [
        "a",
        "##b",
        "",
        "Ex",
        "",
    ]
    assert matcher.finish() == "EN"
    assert matcher.finish() == ""


def test_byte_fallback_tokenizer_is_recognised():
    tokenizer = TextTokenizer(byte_fallback_tokenizer(), {}, None)
    assert [tokenizer.is_byte_token(token) for token in (0, 1, 256, 257)] == [
        False,
        True,
        True,
        False,
    ]
    assert json.loads(byte_fallback_tokenizer().to_str())["model"]["byte_fallback"]
