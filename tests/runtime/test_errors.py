import pickle

import pytest

from echoatt_runtime.errors import DamagedBundleError, EchoAttError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("as it  is: /a path/with  blanks", "as it  is: /a path/with  blanks"),
        ("a protobuf\n  says\r\n\tthis\n", "a protobuf says this"),
        ("a\u2028b\x85c\xa0d", "a b c d"),
        ("\x1b[31mred\x00", "\\x1b[31mred\\x00"),
        ("half \udc80 a \ud800 character", "half \\udc80 a \\ud800 character"),
        ("\u202egpj", "\\u202egpj"),
        ("é ☃ 世界 …", "é ☃ 世界 …"),
    ],
)
def test_a_message_is_one_line_that_a_terminal_can_show(given, message):
    error = DamagedBundleError(given)
    assert str(error) == message
    assert str(pickle.loads(pickle.dumps(error))) == message  # noqa: S301


def test_a_long_message_keeps_what_is_wrong_and_what_to_do():
    message = str(EchoAttError(f"the file {'x' * 1_000_000} is damaged; export it again"))
    assert message.startswith("the file xxx")
    assert message.endswith("is damaged; export it again")
    assert len(message) < 2100
    assert str(EchoAttError(message)) == message
