"""What cutting a model of text into blocks costs in arithmetic and saves in activations, counted.

A language model in blocks reads each text twice, as clean tokens and as noisy ones, and every block
has a head's work of its own. One line or row is one way of training, in numbers of one token:

    layers_flops  of a sweep: a step of every block, so that each layer is updated once
    head_flops    of the same sweep, of the products with the table of words
    kept_units    numbers that a step of the costliest block keeps for its backward, over dim

All of it is counted as the steps are followed on tensors that hold nothing: torch's formulas say
what matmuls and attention take, and elementwise ops count as none.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from machine import machine
from program import Known, Program, called, main
from show import Row

from dbkernels.memory.allocator import target_named
from dbkernels.models.registry import FAMILIES
from dbkernels.planning.dry_run import dry_run, sweep_flops
from dbkernels.planning.recipe import Recipe, of_preset

# by family, how blocks may be trained, as settings of the model; "" is the paper's way
MODES = {
    "ar": {
        "": {"next_token_weight": 0.0},
        "next-token loss": {"next_token_weight": 1.0},
        "clean stream through all, next-token loss": {"next_token_weight": 1.0, "clean": "through"},
    }
}
TEXT = tuple(name for name, entry in FAMILIES.items() if entry.text)


class Ordinary(Recipe):
    """The model without noise, of the fused layers that models in blocks have too."""

    objective = "conventional"


@dataclass(frozen=True)
class Options(Program):
    """Count what models of text in blocks compute and keep, beside the model end to end."""

    family: str = "ar"  # of text: mdm, ar, ...
    preset: str = ""  # of the family; empty is the smallest
    words: tuple[int, ...] = ()  # vocabularies; without any, the preset's own
    batch: int = 64  # samples of a step, made up
    num_blocks: tuple[int, ...] = (1, 2, 4)

    def __post_init__(self):
        self.require_positive("batch", "threads")
        self.require_known(family=TEXT)
        self.ways()  # refuses numbers of blocks that there cannot be

    def ways(self) -> list[tuple[str, Recipe]]:
        """The mode of each way, and its recipe; the end-to-end model of each vocabulary first."""
        model = of_preset(self.family, self.preset or FAMILIES[self.family].model.smallest)
        model = replace(model, batch_size=self.batch, device=target_named("cpu"))
        ordinary = bool(FAMILIES[self.family].conventional)
        return [
            way
            for words in self.words or (model.model.vocabulary,)
            for recipe in [replace(model, model=replace(model.model, vocabulary=words))]
            for way in ([("", _ordinary(recipe))] if ordinary else []) + self._in_blocks(recipe)
        ]

    def _in_blocks(self, recipe: Recipe) -> list[tuple[str, Recipe]]:
        found = [
            (mode, replace(recipe, model=replace(recipe.model, **settings), num_blocks=count))
            for count in self.num_blocks
            for mode, settings in MODES.get(self.family, {"": {}}).items()
        ]
        # with one block nothing is before it
        return [(m, each) for m, each in found if each.model.independent or each.num_blocks > 1]

    def key_of(self, mode: str, recipe: Recipe) -> Row:
        """What a row is known by."""
        about = {"family": recipe.family, "preset": recipe.preset, "words": recipe.model.vocabulary}
        about |= {"batch": recipe.batch_size, "dtype": "float32"}
        ends = recipe.num_blocks == 1 and not mode
        same = recipe.objective == "conventional" or not FAMILIES[recipe.family].conventional
        method = "end_to_end" if ends and same else recipe.method
        way = {"method": method, "num_blocks": recipe.num_blocks, "mode": mode}
        return {"suite": "cost", **about, **way}

    def wanted(self) -> list[Row]:
        return [self.key_of(*way) for way in self.ways()]

    def tables(self, known: Known) -> Iterator[Iterable[Row]]:
        about = machine(torch.device("cpu")) | {"device": "any device", "command": called()}
        todo = [way for way in self.ways() if known.lacks(self.key_of(*way))]
        for words in dict.fromkeys(recipe.model.vocabulary for _, recipe in todo):
            some = [way for way in todo if way[1].model.vocabulary == words]
            yield (self.key_of(*way) | cost_of(way[1]) | about for way in some)


def _ordinary(recipe: Recipe) -> Recipe:
    return Ordinary(**{name: getattr(recipe, name) for name in recipe.__dataclass_fields__})


def cost_of(recipe: Recipe) -> Row:
    """Operations and kept numbers of one token."""
    model, tokens = recipe.model, recipe.batch_size * recipe.model.length
    every = sweep_flops(recipe)
    # with twice the words the head takes twice as much, and nothing else takes more
    wider = replace(recipe, model=replace(model, vocabulary=2 * model.vocabulary))
    head = sweep_flops(wider) - every
    # with twice the samples their share is kept twice, and that of the step once
    larger = replace(recipe, batch_size=2 * recipe.batch_size)
    few, many = (dry_run(each)["none"].saved_bytes for each in (recipe, larger))
    return {
        "layers_flops": (every - head) / tokens,
        "head_flops": head / tokens,
        "sweep_flops": every / tokens,
        "kept_units": (many - few) / tokens / model.dim / torch.float32.itemsize,
    }


if __name__ == "__main__":
    main(Options)
