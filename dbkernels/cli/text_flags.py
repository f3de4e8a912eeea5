"""The flags of models of text, and whether a model has what was asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from dbkernels.diffusion.process import Process
from dbkernels.models.registry import ModelConfig
from dbkernels.models.text import CleanStream, Guesser, LevelsOf, NoisyInput, ReadOut


@dataclass(frozen=True)
class TextFlags:
    """How a model of text reads and is read; None keeps the preset's."""

    clean: CleanStream | None = None
    """own: a block reads earlier tokens through its own layers. through: through all those before
    them too, without a gradient."""
    noisy_input: NoisyInput | None = None
    """z: a noisy token is told apart from the clean ones, which it finds by attention. z_and_clean:
    it is added to the clean token before it, as that token's layers have left it. map_and_clean:
    the same by a map that starts at zero."""
    next_token_weight: float | None = None
    """Weight, in a block's loss, of guessing the next token without noise; 0 leaves it out."""
    next_token_from: Guesser | None = None
    """block: that guess is made at the block's own end. network: behind all layers, through those
    behind the block, which do not learn from it; needs clean through."""
    read_out: ReadOut | None = None
    """paper: a linear head. posterior: one that adds what the noisy token itself tells."""
    levels_of: LevelsOf | None = None
    """Whether each sample has one level of noise, or each token one of its own."""
    prelude: int | None = None
    """First layers, which read the tokens alone; those between prelude and coda run again."""
    coda: int | None = None
    """Last layers, which run once after the others."""
    recurrences: int | None = None
    """Without noise: mean of the rate at which layers run again in training, and how often they do
    in evaluation."""
    truncation: int | None = None
    """Without noise: the gradient passes through so many recurrences, the last ones."""

    def of(self, model: ModelConfig) -> ModelConfig:
        """A model with what was asked for.

        Raises:
            ValueError: it has no such setting, or one has a value that it cannot have.
        """
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        changed = {name: value for name, value in given.items() if value is not None}
        require_settings("the model", changed, model)
        return replace(model, **changed)


def require_settings(name: str, given: Mapping[str, object], config: ModelConfig | Process) -> None:
    """Whether a configuration has all settings that were given.

    Raises:
        ValueError: with the first that it has not.
    """
    known = [each.name for each in fields(config)]
    for setting, value in given.items():
        if setting not in known:
            told = f": {', '.join(known)}" if known else ", which has none"
            raise ValueError(f"{setting} is no setting of {name}{told}; got {value}")
