"""What torch.compile makes of a function, for real or for a prediction of memory.

Under FakeTensorMode there is nothing for kernels to compute, but what is kept for the backward is
known before there are any: it is where the joint graph of forward and backward is cut in two. That
is done as for a real run. The two graphs then run for their memory alone: what a matmul or an
attention reads or gives, and what a graph returns, is allocated; all else stays in the registers of
fused kernels. So what is kept is exact and temporaries are an estimate: the compiler may fuse less,
and may also order ops better and let a kernel write over what it reads.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_map

aten = torch.ops.aten
MATMULS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)


def compiled(
    function: Callable[..., object], settings: Mapping[str, object]
) -> Callable[..., object]:
    """Compile a function by torch.compile's own backend.

    Each call gives a function of its own: the settings of another do not reach it, nor does it use
    up the number of shapes that torch compiles one for.

    Args:
        function:  without graph breaks; compiled anew for each shape and dtype. A matmul or an
                   attention is a kernel of its own, all else is fused
        settings:  of `torch._functorch.config`, by name
    """
    # takes seconds to import, which is for those to pay who compile
    from torch._inductor.compile_fx import compile_fx

    def backend(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., object]:
        if not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            with torch._functorch.config.patch(dict(settings)):
                return compile_fx(graph, inputs)
        # from a cache would come the kernels of a real run
        with torch._functorch.config.patch({**settings, "enable_autograd_cache": False}):
            return compile_fx(graph, inputs, inner_compile=_memory_alone)

    return torch.compile(own_code(function), backend=backend, fullgraph=True, dynamic=False)


def own_code(function: Callable[..., object]) -> Callable[..., object]:
    """The same function with a code object of its own, by which torch finds what it compiled."""

    def own(*args: object) -> object:
        return function(*args)

    own.__code__ = own.__code__.replace()
    return own


def _memory_alone(
    graph: GraphModule, inputs: Sequence[Tensor], **_: object
) -> Callable[[list[Tensor]], object]:
    """What runs a graph for its memory: it allocates as a fused one does."""

    def run(inputs: list[Tensor]) -> object:
        # one for each call, for it still has what it returned
        return _Fused(graph).boxed_run(inputs)

    run._boxed_call = True
    return run


class _Fused(Interpreter):
    """Runs a graph node by node, and lets go of each tensor with its last use."""

    def run_node(self, node: Node) -> object:
        if not _is_fused(node) or _is_view(node):
            return super().run_node(node)
        reads = [self.env[read] for read in node.all_input_nodes]
        return tree_map(partial(_result, _is_written(node), reads), node.meta["val"])


def _is_fused(node: Node) -> bool:
    """Whether a fused kernel can make it: all but matmuls and attentions."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    packet = node.target.overloadpacket
    return packet not in MATMULS and "attention" not in str(packet)


def _is_view(node: Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "is_view", False)


def _is_written(node: Node) -> bool:
    """Whether memory has to hold it: for a matmul, an attention, or the graph's caller."""
    return any(
        _is_written(user)
        if user.target is operator.getitem or _is_view(user)
        else not _is_fused(user)
        for user in node.users
    )


def _result(written: bool, reads: Sequence[object], like: Tensor) -> Tensor:
    if written:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    result = torch.empty((), dtype=like.dtype, device=like.device).expand(like.shape)
    # a kernel that writes what is made of it reads all of these, so they live until then; a view
    # of it holds it as its base
    result.reads = reads
    return result
