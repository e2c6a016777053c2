"""torchrun, with failures told once and in one line: `python -m steps.runtime.torchrun [OPTIONS] -m MODULE …`.

The processes tell their own failure; what is left for the launcher is its exit code, which is that of the first process
to fail, and a word where a process died without one.
"""

from __future__ import annotations

import logging
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run torch.distributed.run's own main with this process's arguments."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: process {rank} was killed by {failure.signal_name()}", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:  # it has ended the processes, which tell that they were stopped
        sys.exit(128 + error.sigval)
    sys.exit(0)


if __name__ == "__main__":
    main()
