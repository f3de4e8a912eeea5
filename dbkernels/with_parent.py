"""A process that ends with its parent, however that ends; a program too, if this file is run:

python dbkernels/with_parent.py PARENT PROGRAM [ARGUMENT ...]

It imports little, as it then runs in a Python that starts in a moment.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone; Linux alone can.

    Args:
        parent:  the number of its process; where that is gone already, this one ends here
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
