"""What is written down of a run, where, and when two runs count as the same.

numbers   losses; sum and sum of squares of every parameter: near on every machine
bits      digests of the same: equal where an environment was recorded
"""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from golden.configurations import Run, meant
from torch import Tensor

FIXTURE = Path(__file__).with_name("recorded.json")
ZERO = 1e-6  # elements of a parameter that are no larger on average count as zero


def numbers(run: Run) -> dict[str, list]:
    """What any machine can compare, of each group a list in the order of the steps or the model.

    A parameter is [elements, sum, sum of squares], added up in float64.
    """
    written = {
        "losses": [_rounded(loss) for loss in run.losses],
        "weights": _checksums(run.weights),
        "ema": _checksums(run.ema),
    }
    return {group: values for group, values in written.items() if values}


def digests(run: Run) -> dict[str, str]:
    """Of each group the first half of the sha256 of its bytes."""
    tensors = {
        "losses": [torch.tensor(run.losses, dtype=torch.float64)],
        "weights": run.weights.values(),
        "ema": run.ema.values(),
    }
    return {group: _digest(some) for group, some in tensors.items() if len(some)}


def environment(implementation: str) -> str:
    """Everything that decides bits, beside the package: the key of recorded digests.

    The last part is a digest of products and functions that torch computes with libraries which
    choose their code by the processor, whatever capability torch itself was told to use.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{torch.__version__} {capability} {implementation} {_probe()}"


def difference(actual: dict[str, list], expected: dict[str, list]) -> float:
    """Largest difference of two runs, as `numbers` gives them, relative to the size of each number.

    A loss is taken relative to the greatest of its run. A sum is taken relative to sqrt(n times the
    sum of squares), which bounds it for n elements, since elements of both signs cancel.

    Returns:
        Infinity where the runs have other steps or parameters, or something is not finite.
    """
    if _shape(actual) != _shape(expected):
        return math.inf
    scale = max(expected["losses"])
    pairs = zip(actual["losses"], expected["losses"], strict=True)
    found = [abs(a - e) / scale for a, e in pairs]
    for group in expected.keys() - {"losses"}:
        for a, (n, total, squares) in zip(actual[group], expected[group], strict=True):
            least = max(squares, n * ZERO**2)
            found += [abs(a[1] - total) / math.sqrt(n * least), abs(a[2] - squares) / least]
    return max(x if math.isfinite(x) else math.inf for x in found)


def read() -> dict[str, dict]:
    """The fixture: "numbers" by key, and "bits" by environment and key."""
    return json.loads(FIXTURE.read_text())


def written(fixture: dict[str, dict]) -> str:
    """The text of a fixture, one run of an environment a line."""
    parts = []
    for name, runs in fixture["numbers"].items():
        parts.append(f"  {json.dumps(name)}: {json.dumps(runs, separators=(',', ':'))}")
    bits = []
    for name, runs in sorted(fixture["bits"].items()):
        bits.append(f"  {json.dumps(name)}: {json.dumps(runs, separators=(',', ':'))}")
    join = ",\n".join
    return f'{{"numbers": {{\n{join(parts)}\n}}, "bits": {{\n{join(bits)}\n}}}}\n'


def _shape(numbers: dict[str, list]) -> dict[str, list]:
    sizes = {
        group: [values[0] for values in numbers[group]] for group in numbers.keys() - {"losses"}
    }
    return sizes | {"losses": len(numbers["losses"])}


def _checksums(tensors: dict[str, Tensor]) -> list[list[float]]:
    doubles = [meant(name, tensor).double() for name, tensor in tensors.items()]
    return [
        [x.numel(), _rounded(x.sum().item()), _rounded(x.square().sum().item())] for x in doubles
    ]


def _rounded(number: float) -> float:
    return float(f"{number:.8g}")


def _digest(tensors: Iterable[Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()[:32]


def _probe() -> str:
    x = (torch.arange(128 * 32, dtype=torch.float64) * 0.7).sin().view(128, 32).float()
    wide = x @ x[:96].T
    made = [wide, wide @ wide.T[:, :64], wide.softmax(-1), wide.tanh(), wide.erf(), wide.exp()]
    made += [(x.bfloat16() @ x[:96].T.bfloat16()).float(), x.T @ x]
    return _digest(made)[:8]
