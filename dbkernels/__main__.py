"""`python -m dbkernels`."""

import os
import signal
import sys


def run() -> None:
    """Run the command line; Ctrl-C ends it without a traceback, also while it is imported."""
    # an import of the package takes seconds, in which Ctrl-C comes as well; an error in the middle
    # of compiled code's import would abort the process
    answer = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from dbkernels.cli.main import main

    signal.signal(signal.SIGINT, answer)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
