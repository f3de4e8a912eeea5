"""`python -m dbkernels profile`."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dbkernels.cli import budgets
from dbkernels.cli.device import pick_device
from dbkernels.cli.preset_run import preset_run
from dbkernels.cli.profile_measured import measured
from dbkernels.cli.profile_rows import (
    METHODS,
    OFFLOAD,
    Case,
    cases,
    check_names,
    check_recompute,
    predicted,
    rows,
)
from dbkernels.cli.profile_tables import measured_table, not_measured, predicted_tables
from dbkernels.memory.picture import draw
from dbkernels.memory.timeline import write_timeline
from dbkernels.memory.workspace import Target, target_named, target_of
from dbkernels.models.registry import DEFAULT_FAMILY, FamilyName
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.training.partition import partition
from dbkernels.training.run import RunConfig


@dataclass(frozen=True)
class Profile:
    """Predict the peak memory and the operations of one training step; needs no GPU.

    Every method, recompute policy and number of blocks has a row, with all blocks on the
    device and with one. With --measure the same steps are run for real beside it.
    """

    family: FamilyName = DEFAULT_FAMILY
    """vit classifies images; dit generates them."""
    preset: str = "digits"
    """Sizes of the model; vit: cifar100, digits; dit: S/2, B/2, L/2, XL/2, digits."""
    batch: int = 128
    """Samples of a step; made up, of the preset's shape."""
    num_blocks: str = "1,2,3,4,6"
    """Numbers of blocks with commas between."""
    methods: str = ",".join(METHODS)
    """What is trained, with commas between; all but block_fused run the layer in plain torch."""
    recompute: str = ",".join(POLICIES)
    """What the fused layer's backward computes again: from most memory to most arithmetic."""
    offload: str = ",".join(OFFLOAD)
    """none: all blocks and their optimizers' state are on the device; cpu: one block at a time."""
    budget: float = 0.5
    """Share of its activations that the compiled baseline may keep."""
    autocast: bool = False
    """Compute in bfloat16; parameters stay float32."""
    optimizer_in_backward: bool = False
    """Update each parameter as soon as the backward has its gradient, and free the gradient."""
    target: str = "auto"
    """The device that is predicted: cpu, a100, h100, h200, b200; auto is h100, or the measured."""
    measure: bool = False
    """Run the steps for real too; on a CPU compiled code, and one block at a time, are not."""
    steps: int = 5
    """Steps that are timed, of every block, where they are run."""
    device: str = "auto"
    """Where they are run: auto, cpu or cuda; auto is an NVIDIA GPU where there is one."""
    timeline: Path | None = None
    """Write the one step that is asked for as a snapshot for pytorch.org/memory_viz."""
    picture: Path | None = None
    """Draw the one step that is asked for: live bytes by category, op after op; .png, .svg."""
    check: Path | None = None
    """Predict the rows of this file of budgets instead; fail where a peak has grown by 1 %."""
    update: bool = False
    """With a file to check: write the peaks of now into the file instead of failing."""
    write: Path | None = None
    """Put the rows that are asked for into this file of budgets, beside those that it has."""
    json: bool = False
    """Print one JSON object a line instead of tables."""

    def run(self) -> None:
        if self.update and not self.check:
            raise ValueError("update must come with check and its file, got none")
        if self.check:
            budgets.check(self.check, update=self.update, as_json=self.json)
            return
        if self.batch < 1 or self.steps < 1:
            raise ValueError(
                f"batch and steps must be at least 1, got batch {self.batch} and steps {self.steps}"
            )
        if not 0 <= self.budget <= 1:
            raise ValueError(f"budget must be from 0 to 1, got {self.budget}")
        offload = check_names("offload", self.offload, OFFLOAD)
        todo, config, target = self._cases(), self._config(), self._target()
        for case in todo:
            partition(config.model.depth, case.num_blocks, config.prior)
        if self.timeline or self.picture:
            self._show(todo, offload, config, target)
        common = {
            "family": self.family,
            "preset": self.preset,
            "batch": self.batch,
            "autocast": self.autocast,
            "optimizer_in_backward": self.optimizer_in_backward,
            "target": target.name,
        }
        found, predictions = [], rows(todo, config, offload, budget=self.budget, target=target)
        # no step is timed while another process predicts
        for row in list(predictions) if self.measure else predictions:
            found.append({**common, **row})
            if self.measure:
                found[-1] |= self._measured(row, config)
            if self.json:
                print(json.dumps(found[-1]), flush=True)
        if self.write:
            budgets.write(self.write, found)
        if not self.json:
            tables = measured_table(found) if self.measure else predicted_tables(found)
            for table in tables:
                Console().print(table)
            for sentence in not_measured(found):
                Console(highlight=False).print(sentence, markup=False)

    def _cases(self) -> list[Case]:
        try:
            counts = dict.fromkeys(int(count) for count in self.num_blocks.split(","))
        except ValueError:
            raise ValueError(
                f"num_blocks must be whole numbers with commas between, got {self.num_blocks}"
            ) from None
        methods = check_names("methods", self.methods, METHODS)
        return cases(methods, list(counts), check_recompute(self.recompute))

    def _config(self) -> RunConfig:
        return preset_run(
            self.family,
            self.preset,
            batch=self.batch,
            autocast=self.autocast,
            optimizer_in_backward=self.optimizer_in_backward,
        )

    def _target(self) -> Target:
        if self.target != "auto":
            if self.measure:
                raise ValueError(f"target must be auto for measure, got {self.target}")
            return target_named(self.target)
        return target_of(pick_device(self.device)) if self.measure else target_named("h100")

    def _show(self, todo: list[Case], offload: list[str], config: RunConfig, target: Target):
        if len(todo) * len(offload) != 1:
            raise ValueError(
                "timeline and picture show one step: methods, num_blocks, recompute and offload "
                f"must leave, got {len(todo) * len(offload)}"
            )
        case = todo[0]
        prediction = predicted(case, config, budget=self.budget, target=target)[offload[0]]
        if self.timeline:
            write_timeline(self.timeline, prediction)
        if self.picture:
            recompute = f", recompute {case.recompute}" if case.recompute else ""
            title = f"{self.family} {self.preset}, batch {self.batch}: {case.method}{recompute}"
            draw(self.picture, prediction, title=f"{title}, {_blocks(case.num_blocks)}")

    def _measured(self, row: dict[str, object], config: RunConfig) -> dict[str, object]:
        """What the row's steps take for real, under names of their own; nothing if they cannot."""
        device = pick_device(self.device)
        # a CPU's memory also holds the blocks off the device, and the tracker sees no compiled code
        unseen = row["method"] == "compiled" or row["offload"] == "cpu"
        if unseen and device.type == "cpu":
            return {}
        case = Case(row["method"], row["num_blocks"], row["recompute"])
        settings = {"budget": self.budget, "steps": self.steps, "device": device}
        return measured(case, row["offload"], config, **settings)


def _blocks(count: int) -> str:
    return f"{count} block{'s' if count > 1 else ''}"
