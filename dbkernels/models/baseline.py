"""The layers that the fused one is measured against: plain torch, and what torch makes of it.

    stock         autograd keeps what it likes, as in the published code
    checkpointed  a layer keeps its input and runs again in the backward
    selective     keeps also what matmuls and the attention gave, and runs the rest again
    compiled      torch.compile, under a budget of activation memory where one is given

Each computes what `dbkernels.ops.reference.adaln_layer` says, with the parameters of the fused
layer under their own names: a checkpoint, a trainer and a measurement of one serve the others.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dbkernels.choices import check_choice
from dbkernels.models.compiled import compiled
from dbkernels.models.layer import AdaLNLayer
from dbkernels.ops import reference
from dbkernels.ops.layer.tensors import ResidualStream, first_tokens

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


class BaselineLayer(AdaLNLayer):
    """The modules of a fused layer, run by plain torch; hooks of the layer itself stay behind.

    Args:
        layer:  whose modules these are from now on, too
        run:    (layer, x, c, rotary) -> out: `stock_layer`, or what `by_method` made of it
    """

    def __init__(self, layer: AdaLNLayer, run: Callable[..., Tensor]):
        with torch.device("meta"):  # weights that are replaced at once: no memory, no random draw
            super().__init__(layer.config)
            # the fused layer's own keeps no rounded copy of its weight, as plain torch does
            modulation = nn.Linear(layer.config.cond_dim, 6 * layer.config.dim)
        modulation.weight, modulation.bias = layer.modulation.weight, layer.modulation.bias
        for name, module in (*layer.named_children(), ("modulation", modulation)):
            setattr(self, name, module)
        self.run = run
        self.train(layer.training)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        rotary: Tensor | None = None,
        stream: ResidualStream | None = None,
        num_queries: int | None = None,
    ) -> Tensor:
        """One layer, as `AdaLNLayer.forward` but for the stream, which it leaves alone.

        Every token is computed and the first are taken of all, as in the published code.
        """
        return first_tokens(self.run(self, x, c, rotary), num_queries)


def stock_layer(layer: AdaLNLayer, x: Tensor, c: Tensor, rotary: Tensor | None) -> Tensor:
    """The specification, with the parameters of a layer."""
    config = layer.config
    return reference.adaln_layer(
        x,
        layer._modulation(c),
        layer._weights(),
        num_heads=config.num_heads,
        rotary=rotary,
        mlp=config.mlp,
        norm=config.norm,
        eps=config.eps,
    )


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
    """Put a baseline in the place of each layer of a model, with the layer's own parameters.

    Their objects, names, order and values stay, so optimizers and checkpoints do not notice.

    Args:
        model:   a family, whose layers may be baselines already
        method:  a name of `BASELINES`
        budget:  as that of `by_method`
    Raises:
        ValueError: as `by_method`.
    """
    run = by_method(stock_layer, method, budget=budget)
    for index, layer in enumerate(model.layers):
        model.layers[index] = BaselineLayer(layer, run)
