"""Threads of torch, for tests of what must not depend on their number."""

import torch


def with_threads(count, f):
    """f() with so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return f()
    finally:
        torch.set_num_threads(before)
