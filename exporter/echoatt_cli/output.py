"""What a command writes: to readers that leave, disks that are full, and terminals of few signs."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

# What a shell gives for a process whose reader has gone
_READER_GONE = 141
_FAILED = 2


def complain(message: str) -> None:
    """Say on standard error what went wrong; where that cannot be written the exit code says it."""
    try:
        print(f"echoatt: {message}", file=sys.stderr, flush=True)
    except OSError:
        _write_nowhere(sys.stderr)


class _Output(io.TextIOWrapper):
    """Standard output that remembers why it could not be written.

    Attributes:
        lost: What writing raised; None as long as all went well.
    """

    lost: OSError | None = None

    def write(self, text: str, /) -> int:
        """See `io.TextIOWrapper`."""
        with self._remembering():
            return super().write(text)

    def flush(self) -> None:
        """See `io.TextIOWrapper`."""
        with self._remembering():
            super().flush()

    @contextlib.contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = error
            raise


def guard_output(action: Callable[[], int]) -> int:
    """Run what writes to standard output, and see that all of it gets there.

    Characters that the output's encoding lacks are replaced.

    Args:
        action: What to run; gives the exit code.

    Returns:
        The action's exit code; 141 where the reader has gone, which nobody needs to be told; 2
        where the output cannot be written, after a line that says why.
    """
    if sys.stdout is None:
        with (
            Path(os.devnull).open("w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):
            return action()
    whole = sys.stdout
    if not isinstance(whole, io.TextIOWrapper):
        return action()
    whole.flush()
    output = _Output(
        whole.buffer,
        encoding=whole.encoding,
        errors="replace",
        line_buffering=whole.line_buffering,
        write_through=whole.write_through,
    )
    sys.stdout = output
    try:
        try:
            code = action()
        finally:
            with contextlib.suppress(OSError):
                output.flush()
    # argparse ends the process after --help
    except (OSError, SystemExit):
        if output.lost is None:
            raise
    finally:
        sys.stdout = whole
        if output.lost is not None:
            _write_nowhere(whole)
        output.detach()
    if output.lost is None:
        return code
    if isinstance(output.lost, BrokenPipeError):
        return _READER_GONE
    reason = output.lost.strerror
    complain(f"standard output cannot be written ({reason}); make room, or write elsewhere")
    return _FAILED


def _write_nowhere(stream: TextIO) -> None:
    """Let go what is left in a stream's buffers, which would be tried again at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
