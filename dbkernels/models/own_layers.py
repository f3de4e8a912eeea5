"""A family of somebody's own layers: a network that has them, and three functions around them.

    z0       the target: numbers, or of classes E[class] / |E[class]|, with a table E that is made
    x        = stem(p z)             then the layers of a block, each x -> x
    F        = head(x)               of numbers, or logits of classes
    estimate = of_z z + of_F F       of numbers; of classes softmax(logits) E^

p, of_z and of_F are those of `prediction.EDM`. The layers are told the noise level by a condition c
that is made of it: they take it beside x, or it is added to the tokens, or is one more token.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dbkernels.data.images import Batch
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.diffusion.prediction import EDM
from dbkernels.diffusion.process import Interval
from dbkernels.models.denoiser import scored
from dbkernels.models.embed import NoiseEmbedding
from dbkernels.models.family import Defaults
from dbkernels.models.taught import cross_entropy as taught_entropy
from dbkernels.models.taught import square_error
from dbkernels.models.vit import average
from dbkernels.ops.add_noise import add_noise
from dbkernels.ops.philox import Draw, stream_seed
from dbkernels.settings import check_choice, check_number

LevelAs = Literal["token", "sum", "condition"]
Target = Callable[[nn.Module, Batch], Tensor]
Stem = Callable[[nn.Module, Tensor, Batch], Tensor]
Head = Callable[[nn.Module, Tensor, Tensor, Batch], Tensor]
Condition = Callable[[nn.Module, Tensor, Batch], Tensor]
# below the least level a class is read off z, and a block need not look at what it is given
OF_CLASSES = LogNormal(sigma_min=0.4)
_LAYERS_STREAM = 2  # ends the key of what layers draw themselves


class OwnLayers(nn.Module):
    """A family that `DiffusionBlocks` trains, of a network's own layers and three functions.

    What random layers draw in training, such as dropout, is a function of the step too, but for
    CUDA graphs, and depends on how a batch is cut.

    A class of one's own with more methods of `Family` has what this has not: a head that never
    stores its logits (`loss` with `linear_cross_entropy`); guidance (`unconditional`); noise and
    predictions other than EDM's (`prediction`); a compiled stem and head (`stem_and_head`); steps
    that read layers of other blocks (`independent`). An entry in `FAMILIES` adds presets, and with
    them `profile`, `plan` and the command line.

    Args:
        net:           has the layers and all else that the functions use; every one of its
                       parameters is trained that requires a gradient
        target:        (net, batch) -> the clean target: float32 (B, *target_shape) without a
                       gradient, or of classes int64 (B, *target_shape)
        stem:          (net, z, batch) -> x, which the first layer reads: (B, T, dim), or of any
                       shape with level_as condition. z is (B, *target_shape), of classes (B,
                       *target_shape, dim); it has noise, and is scaled for the network
        head:          (net, x, c, batch) -> F, of the shape of the target, or logits (B,
                       *target_shape, num_classes); x is what the last layer of a block left
        dim:           width of the condition c (B, dim), of tokens and of embeddings of classes
        target_shape:  of one sample's target; () is one number or one class
        num_classes:   of the target; 0 where it is numbers
        layers:        name of the list of layers in net, an `nn.ModuleList` or `nn.Sequential`;
                       each keeps the shape of x
        level_as:      how layers learn the noise level. token: c is one more token, the last, which
                       the head does not see. sum: c is added to every token. Layers are called with
                       x alone then. condition: they are called with (x, c)
        condition:     (net, c, batch) -> c; adds to the condition what else layers are to know
        sigma_data:    standard deviation of the target
    Raises:
        ValueError: net has no such list of layers, or one that keeps statistics, mixes samples or
            is not called as level_as says, or a setting has a value that it cannot have.
    """

    stem_and_head = ()
    independent = True

    def __init__(
        self,
        net: nn.Module,
        *,
        target: Target,
        stem: Stem,
        head: Head,
        dim: int,
        target_shape: Sequence[int] = (),
        num_classes: int = 0,
        layers: str = "layers",
        level_as: LevelAs = "token",
        condition: Condition | None = None,
        sigma_data: float = 0.5,
    ):
        super().__init__()
        check_number("dim", dim, 1)
        check_number("num_classes", num_classes, 0)
        check_choice("level_as", level_as, get_args(LevelAs))
        if not isinstance(net, nn.Module):
            raise ValueError(f"net must be an nn.Module, got {type(net).__name__}")
        functions = {"target": target, "stem": stem, "head": head, "condition": condition}
        for name, function in functions.items():
            if not (callable(function) or (name == "condition" and function is None)):
                raise ValueError(f"{name} must be a function, got {type(function).__name__}")
        self.net, self._layers = net, layers
        self._target, self._stem, self._head, self._condition = target, stem, head, condition
        self.dim, self.target_shape, self.num_classes = dim, tuple(target_shape), num_classes
        self.level_as, self.sigma_data, self.prediction = level_as, sigma_data, EDM(sigma_data)
        _check_layers(net, layers, level_as)
        self.embedding = NoiseEmbedding(dim)
        self.target_parts = ("table",) if num_classes else ()
        if num_classes:
            self.table = nn.Embedding(num_classes, dim)
            nn.init.normal_(self.table.weight, std=0.02)

    @property
    def layers(self) -> nn.ModuleList:
        """The list of layers in net."""
        return cast(nn.ModuleList, self.net.get_submodule(self._layers))

    @property
    def defaults(self) -> Defaults:
        """What its blocks have where nobody says another."""
        if self.num_classes:
            return Defaults(OF_CLASSES, "none", self.metrics, average)
        return Defaults(LogNormal(), "process")

    def target(self, batch: Batch) -> Tensor:
        """As `Family.target`: numbers (B, *target_shape), or of classes their rows of the table."""
        found = self._clean(batch)
        return self._unit_table()[found] if self.num_classes else found

    def z_shape(self, batch: Batch) -> tuple[int, ...]:
        """(B, *target_shape), and dim more of classes."""
        return _count(batch), *self.target_shape, *([self.dim] if self.num_classes else [])

    def level_shape(self, batch: Batch) -> tuple[int, ...]:
        """(B,)."""
        return (_count(batch),)

    def denoise(self, z: Tensor, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """Logits, or the estimate of the target, from z at the levels (B,)."""
        wide = level.view(-1, *[1] * (z.dim() - 1))
        found = self._network(self.prediction.scale(wide) * z, level, layers, batch)
        if self.num_classes:
            return found
        of_z, of_F = self.prediction.estimate(wide)
        return of_z * z + of_F * found

    def estimate(self, prediction: Tensor) -> Tensor:
        """The expected row of the table under the logits, or the prediction, which is it."""
        if self.num_classes:
            return prediction.float().softmax(-1) @ self._unit_table()
        return prediction

    def loss(
        self,
        draw: Draw,
        level: Tensor,
        scale: Tensor,
        layers: Sequence[int],
        batch: Batch,
        interval: Interval,
    ) -> Tensor:
        """Sum of scale (B,) times the cross-entropy in nats, or the squared error, of a sample."""
        with _drawn_by(draw, level.device, self.training):
            if self.num_classes:
                return (scale.float() * self.losses(draw, level, layers, batch)).sum()
            return self._scored(draw, level, scale, layers, batch)[0]

    def losses(self, draw: Draw, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """Cross-entropy in nats or squared error, mean over the elements of each sample, (B,)."""
        if not self.num_classes:
            return self._scored(draw, level, torch.ones_like(level).double(), layers, batch)[1]
        logits = self.denoise(self.noisy(level, batch, draw), level, layers, batch)
        return _cross_entropy(logits, self._clean(batch))

    def noisy(self, level: Tensor, batch: Batch, draw: Draw) -> Tensor:
        """z of the batch's own targets, of `z_shape`."""
        return add_noise(self.target(batch), *self.prediction.path(level), draw)

    def taught_loss(
        self,
        z: Tensor,
        taught: Tensor,
        share: float,
        level: Tensor,
        scale: Tensor,
        layers: Sequence[int],
        batch: Batch,
    ) -> Tensor:
        """As `loss`, of targets of which a share is what is taught."""
        found, clean = self.denoise(z, level, layers, batch), self._clean(batch)
        if self.num_classes:
            losses = taught_entropy(found, taught, clean, share).view(len(found), -1).mean(1)
        else:
            losses = square_error(found, taught, clean, share)
        return (scale.float() * losses).sum()

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Accuracy and cross-entropy in nats of each sample, (B,) float32.

        A sample of one class also has the confidence of its answer.
        """
        label = self._clean(batch)
        right = (logits.argmax(-1) == label).float().view(len(label), -1).mean(1)
        found = {"accuracy": right, "cross_entropy": _cross_entropy(logits, label)}
        if label.ndim == 1:
            found["confidence"] = logits.float().softmax(-1).amax(-1)
        return found

    def _unit_table(self) -> Tensor:
        return F.normalize(self.table.weight.float(), dim=-1)

    def _scored(
        self, draw: Draw, level: Tensor, scale: Tensor, layers: Sequence[int], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        def network(z: Tensor) -> Tensor:
            return self._network(z, level, layers, batch)

        # a head of somebody else may need its own output again
        return scored(network, self.prediction, self._clean(batch), draw, level, scale)

    def _clean(self, batch: Batch) -> Tensor:
        """What `target` gives: numbers, or classes."""
        expected = torch.int64 if self.num_classes else torch.float32
        found = self._target(self.net, batch)
        _check("target", found, (_count(batch), *self.target_shape))
        if found.dtype != expected:
            how = f"num_classes is {self.num_classes}"
            raise ValueError(f"target must give {expected} where {how}, got {found.dtype}")
        if found.requires_grad:
            raise ValueError(
                "target must give what no parameter moves, got a tensor that requires a gradient"
            )
        # a look at a GPU's numbers would wait for it
        if self.num_classes and found.device.type == "cpu" and found.numel():
            low, high = found.min().item(), found.max().item()
            if low < 0 or high >= self.num_classes:
                got = low if low < 0 else high
                raise ValueError(f"target must give classes in [0, {self.num_classes}), got {got}")
        return found

    def _network(self, z: Tensor, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """F or logits, of z at the scale for networks."""
        B = len(level)
        c = self.embedding(self.prediction.path.condition(level))
        if self._condition is not None:
            c = self._condition(self.net, c, batch)
        x = self._stem(self.net, z, batch)
        if self.level_as == "condition":
            _check("stem", x, (B, *x.shape[1:]) if isinstance(x, Tensor) else (B,))
        else:
            _check("condition", c, (B, self.dim))
            tokens = x.shape[1] if isinstance(x, Tensor) and x.dim() == 3 else "T"
            _check("stem", x, (B, tokens, self.dim))
            token = c[:, None].to(x.dtype)
            x = x + token if self.level_as == "sum" else torch.cat([x, token], dim=1)
        given = (c,) if self.level_as == "condition" else ()
        for index in layers:
            shape = tuple(x.shape)
            x = self.layers[index](x, *given)
            _check(f"layer {index}", x, shape)
        if self.level_as == "token":
            x = x[:, :-1]
        found = self._head(self.net, x, c, batch)
        _check(
            "head", found, (B, *self.target_shape, *([self.num_classes] * bool(self.num_classes)))
        )
        return found


def _count(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean over the elements of each sample, (B,), of logits (B, ..., K) and labels (B, ...)."""
    losses = F.cross_entropy(logits.float().flatten(0, -2), label.flatten(), reduction="none")
    return losses.view(len(label), -1).mean(1)


