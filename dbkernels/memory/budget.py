"""A ceiling for the memory of a training step of anybody's own."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.optim import Optimizer

from dbkernels.memory.allocator import target_named
from dbkernels.memory.measure import Prediction, predict, record
from dbkernels.memory.units import bytes_from, in_words


def require_within(
    step: Callable[[], object],
    *,
    model: nn.Module,
    optimizers: Sequence[Optimizer] = (),
    inputs: Sequence[Tensor] = (),
    ceiling: int | str,
    target: str = "cpu",
) -> Prediction:
    """Hold a training step to a ceiling. It runs twice, and the second time is followed.

    The first time makes the optimizers' state, which every later step finds there.

    Args:
        step:        on the CPU, with real tensors, or with fake ones and their mode on
        model:       what it trains
        optimizers:  that it steps
        inputs:      tensors of the caller that stay alive
        ceiling:     bytes, or a number and its unit such as "1.5 GiB"
        target:      device whose allocator and workspaces are predicted, such as h100
    Returns:
        The prediction of the step.
    Raises:
        AssertionError: it needs more; the message has what is alive at the peak, by category.
        ValueError: the model is not on the CPU, or an argument has a value that it cannot have.
    """
    # pytest's name for "show the caller's line instead"
    __tracebackhide__ = True
    limit = bytes_from(ceiling, name="ceiling") if isinstance(ceiling, str) else ceiling
    devices = sorted({str(t.device) for t in (*model.parameters(), *model.buffers())})
    if devices != ["cpu"]:
        raise ValueError(f"model must be on the CPU, got one on {', '.join(devices) or 'nothing'}")
    device = target_named(target)
    step()
    owned = partial(record, model=model, optimizers=optimizers, inputs=inputs)
    found = predict(owned(step, workspace=device.workspace), device)
    if found.peak_allocated_bytes > limit:
        raise AssertionError(_excess(found, limit))
    return found


def _excess(found: Prediction, limit: int) -> str:
    peak = found.peak_allocated_bytes
    lines = [
        f"the step needs {in_words(peak)} at its peak ({found.at}), "
        f"{in_words(peak - limit)} more than the ceiling of {in_words(limit)}:"
    ]
    for name, size in sorted(found.by_category.items(), key=lambda part: -part[1]):
        if size:
            lines.append(f"  {name.replace('_', ' '):<18} {in_words(size):>10}  {size / peak:4.0%}")
    return "\n".join(lines)
