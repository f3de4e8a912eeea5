"""`python -m dbkernels`."""

import sys


def run() -> None:
    """Run the command line; Ctrl-C ends it without a traceback, also while it is imported."""
    try:
        # an import of the package takes seconds, in which Ctrl-C comes as well
        from dbkernels.cli.main import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
