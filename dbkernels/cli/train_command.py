"""The command that trains a run: the flags of a configuration that are not what `train` has."""

from collections.abc import Iterator
from dataclasses import fields
from shlex import quote

from dbkernels.cli.noise_flags import NoiseFlags, PriorFlags
from dbkernels.cli.text_flags import TextFlags
from dbkernels.cli.train import Train, TrainerFlags
from dbkernels.models.registry import FamilyEntry, ModelConfig, family_named
from dbkernels.training.lora_config import NO_LORA
from dbkernels.training.optimizers.decay import DecayOn
from dbkernels.training.run_config import PartitionConfig, RunConfig
from dbkernels.training.trainer_config import TrainerConfig

SIZES = "patch", "dim", "depth", "num_heads", "length"
# what decides no number is left to whoever types the command, as OUT is
AS_GIVEN = "data", "convert", "stride", "label_drop", "mirror", "shift", "rand_augment", "objective"
FITTED = "image_size", "channels", "num_classes", "vocabulary"  # to the data, by no flag
DECAY_ON: DecayOn = TrainerConfig.decay_on


def train_command(config: RunConfig) -> str:
    """The command of a run that starts anew, with OUT for its directory.

    A network that it starts from is named as it was for the run.

    Args:
        config:  of the run; its sizes are those of a preset but for what flags change
    """
    entry, model = family_named(config.family), config.model
    preset, flags = "", list(_model_flags(model, entry.model.preset("")))
    for name, own in entry.model.presets.items():
        # the preset that takes the fewest flags
        if len(more := list(_model_flags(model, own))) < len(flags):
            preset, flags = name, more
    words = ["--preset", preset] if preset else []
    if config.start.source:
        # its sizes are the model's
        words, flags = ["--from", config.start.source], []
        flags += [("distill", config.start.distill)] if config.start.distill else []
    flags += list(_other_flags(config, entry))
    for name, value in flags:
        words += _words(name, value)
    program = f"python -m dbkernels train {config.family}"
    return " ".join([program, *map(quote, words), "--out OUT"])


def _model_flags(model: ModelConfig, preset: ModelConfig) -> Iterator[tuple[str, object]]:
    sizes = {name: getattr(model, name) for name in SIZES if hasattr(model, name)}
    changed = {name: size for name, size in sizes.items() if size != getattr(preset, name)}
    yield from changed.items()
    # what is in proportion to a size has changed with it
    own = preset.resized({n: getattr(model, n) for n in FITTED if hasattr(model, n)} | changed)
    named = [each.name for flags in (TextFlags, NoiseFlags) for each in fields(flags)]
    for name in named:
        if hasattr(model, name) and getattr(model, name) != getattr(own, name):
            yield name, getattr(model, name)


def _other_flags(config: RunConfig, entry: FamilyEntry) -> Iterator[tuple[str, object]]:
    usual = {each.name: each.default for each in fields(Train)}
    yield from ((n, v) for n in AS_GIVEN if (v := getattr(config, n)) != usual[n])
    if config.model.recompute != "none":
        yield "recompute", config.model.recompute
    if config.weighting != entry.weighting:
        yield "weighting", config.weighting
    for each in fields(config.lora):
        if (value := getattr(config.lora, each.name)) != getattr(NO_LORA, each.name):
            yield ("lora" if each.name == "rank" else f"lora_{each.name}"), value
    yield "num_blocks", config.partition.num_blocks
    for each in fields(PartitionConfig):
        value = getattr(config.partition, each.name)
        if each.name != "num_blocks" and value != each.default:
            yield each.name, value
    prior, own = config.prior, entry.process_of(config.model)
    for each in fields(PriorFlags):
        if hasattr(prior, each.name) and getattr(prior, each.name) != getattr(own, each.name):
            yield each.name, getattr(prior, each.name)
    for each in fields(TrainerFlags):
        default = DECAY_ON if each.name == "decay_on" else each.default
        if (value := getattr(config.trainer, each.name)) != default:
            yield each.name, value


def _words(name: str, value: object) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    text = str(value)
    # a number below zero would be read as a flag
    return [f"--{flag}={text}"] if text.startswith("-") else [f"--{flag}", text]
