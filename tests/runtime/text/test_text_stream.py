import itertools

import numpy as np
import pytest
from tests.runtime.conftest import byte_fallback_tokenizer
from tokenizers import decoders

from echoatt_runtime.text.text_stream import Detokenizer, StopMatcher
from echoatt_runtime.text.tokenizer import TextTokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TEXT = "Grüße, 世界! 🙂🙃 naïve — ☃\n\tfin"


@pytest.fixture(params=["bytes", "byte_fallback"])
def text_tokenizer(request, byte_tokenizer):
    chosen = byte_tokenizer if request.param == "bytes" else byte_fallback_tokenizer()
    return TextTokenizer(chosen, {}, None)


def stream(tokenizer, prompt, new_tokens):
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.add(token) for token in new_tokens), detokenizer.finish()]


def continuation(tokenizer, prompt, new_tokens):
    """What decoding all adds to decoding the prompt, but for a character that both have part of."""
    before = text_of(tokenizer, prompt).rstrip(REPLACEMENT)
    return text_of(tokenizer, [*prompt, *new_tokens])[len(before) :]


def text_of(tokenizer, tokens):
    """As `decode`, but bytes in a row are read as UTF-8, where the library spoils the whole row."""
    if tokenizer.bytes_of(tokenizer._tokenizer.token_to_id("<0x00>") or 0) != b"\0":
        return tokenizer.decode(tokens)
    text, row = "", b""
    for token in [*tokens, None]:
        piece = None if token is None else tokenizer._tokenizer.id_to_token(token)
        if piece in ("<s>", "</s>"):
            continue
        if piece is not None and piece.startswith("<0x"):
            row += bytes.fromhex(piece[3:5])
            continue
        text += row.decode(errors="replace")
        row = b""
        text += "" if piece is None else piece.replace("▁", " ")
    return text.removeprefix(" ")


def test_pieces_never_break_a_character(text_tokenizer):
    prompt, tokens = text_tokenizer.encode("a"), text_tokenizer.encode(TEXT)
    pieces = stream(text_tokenizer, prompt, tokens)
    assert "".join(pieces) == continuation(text_tokenizer, prompt, tokens)
    assert "".join(pieces).lstrip() == TEXT
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_characters_come_with_their_last_byte(byte_tokenizer):
    for chosen in (byte_tokenizer, byte_fallback_tokenizer()):
        tokenizer = TextTokenizer(chosen, {}, None)
        prompt = tokenizer.encode("b")
        tokens = tokenizer.encode("a世🙂\n\n\n")[-10:]
        assert stream(tokenizer, prompt, tokens) == [
            *("", "", "世", "", "", "", "🙂", "\n", "\n", "\n", "")
        ]


def test_what_follows_does_not_spoil_bytes_that_were_a_character():
    tokenizer = TextTokenizer(byte_fallback_tokenizer(), {}, None)
    to_id = tokenizer._tokenizer.token_to_id
    new_tokens = [to_id(f"<0x{byte:02X}>") for byte in b"\n\x80\xe4\n\xe4\xb8"]
    pieces = stream(tokenizer, [to_id("▁a")], [*new_tokens, to_id("▁the")])
    assert pieces == ["\n", REPLACEMENT, "", f"{REPLACEMENT}\n", "", "", f"{REPLACEMENT} the", ""]


def test_a_character_that_the_prompt_began_is_given_out_whole(text_tokenizer):
    tokens = text_tokenizer.encode("b世🙂")[-8:]
    for cut in range(1, 8):
        given = "".join(stream(text_tokenizer, tokens[:cut], tokens[cut:]))
        assert given == ("世🙂" if cut < 4 else "🙂")


def test_a_prompt_may_end_with_a_replacement_character(text_tokenizer):
    prompt, new = (text_tokenizer.encode(text) for text in (f"b{REPLACEMENT}", "xb"))
    assert "".join(stream(text_tokenizer, prompt, new[-2:])) == "xb"


def test_tokens_that_the_tokenizer_lacks_have_no_text(text_tokenizer):
    prompt, new_tokens = text_tokenizer.encode("b"), text_tokenizer.encode("世b")[-4:]
    new_tokens[1:1] = [9999]
    assert "".join(stream(text_tokenizer, [*prompt, 9999], new_tokens)) == "世b"


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


def test_bytes_of_tokens(byte_tokenizer):
    fallback = byte_fallback_tokenizer()
    assert [TextTokenizer(fallback, {}, None).bytes_of(token) for token in (0, 1, 256, 257)] == [
        None,
        b"\x00",
        b"\xff",
        None,
    ]
    # The same names are plain text where the decoder does not read them as bytes
    fallback.decoder = decoders.Replace("▁", " ")
    assert TextTokenizer(fallback, {}, None).bytes_of(1) is None
    every_byte = TextTokenizer(byte_tokenizer, {}, None)
    assert sorted(every_byte.bytes_of(token) for token in range(256)) == [
        bytes([byte]) for byte in range(256)
    ]
