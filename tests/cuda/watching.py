"""What the stand-ins for CUDA's libraries log."""

import os
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

LOG = Path(os.environ["CUDA_STUB_LOG"])


class Seen:
    """What was logged meanwhile.

    Attributes:
        to_device: Bytes of each copy there, and so on for the other directions.
        kinds: Kinds of lines, in order.
        captured: Number of lines by kind that became part of a CUDA graph.
    """

    def __init__(self, lines):
        split = [line.split("\t") for line in lines]
        fields = [field[1:] for field in split]
        self.captured = Counter(field[1] for field in split if field[0] == "c")
        copies = [(field[1], int(field[2])) for field in fields if field[0] == "copy"]
        self.to_device = [size for way, size in copies if way == "H2D"]
        self.to_host = [size for way, size in copies if way == "D2H"]
        self.on_device = [size for way, size in copies if way == "D2D"]
        self.kinds = [field[0] for field in fields]


@contextmanager
def watch():
    before = len(LOG.read_text().splitlines())
    seen = []
    yield seen
    seen.append(Seen(LOG.read_text().splitlines()[before:]))
