"""How evenly a launch fills a device: what its programs do, over what the device could meanwhile.

Programs start in waves, as many at a time as fit; in one wave that is not full, each processor has
as near the same number as there can be. The device waits for the processor that has most to do.
"""

from kernel_cases import Case, Shapes, T
from kernel_compile import PROCESSORS, record

BATCHES = (8, 32, 64, 128, 256)  # samples
# how kernels call the rows, or tokens, of a program
SHARES = ("rows_per_program", "tokens_per_program")


def wave_efficiency(case: Case, shapes: Shapes, arch: int, fit: int) -> float:
    """From 0 to 1, of a kernel that is bound by memory.

    Args:
        case:    the kernel
        shapes:  it is launched at
        arch:    10 times the compute capability
        fit:     programs that fit one processor
    """
    _, launch = record(case, shapes, arch)
    each = next((launch.arguments[name] for name in SHARES if name in launch.arguments), None)
    full = 1.0
    if each is not None and "segments" not in launch.arguments:
        # the last program may have fewer rows than the others
        rows = shapes.B * T
        full = rows / (each * -(-rows // each))
    return full * launch.programs / (PROCESSORS[arch] * _load(launch.programs, arch, fit))


def _load(programs: int, arch: int, fit: int) -> int:
    """Programs one after another and side by side on the processor that has most."""
    count = PROCESSORS[arch]
    if programs <= fit * count:
        return -(-programs // count)
    return fit * -(-programs // (fit * count))
