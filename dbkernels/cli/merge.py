"""`python -m dbkernels merge`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from dbkernels.training.merge import merge


@dataclass(frozen=True)
class Merge:
    """Unite blocks that `train --block` has trained, each in a job of its own, as one run."""

    run_dir: Positional[Path]
    """Directory that holds block0, block1, ..."""

    def run(self) -> None:
        print(f"united the blocks: {merge(self.run_dir)}")
