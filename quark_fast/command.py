"""What the commands share: how one ends."""

from __future__ import annotations

import sys
from collections.abc import Callable

from quark_fast.config import UsageError


def exit_status(command: Callable[[], None]) -> int:
    """Run a command: 0 done, 2 bad input (one line on standard error), 130 stopped by Ctrl-C."""
    try:
        command()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # the trainer's own says how to go on
        print(str(stop) or "stopped", file=sys.stderr)
        return 130
    return 0
