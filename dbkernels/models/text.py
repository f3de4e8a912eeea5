"""What models of text share: their sizes, their tables of tokens, and the head over the words."""

from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch

from dbkernels.data.image_folder import Convert
from dbkernels.data.made_up import Field
from dbkernels.data.tokenizer import FILE
from dbkernels.data.tokens import TokenData, open_tokens
from dbkernels.models.layer import LayerConfig
from dbkernels.ops.layer.recompute import Recompute
from dbkernels.settings import check_choice
from dbkernels.whole_file import write_whole

if TYPE_CHECKING:  # a Python of 3.10 has none
    from typing_extensions import Self


CleanStream = Literal["own", "through"]
Guesser = Literal["block", "network"]
NoisyInput = Literal["z", "z_and_clean", "map_and_clean"]
ReadOut = Literal["paper", "posterior"]
LevelsOf = Literal["sample", "token"]


@dataclass(frozen=True)
class TextConfig:
    """What the configurations of models of text share."""

    dim: int
    """Width of the residual stream."""
    depth: int
    """Number of layers."""
    num_heads: int
    """Of the attention; divides dim."""
    _: KW_ONLY
    mlp_hidden: int
    """Width of the MLP's hidden layer."""
    cond_dim: int
    """Width of the condition."""
    length: int
    """Tokens of a window."""
    vocabulary: int
    """Tokens are 0 to vocabulary - 1."""
    recompute: Recompute = "none"
    """What the backward computes again: a key of `dbkernels.ops.POLICIES`; moves only rounding."""
    independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("length", "vocabulary"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def tokens(self) -> int:
        """Of a window."""
        return self.length

    @classmethod
    def stored(cls, fields: dict[str, Any], version: int) -> "Self":
        """The configuration in a run's config.json, of the version that the file has."""
        return cls(**fields)

    def as_in(self, stored: "Self") -> "Self":
        """With what a stored run has and nobody chooses."""
        return self

    def resized(self, sizes: dict[str, int]) -> "Self":
        """With other sizes by field; the MLP and the condition keep their ratios to dim."""
        if "dim" in sizes:
            kept = {
                k: getattr(self, k) * sizes["dim"] // self.dim for k in ("mlp_hidden", "cond_dim")
            }
            sizes = kept | sizes
        return replace(self, **sizes)

    def find(self, source: str, *, convert: Convert = "none") -> TokenData:
        """The training split of tokens of any vocabulary, as `open_tokens`.

        Raises:
            ValueError: convert is not none, or as `open_tokens`.
        """
        _require_no_images(convert)
        return open_tokens(source, length=self.length)

    def fitted(self, data: TokenData, sizes: dict[str, int] | None = None) -> "Self":
        """With the vocabulary of some data, and other sizes by field."""
        return self.resized((sizes or {}) | {"vocabulary": data.vocabulary})

    def open(
        self,
        source: str,
        split: Literal["train", "test"],
        *,
        convert: Convert = "none",
        stride: int = 0,
    ) -> TokenData:
        """Windows of a split, as `open_tokens`.

        Raises:
            ValueError: the vocabulary is another, convert is not none, or as `open_tokens`.
        """
        _require_no_images(convert)
        told = {"length": self.length, "vocabulary": self.vocabulary, "stride": stride}
        return open_tokens(source, split, **told)

    def keep(self, source: str, directory: Path) -> None:
        """The tokenizer of a directory of tokens, if it has one and the run has none yet."""
        of_data, kept = Path(source) / FILE, directory / FILE
        if of_data.is_file() and not kept.exists():
            write_whole(kept, of_data.read_text(encoding="utf-8"))

    def fields(self) -> dict[str, Field]:
        """What a sample holds: its tokens."""
        return {"token": Field((self.length,), torch.int64, self.vocabulary)}

    def layer(self) -> LayerConfig:
        """One layer, as in Llama: RMS norms, SwiGLU, no biases."""
        sizes = self.dim, self.num_heads, self.mlp_hidden, self.cond_dim
        told = {"norm": "rms", "mlp": "swiglu", "bias": False, "recompute": self.recompute}
        return LayerConfig(*sizes, **told)


@dataclass(frozen=True, kw_only=True)
class NoisyTextConfig(TextConfig):
    """What those share whose tokens are embeddings with noise, as wide as the stream."""

    sigma_data: float = 0.5
    """Standard deviation of the clean target that the preconditioning assumes."""
    read_out: ReadOut = "paper"
    """What gives the logits: a head alone, or one that adds what the noisy token itself tells."""
    levels_of: LevelsOf = "sample"
    """Whether each sample has one level of noise, or each token one of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("read_out", ReadOut), ("levels_of", LevelsOf)):
            check_choice(name, getattr(self, name), get_args(known))


def _require_no_images(convert: Convert) -> None:
    if convert != "none":
        raise ValueError(f"convert must be none where data is no folder of images, got {convert}")
