"""The layers that the fused one is measured against: plain torch, and what torch makes of it.

    stock         autograd keeps what it likes, as in the published code
    checkpointed  a layer keeps its input and runs again in the backward
    selective     keeps also what matmuls and the attention gave, and runs the rest again
    compiled      torch.compile, under a budget of activation memory where one is given

Each computes what the layer's specification in `dbkernels.ops` says, with the parameters of the
fused layer under their own names: a checkpoint, a trainer and a measurement of one serve the
others.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dbkernels.models.compiled import compiled
from dbkernels.settings import check_choice

Baseline = Literal["stock", "checkpointed", "selective", "compiled"]

BASELINES = get_args(Baseline)
aten = torch.ops.aten
EXPENSIVE = (  # the attention by each name that torch may choose
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def stock_layer(layer: nn.Module, *given: object) -> Tensor | tuple[Tensor, ...]:
    """The specification, with the parameters of a layer; given is what a layer gives its `run`."""
    return layer.stock(*given)


def by_method(
    function: Callable[..., Tensor], method: Baseline, *, budget: float = 1.0
) -> Callable[..., Tensor]:
    """A function of the same numbers that keeps for its backward what a method says.

    Args:
        function:  plain torch without graph breaks, in which nothing is random
        method:    a name of `BASELINES`
        budget:    for compiled: from 1, all that the compiler would keep, to 0, the inputs alone
    Raises:
        ValueError: the method is unknown, or the budget is not from 0 to 1, or not for compiled.
    """
    check_choice("method", method, BASELINES)
    if not 0 <= budget <= 1:
        raise ValueError(f"budget must be from 0 to 1, got {budget}")
    if method == "compiled":
        return compiled(function, {"activation_memory_budget": budget})
    if budget != 1:
        raise ValueError(f"budget must be 1 for {method}, got {budget}")
    # the state of a GPU's generator cannot be captured in a CUDA graph, and nothing draws from it
    run_again = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    if method == "checkpointed":
        return run_again
    if method == "selective":
        contexts = partial(create_selective_checkpoint_contexts, list(EXPENSIVE))
        return partial(run_again, context_fn=contexts)
    return function


def use_baseline(model: nn.Module, method: Baseline, *, budget: float = 1.0) -> None:
    """Have plain torch run each layer of a model from now on, with the layer's own parameters.

    A layer then leaves the stream alone. It computes every token of every sample, and the first are
    taken of all, as in the published code.

    Args:
        model:   a family, in place; its layers may be baselines already
        method:  a name of `BASELINES`
        budget:  as that of `by_method`
    Raises:
        ValueError: as `by_method`; or the method is compiled and a layer has dropout, whose numbers
            a compiler would take for constants.
    """
    run = by_method(stock_layer, method, budget=budget)
    configs = [each.config for each in model.layers]
    shares = [max(config.dropout, config.attention_dropout) for config in configs]
    if method == "compiled" and any(shares):
        raise ValueError(f"dropout must be 0 for compiled, got {max(shares)}")
    for layer in model.layers:
        layer.run = run