def _check(name: str, found: object, shape: tuple[int | str, ...]) -> None:
    got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if got != shape:
        raise ValueError(f"{name} must give a tensor {shape}, got {got}")


def _check_layers(net: nn.Module, name: str, level_as: LevelAs) -> None:
    """Refuse layers that cannot be trained in blocks, or are called in another way."""
    try:
        layers = net.get_submodule(name)
    except AttributeError:
        layers = None
    if not isinstance(layers, nn.ModuleList | nn.Sequential) or not len(layers):
        got = "none of that name" if layers is None else f"{type(layers).__name__} of "
        got += "" if layers is None else f"{len(list(layers.children()))}"
        raise ValueError(
            f"layers must name an nn.ModuleList or nn.Sequential of {type(net).__name__} that has "
            f"layers, got {name!r}: {got}"
        )
    for where, module in net.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            raise ValueError(
                "net must keep no statistics of what it has seen, which blocks have no place for, "
                f"got {type(module).__name__} {where}"
            )
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            raise ValueError(f"{where} must have batch_first=True, for samples come first")
    given = 2 if level_as == "condition" else 1
    for index, layer in enumerate(layers):
        takes = _arguments(layer)
        if given not in takes:
            raise ValueError(
                f"layer {index} must take {'x and c' if given == 2 else 'x alone'} with level_as "
                f"{level_as}, got {type(layer).__name__} that takes {takes.start} "
                f"argument{'s' * (takes.start != 1)}"
            )


def _arguments(layer: nn.Module) -> range:
    """How many arguments by place a layer may be called with."""
    if isinstance(layer, nn.TransformerEncoderLayer):
        return range(1, 2)  # the second one is a mask
    kinds = inspect.signature(layer.forward).parameters.values()
    places = [each for each in kinds if each.kind.name.startswith("POSITIONAL")]
    needed = sum(each.default is each.empty for each in places)
    more = any(each.kind is each.VAR_POSITIONAL for each in kinds)
    return range(needed, 100 if more else len(places) + 1)


@contextmanager
def _drawn_by(draw: Draw, device: torch.device, training: bool) -> Iterator[None]:
    """Have torch's own generators draw what a draw names, and go on as before at the end."""
    if not training or isinstance(draw.step, Tensor):  # a graph's generator is the graph's
        yield
        return
    seed = stream_seed(draw.seed, draw.step, draw.sample, _LAYERS_STREAM)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield
