"""`torchrun ... -m tests.scripts.failing_rank RANK CONFIG`: `philora train CONFIG`, one process of which fails."""

from __future__ import annotations

import sys
from typing import Any

from philora.cli import commands as cli
from philora.errors import RunError, fault
from philora.reporting import progress
from philora.runtime import processes


class _Failing(progress.ProgressBar):
    """Raises in one process after some steps, while the others are about to train on."""

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Fail."""
        super().on_step_end(args, state, control, **rest)
        if state.global_step == 3 and processes.rank() == int(rank):
            raise RunError(fault("planted", "rank", int(rank), "to continue"))


if __name__ == "__main__":
    rank, config = sys.argv[1:]
    progress.ProgressBar = _Failing  # type: ignore[misc]
    sys.argv[1:] = ["train", config]
    cli.main()
