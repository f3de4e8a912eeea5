"""Whether modules are as they were made: for those whose weights are read and who never run.

What someone adds to such a module afterwards, a hook, a forward or a wrapper, would be left out
without a word: an adapter would never train, a norm would keep the eps that it had.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

Kinds = Mapping[type[nn.Module], tuple[str, ...]]  # what may stand there, and its settings by name

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Made(NamedTuple):
    """One module as it was made."""

    name: str
    """From the module that the others are in."""
    parent: int
    """Place of the one that it is a child of; -1 is the module that the others are in."""
    key: str
    """Its name in its parent."""
    kind: type[nn.Module]
    settings: tuple[tuple[str, object], ...]
    """Name and value."""
    parameters: dict[str, bool]
    """By name, whether there is none in its place."""
    children: frozenset[str]


def as_made(
    root: nn.Module, names: tuple[str, ...], kinds: Kinds, called: tuple[str, ...] = ()
) -> tuple[Made, ...]:
    """Some children of a module, and all that is in these, parents first.

    Args:
        root:    of the modules
        names:   of its children
        kinds:   of modules whose reader knows what each of them computes
        called:  of modules inside these that do run; nothing is told of them
    """
    places: dict[str, int] = {"": -1}
    return tuple(made for name in names for made in _walk(root, name, places, kinds, called))


def _walk(
    root: nn.Module, name: str, places: dict[str, int], kinds: Kinds, called: tuple[str, ...]
) -> Iterator[Made]:
    module, (parent, _, key) = root.get_submodule(name), name.rpartition(".")
    assert type(module) in kinds, f"{name}: nothing is known of how to read a {type(module)}"
    settings = tuple((setting, getattr(module, setting)) for setting in kinds[type(module)])
    parameters = {key: parameter is None for key, parameter in module._parameters.items()}
    places[name] = len(places) - 1
    children = tuple(key for key, child in module._modules.items() if child is not None)
    yield Made(name, places[parent], key, type(module), settings, parameters, frozenset(children))
    for child in children:
        if (inside := f"{name}.{child}") not in called:
            yield from _walk(root, inside, places, kinds, called)


def check_as_made(root: nn.Module, made: tuple[Made, ...]) -> None:
    """Whether what `as_made` told of the modules in `root` is so still; takes a few microseconds.

    Raises:
        RuntimeError: a module was replaced, or something was added to it or changed in it.
    """
    modules: list[nn.Module] = []
    for each in made:
        parent = root if each.parent < 0 else modules[each.parent]
        module = parent._modules.get(each.key)
        if (change := _change(module, each)) is not None:
            raise RuntimeError(
                f"{type(root).__name__} reads the weights of the modules inside and never calls "
                f"them: {each.name} must be a plain {each.kind.__name__} as it was made, got "
                f"{change}. Hook or wrap the whole layer, or give it other weights by "
                "torch.func.functional_call"
            )
        modules.append(module)


def _change(module: nn.Module | None, made: Made) -> str | None:
    """What is not as it was made; the first of it."""
    if type(module) is not made.kind:
        return "none" if module is None else f"a {type(module).__name__}"
    own = module.__dict__
    if "forward" in own:
        return "one with a forward of its own"
    for hooks in HOOKS:
        if own[hooks]:
            return f"one with {hooks.strip('_').replace('_', ' ')}"
    for name, value in made.settings:
        if own[name] != value:
            return f"{name} {own[name]} in place of {value}"
    for name, parameter in own["_parameters"].items():
        if made.parameters.get(name) is not (parameter is None):
            return f"one {'without' if parameter is None else 'with'} a parameter {name}"
    if added := own["_modules"].keys() - made.children:
        return f"one with a module {min(added)}"
    return None
