"""A process that heals, as the command line does, and may kill itself.

`python -m tests.distill.worker KILL_AT ARGUMENTS…`: after step KILL_AT of stage 1 the process
gets SIGKILL, which nothing can catch; 0 for never.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from echoatt_cli import main
from echoatt_exporter.distill import run
from echoatt_exporter.distill.trainer import Progress


def _killing(kill_at: int) -> Any:
    distill = run.distill

    def distil_and_die(*arguments: Any, **named: Any) -> Any:
        def on_step(progress: Progress) -> None:
            if progress.step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        return distill(*arguments, **{**named, "on_step": on_step})

    return distil_and_die


if __name__ == "__main__":
    if kill_at := int(sys.argv[1]):
        run.distill = _killing(kill_at)
    sys.exit(main(sys.argv[2:]))
