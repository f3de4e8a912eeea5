"""Write recorded.json anew, after a change that moves numbers on purpose: the change says why.

    python tests/golden/record.py

Every capability of torch that this processor has is recorded. Digests of other environments stay
where no number and no digest of this machine has moved, and are dropped where one has.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from golden import configurations, recording  # noqa: E402

CAPABILITIES = ("default", "avx2", "avx512")  # as ATEN_CPU_CAPABILITY names them
HERE = "--here"  # prints the runs of this process's environment, as JSON


def measured(threads: int, *, plain: bool) -> dict[str, dict | str]:
    """Numbers and digests of all runs by key, and their environment."""
    row = {"numbers": {}, "digests": {}}
    settled, torch_alone = configurations.settled(threads), configurations.plain_torch(plain)
    with settled, torch_alone, TemporaryDirectory() as directory:
        row["environment"] = recording.environment(configurations.implementation_name())
        for index, key in enumerate(configurations.CONFIGURATIONS):
            (place := Path(directory) / str(index)).mkdir()
            done = configurations.run(key, place)
            row["numbers"][key] = recording.numbers(done)
            row["digests"][key] = recording.digests(done)
    return row


def measure(capability: str) -> list[dict]:
    """What a process of its own measures."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    setting = {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": path}
    # two threads that spin while they wait take minutes where a core is busy with something else
    setting["OMP_WAIT_POLICY"] = "passive"
    command = [sys.executable, __file__, HERE]
    done = subprocess.run(command, env=os.environ | setting, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def moved(before: dict[str, dict], after: dict[str, dict]) -> list[str]:
    """What a new fixture says that the one before it did not, one line each."""
    lines = []
    old, new = before["numbers"], after["numbers"]
    for key in [key for key in old if key not in new]:
        lines.append(f"{key}: gone")
    for key in new:
        if key not in old:
            lines.append(f"{key}: new")
        elif new[key] != old[key]:
            lines.append(f"{key}: numbers moved by {recording.difference(new[key], old[key]):.1e}")
    for environment, runs in after["bits"].items():
        known = before["bits"].get(environment)
        if known is None:
            lines.append(f"{environment}: new")
            continue
        for key in [key for key in runs if key in known]:
            groups = [g for g in runs[key] if runs[key][g] != known[key].get(g)]
            if groups:
                lines.append(f"{environment}: {key}: other bits in {', '.join(groups)}")
    return lines


def main() -> None:
    if HERE in sys.argv:
        # the digests are those of one thread, which come first, and of these plain torch's
        rows = [measured(threads, plain=plain) for threads in (1, 2) for plain in (True, False)]
        return json.dump(rows, sys.stdout)
    rows = [row for capability in CAPABILITIES for row in measure(capability)]
    numbers, bits = rows[0]["numbers"], {}
    for row in rows:
        bits.setdefault(row["environment"], row["digests"])
    after = {"numbers": numbers, "bits": bits}
    empty = {"numbers": {}, "bits": {}}
    before = recording.read() if recording.FIXTURE.exists() else empty
    lines = moved(before, after)
    if all(line.endswith("new") for line in lines):
        after["bits"] = before["bits"] | bits
    dropped = before["bits"].keys() - after["bits"].keys()
    lines += [f"{environment}: dropped" for environment in sorted(dropped)]
    recording.FIXTURE.write_text(recording.written(after))
    print("\n".join(lines) or "nothing moved")
    for key in numbers:
        spread = max(recording.difference(row["numbers"][key], numbers[key]) for row in rows)
        print(f"{key}: the environments of this machine differ by {spread:.1e}")


if __name__ == "__main__":
    main()
