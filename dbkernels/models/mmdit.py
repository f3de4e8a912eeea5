"""A diffusion transformer that denoises an image or a latent, given the embeddings of a text.

    c = noise(t) + pooled(text)
    x = patches(input),  y = W_text text
    x, y = joint(x, y, c)              in the first layers: two streams, one attention over both
    [y ; x] = parallel([y ; x], c)     in the others: one stream, attention beside the MLP
    F = unpatchify(W ((1 + scale) * norm(x) + shift) + b)

Esser et al. 2024 (arXiv:2403.03206), SD3, section 4; the parallel layers and the rotary positions
are those of Flux. The text was embedded before: no encoder is here. Every block reads the text's
embeddings anew, through its own layers alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from dbkernels.data.captions import CaptionedImages, open_captions, read_prompts
from dbkernels.data.formats import Images
from dbkernels.data.image_folder import Convert
from dbkernels.data.images import Batch
from dbkernels.data.made_up import Field
from dbkernels.diffusion.path import PathName
from dbkernels.diffusion.prediction import PredictionName, prediction_named
from dbkernels.models import embed
from dbkernels.models.branches import initialise_linear
from dbkernels.models.denoiser import ImageDenoiser
from dbkernels.models.image_config import ImageConfig, check_no_stride
from dbkernels.models.joint_layer import JointConfig, JointLayer
from dbkernels.models.parallel_layer import ParallelConfig, ParallelLayer
from dbkernels.models.rotary import axis_table

if TYPE_CHECKING:  # a Python of 3.10 has none
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig(ImageConfig):
    """A transformer of images and texts; the condition is as wide as the residual stream."""

    patch: int = 2
    channels: int = 16
    parallel: int
    """Layers, the last ones, that are parallel; those before them are joint."""
    text_length: int
    """Tokens of a text."""
    text_dim: int
    """Width of the embeddings of a text's tokens."""
    pooled_dim: int = 0
    """Width of the embedding of all of a text; 0 where there is none."""
    mlp_ratio: int = 4
    """Width of the MLP's hidden layer over dim."""
    qk_norm: bool = True
    """RMS norms of queries and keys."""
    process: PathName = "flow"
    """As that of a DiT."""
    prediction: PredictionName = "velocity"
    """What the network predicts, of those that `PREDICTIONS` has for the process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        prediction_named(self.process, self.prediction, self.sigma_data)
        if not 0 <= self.parallel <= self.depth:
            raise ValueError(f"parallel must be from 0 to depth {self.depth}, got {self.parallel}")
        for name, least in (("text_length", 1), ("text_dim", 1), ("pooled_dim", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.dim // self.num_heads % 4:
            raise ValueError(
                "a head must have a width that 4 divides, for positions along two axes, "
                f"got {self.dim} / {self.num_heads}"
            )

    @property
    def tokens(self) -> int:
        """Of an image and its text together."""
        return super().tokens + self.text_length

    def resized(self, sizes: dict[str, int]) -> "Self":
        """With other sizes, by field; fewer layers have fewer parallel ones, in proportion."""
        if "depth" in sizes:
            share = self.parallel * sizes["depth"] // self.depth
            sizes = {"parallel": share, **sizes}
        return replace(self, **sizes)

    def find(self, source: str, *, convert: Convert = "none") -> CaptionedImages:
        """The training split of data that the model may not fit yet, as `open_captions`."""
        _check_no_convert(convert)
        return open_captions(source)

    def fitted(self, data: CaptionedImages, sizes: dict[str, int] | None = None) -> "Self":
        """With the sizes of some data's images and embeddings, and other sizes by field.

        Raises:
            ValueError: images are not square, or the patch does not divide them.
        """
        length, width = data.text_shape
        of_data = {"text_length": length, "text_dim": width, "pooled_dim": data.pooled_dim}
        return self.resized((sizes or {}) | self.sized(data.image_shape) | of_data)

    def open(
        self,
        source: str,
        split: Literal["train", "test"],
        *,
        convert: Convert = "none",
        stride: int = 0,
    ) -> CaptionedImages:
        """A split of the data that the model is for, as `open_captions`.

        Raises:
            ValueError: images or embeddings have another shape, stride is not 0, or as
                `open_captions`.
        """
        check_no_stride(stride)
        _check_no_convert(convert)
        data = open_captions(source, split)
        self.check_fits(source, split, data.image_shape)
        self._check_of_text(source, data.arrays())
        return data

    def prompts(self, source: Path | None, device: torch.device | str) -> Batch:
        """Texts of an .npz, (N, S, E) and (N, P), that fit the model, as a batch.

        Raises:
            ValueError: there is no source, or it does not fit.
        """
        if source is None:
            raise ValueError(
                "prompts must be an .npz of embeddings for a model of images and texts, got none"
            )
        found = read_prompts(source)
        self._check_of_text(source, found)
        return {name: tensor.to(device) for name, tensor in found.items()}

    def _check_of_text(self, source: str | Path, arrays: Mapping[str, Images | Tensor]) -> None:
        """ValueError where the embeddings in a source are not those that the model is made for."""
        wanted = {name: field.shape for name, field in self.fields().items() if name != "image"}
        shapes = {name: tuple(a.shape[1:]) for name, a in arrays.items() if name != "image"}
        made_for = "as the model is made for, got"
        if list(shapes) != list(wanted):
            raise ValueError(
                f"{source} must have {' and '.join(wanted)}, {made_for} {' and '.join(shapes)}"
            )
        for name, shape in shapes.items():
            if shape != wanted[name]:
                sizes, own = (", ".join(map(str, ("N", *each))) for each in (wanted[name], shape))
                raise ValueError(f"{name} of {source} must be ({sizes}), {made_for} ({own})")

    def fields(self) -> dict[str, Field]:
        """What a sample holds: an image or a latent, and the embeddings of its text."""
        found = super().fields()
        found["text"] = Field((self.text_length, self.text_dim), torch.float32)
        if self.pooled_dim:
            found["pooled"] = Field((self.pooled_dim,), torch.float32)
        return found


def _check_no_convert(convert: Convert) -> None:
    if convert != "none":
        raise ValueError(f"convert must be none where data is no folder of images, got {convert}")


LATENTS = {"image_size": 128, "text_length": 512}  # of 1024 pixels by 1024, and a prompt of Flux
PRESETS = {
    "small": MMDiTConfig(
        dim=64, depth=6, num_heads=4, parallel=3,
        image_size=8, channels=4, text_length=8, text_dim=32, pooled_dim=16,
    ),
    # sizes of Flux.1 and, with modulations of each layer's own, about those of Flux.2
    "flux-12b": MMDiTConfig(
        dim=3072, depth=57, num_heads=24, parallel=38, text_dim=4096, pooled_dim=768, **LATENTS
    ),
    "dit-32b": MMDiTConfig(
        dim=6144, depth=46, num_heads=48, parallel=38, channels=32, text_dim=15360, **LATENTS
    ),
}  # fmt: skip


class MMDiT(ImageDenoiser):
    """The family of images and texts: z is (B, C, H, W), a prediction the denoised image."""

    presets, smallest = PRESETS, "small"

    def __init__(self, config: MMDiTConfig):
        super().__init__(config)
        D, pixels = config.dim, config.channels * config.patch**2
        self.patch, self.text = embed.Linear(pixels, D), embed.Linear(config.text_dim, D)
        self.condition = embed.NoiseEmbedding(D)
        self.pooled = embed.VectorEmbedding(config.pooled_dim, D) if config.pooled_dim else None
        sizes = {
            "dim": D,
            "num_heads": config.num_heads,
            "mlp_hidden": config.mlp_ratio * D,
            "cond_dim": D,
            "qk_norm": config.qk_norm,
            "recompute": config.recompute,
        }
        joint, parallel = JointConfig(**sizes), ParallelConfig(**sizes)
        self.layers = nn.ModuleList(
            JointLayer(joint) if index < config.depth - config.parallel else ParallelLayer(parallel)
            for index in range(config.depth)
        )
        self.modulation = embed.FinalModulation(D, D)
        self.head = embed.Linear(D, pixels)
        self._initialise()

    def _initialise(self) -> None:
        for layer in self.layers:
            layer.initialise(nn.init.xavier_uniform_)
        for linear in (self.patch, self.text):
            initialise_linear(linear, nn.init.xavier_uniform_)
        initialise_linear(self.head, nn.init.zeros_)

    def z_shape(self, batch: Batch) -> tuple[int, ...]:
        """(B, C, H, W), from batch["text"]."""
        config = self.config
        return len(batch["text"]), config.channels, config.image_size, config.image_size

    def level_shape(self, batch: Batch) -> tuple[int, ...]:
        """(B,)."""
        return (len(batch["text"]),)

    def network(self, scaled: Tensor, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """F of what the prediction makes of z, (B, C, H, W)."""
        x, context, c = self.stem(scaled, level, batch["text"], batch.get("pooled"))
        x = self._run([self.layers[index] for index in layers], x, context, c)
        return self.tail(x, c)

    def stem(
        self, scaled: Tensor, level: Tensor, text: Tensor, pooled: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the first layer reads: image (B, T, D), text (B, S, D) and condition (B, D)."""
        c = self.condition(self.prediction.path.condition(level))
        if self.pooled is not None:
            c = c + self.pooled(pooled)
        return self.patch(embed.patchify(scaled, self.config.patch)), self.text(text), c

    def _run(self, layers: Sequence[nn.Module], x: Tensor, context: Tensor, c: Tensor) -> Tensor:
        """The image's tokens (B, T, D) after some layers of either kind, in any order."""
        rotary, lengths = self._rotary(x.device), [context.shape[1], x.shape[1]]
        both: Tensor | None = None  # of one stream, while parallel layers run
        for layer in layers:
            if isinstance(layer, JointLayer):
                if both is not None:
                    (context, x), both = both.split(lengths, dim=1), None
                x, context = layer(x, context, c, rotary)
            else:
                both = torch.cat([context, x], dim=1) if both is None else both
                both = layer(both, c, rotary)
        # what is compiled for the last layers of one kind then serves those of the other
        return x if both is None else both.split(lengths, dim=1)[1].contiguous()

    def _rotary(self, device: torch.device) -> Tensor:
        """(2, S + T, d): a text's tokens lie at the origin, patches at their row and column."""
        config = self.config
        side = config.image_size // config.patch
        places = torch.arange(side, device=device)
        grid = torch.stack(torch.meshgrid(places, places, indexing="ij"), -1).flatten(0, 1)
        origin = grid.new_zeros((config.text_length, 2))
        return axis_table(torch.cat([origin, grid]), config.dim // config.num_heads)

    def unconditional(self, batch: Batch) -> Batch:
        """The batch with zeros for what is known of each text, for guidance."""
        empty = {
            name: torch.zeros_like(batch[name]) for name in ("text", "pooled") if name in batch
        }
        return {**batch, **empty}


def prompts(
    config: MMDiTConfig, source: Path | None, count: int, device: torch.device | str
) -> Batch:
    """What asks for so many images of every text of an .npz, in the order of the texts."""
    found = config.prompts(source, device)
    return {name: tensor.repeat_interleave(count, dim=0) for name, tensor in found.items()}
