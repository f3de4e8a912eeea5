"""What stands in the place of a module whose class is known: its tensors, and another forward.

To know one class more, write a subclass of `FusedLayer` in a file of this folder, and add it to
KNOWN in `known.py`.
"""

import abc
import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dbkernels.models.as_made import as_made, check_as_made
from dbkernels.ops.layer.recompute import Recompute

# what a class may have of its own, which a layer in its place would not have
_METHODS = ("__call__", "_apply", "_load_from_state_dict", "_save_to_state_dict", "train")


class FusedLayer(nn.Module, abc.ABC):
    """A module's parameters, buffers, children and hooks, run by one op.

    They are the module's own, the same objects by the same names. So a state dict, an optimizer, an
    average of the weights or a move to another device or dtype sees no difference, and each
    parameter has the published values at any time. Where an op wants them in another layout, as one
    projection of several or with permuted rows, its function makes that of them while it runs.

    Children that are read are never called. Where one is not as it was read, as a hook or an
    adapter makes it, the next call raises.

    Args:
        original:   of a class that `knows`; nothing in it changes
        recompute:  what the backward computes again: a key of `dbkernels.ops.POLICIES`
        reads:      names of the children that are read, parents first; below one, of all that is in
                    it but what is called
        called:     names of the modules below those that the forward does call
    Raises:
        ValueError: a part is one that no layer has; the message names the part.
    """

    def __init__(
        self,
        original: nn.Module,
        recompute: Recompute,
        reads: tuple[str, ...],
        called: tuple[str, ...] = (),
    ):
        super().__init__()
        _check_plain(original)
        # the dictionaries themselves, so that what is put into one is in both
        self.__dict__.update(original.__dict__)
        self.__dict__["original"] = original  # no child: its tensors would have two names
        self.recompute = recompute
        self._made = as_made(self, reads, _settings(original), called)
        try:
            self.check()
        except RuntimeError as error:
            raise ValueError(str(error)) from None

    @staticmethod
    @abc.abstractmethod
    def knows(module: nn.Module) -> bool:
        """Whether a module is of the class, or of the shape; it imports nothing to tell."""

    @abc.abstractmethod
    def example(self, random: torch.Generator) -> Sequence[object]:
        """Arguments of one call in float64 on the CPU, small, with all that a call may have.

        The original and the layer are run on them once and must agree, for the forward of a class
        may compute something else than its parts say.
        """

    def check(self) -> None:
        """Whether the children that are read are as they were: a forward calls it first.

        Raises:
            RuntimeError: one of them was replaced, or something was added to it or changed in it.
        """
        check_as_made(self, self._made)

    def restored(self) -> nn.Module:
        """The original, with the values that its tensors have now."""
        self.original.training = self.training
        return self.original


def normal(random: torch.Generator, *shape: int) -> Tensor:
    """Numbers for an example, float64 on the CPU."""
    return torch.randn(shape, generator=random, dtype=torch.float64, device="cpu")


def of_each_sample(x: Tensor, c: Tensor) -> Tensor:
    """A condition (B, ...) of the samples of x, which may have a B of 1 for all.

    Raises:
        ValueError: it is not (B, cond_dim).
    """
    if c.dim() != 2 or len(c) not in (1, len(x)):
        raise ValueError(f"c must be (B, cond_dim) = ({len(x)}, cond_dim), got {tuple(c.shape)}")
    return c.expand(len(x), -1)


def check_signature(original: nn.Module, *names: str) -> None:
    """Refuse a class whose forward takes other arguments than the layer's does.

    Raises:
        ValueError: the names differ.
    """
    taken = tuple(inspect.signature(type(original).forward).parameters)[1:]
    if taken != names:
        raise ValueError(
            f"the forward of {type(original).__name__} must take {', '.join(names)}, got "
            f"{', '.join(taken) or 'nothing'}"
        )


def check_no_dropout(original: nn.Module) -> None:
    """Refuse what leaves something out in training: elements, weights or a whole branch.

    Raises:
        ValueError: a share is not 0.
    """
    for name, module in original.named_modules(remove_duplicate=False):
        key = "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "drop_prob"
        if (share := getattr(module, key, 0)) != 0:
            raise ValueError(f"{name}.{key} must be 0 in a fused layer, got {share}")


def check_one_dtype(original: nn.Module, *names: str) -> None:
    """Refuse projections of several dtypes, which run in one.

    Raises:
        ValueError: two parameters of the modules of these names differ in it.
    """
    named = [
        (f"{name}.{key}", parameter)
        for name in names
        for key, parameter in original.get_submodule(name).named_parameters()
    ]
    first, dtype = named[0][0], named[0][1].dtype
    for name, parameter in named:
        if parameter.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} as {first} is, got {parameter.dtype}")


def _check_plain(original: nn.Module) -> None:
    kind = type(original)
    if "forward" in vars(original):
        raise ValueError(f"a {kind.__name__} must have the forward of its class, got another one")
    for name in _METHODS:
        if getattr(kind, name) is not getattr(nn.Module, name):
            raise ValueError(f"a {kind.__name__} must have the {name} of a Module, got its own")


def _settings(original: nn.Module) -> dict[type[nn.Module], tuple[str, ...]]:
    """Names of what each class of module in a layer is told, in all modules of the class."""
    found: dict[type[nn.Module], set[str]] = {}
    for module in original.modules():
        own = {
            name
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str | tuple) and name[0] != "_"
        } - {"training"}
        found[type(module)] = found.get(type(module), own) & own
    return {kind: tuple(sorted(names)) for kind, names in found.items()}
