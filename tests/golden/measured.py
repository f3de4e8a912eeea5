"""Every run in this process's environment, as JSON: compiled code and plain torch, 1 and 2 threads.

`record.py` starts this once for each capability. Plain torch with one thread comes first.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from golden import recording
from golden.configurations import CONFIGURATIONS, implementation_name, plain_torch, run, settled


def measured(threads: int, *, plain: bool) -> dict[str, dict | str]:
    """Numbers and digests of all runs by key, and their environment."""
    row = {"numbers": {}, "digests": {}}
    with settled(threads), plain_torch(plain), TemporaryDirectory() as directory:
        row["environment"] = recording.environment(implementation_name())
        for index, key in enumerate(CONFIGURATIONS):
            (place := Path(directory) / str(index)).mkdir()
            done = run(key, place)
            row["numbers"][key] = recording.numbers(done)
            row["digests"][key] = recording.digests(done)
    return row


if __name__ == "__main__":
    # the digests are those of one thread, which come first
    rows = [measured(threads, plain=plain) for threads in (1, 2) for plain in (True, False)]
    json.dump(rows, sys.stdout)
