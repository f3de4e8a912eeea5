"""What the rest of the package asks of the sizes of a model, of whatever family."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from dbkernels.data.image_folder import Convert
from dbkernels.data.images import Data
from dbkernels.data.made_up import Field
from dbkernels.ops.layer.recompute import Recompute

if TYPE_CHECKING:  # a Python of 3.10 has none
    from typing_extensions import Self


OwnData = Any  # `Data` of the kind that a configuration finds


class ModelConfig(Protocol):
    """Sizes of a model, a frozen dataclass.

    independent:  as that of `Family`
    tokens:       of a sample, as the layers see it, or nearly as many
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def independent(self) -> bool: ...

    @property
    def tokens(self) -> int: ...

    @property
    def dim(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def recompute(self) -> Recompute: ...

    @classmethod
    def stored(cls, fields: dict[str, Any], version: int) -> "Self":
        """The configuration in a run's config.json, of the version that the file has."""

    def as_in(self, stored: "Self") -> "Self":
        """With what a stored run has and nobody chooses."""

    def resized(self, sizes: dict[str, int]) -> "Self":
        """With other sizes by field; what is in proportion to one of them changes with it."""

    def find(self, source: str, *, convert: Convert) -> Data:
        """The training split of the data under a name or a path, which may not fit the model."""

    def fitted(self, data: OwnData, sizes: dict[str, int] | None = None) -> "Self":
        """With what the data say of a model for them, and at once with other sizes by field."""

    def open(
        self,
        source: str,
        split: Literal["train", "test"],
        *,
        convert: Convert = "none",
        stride: int = 0,
    ) -> Data:
        """A split of the data under a name or a path, which fits the model."""

    def keep(self, source: str, directory: Path) -> None:
        """Write into a run's directory what its samples are read with, if that is not there."""

    def fields(self) -> dict[str, Field]:
        """What a sample of its data holds, by name."""
