"""One op with its inputs, and who runs it.

Of an op of a layer, forward and backward are apart; shapes, and the bytes that it must move, are
those of the kernel report. The two ends of a training step are the noise before the network and
the loss after. There eager torch is what the published code of Karras et al. 2022 does: the noise,
the noised target and its scaled copy before; the denoised output, its error, the square and their
gradients after.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dbkernels import ops
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.diffusion.prediction import EDM
from dbkernels.models.compiled import compiled
from dbkernels.models.rotary import rotary_table
from dbkernels.ops import reference

# the report's files stand beside each other and are no package
sys.path.append(str(Path(__file__).parents[1] / "tools"))
from kernel_cases import CASES, DTYPE, HEAD_DIM, VOCABULARY, B, Shapes, T
from kernel_compile import PROCESSORS, bytes_moved, record

INPUTS = {  # of the op, with which the arguments of its forward kernel begin
    "adaln_norm": 3,
    "gated_adaln_norm": 5,
    "gated_residual": 3,
    "gelu": 2,
    "gelu_exact": 2,
    "swiglu": 2,
    "qk_norm_rotary": 4,
    "table_rows": 2,
}
FOR_A_LAYER = {  # what a layer asks of a kernel's backward, and the op alone does not
    "adaln_norm": {"dres_ptr", "y_ptr"},
    "gated_adaln_norm": {"y_ptr"},
    "gelu": {"u_ptr"},
    "gelu_exact": {"u_ptr"},
    "swiglu": {"u_ptr"},
}
STREAM = ("adaln_norm", "gated_adaln_norm", "gated_residual")  # work on the residual stream
DTYPES = {"cpu": torch.float32, "cuda": DTYPE}  # as a device is trained on
SIGMA_DATA = 0.5
PREDICTION = EDM(SIGMA_DATA)
SHAPES = ((256, 4, 32, 32), (256, 256, 384))  # latents, and tokens
PASSES = {  # over a tensor of z0's shape, of what each op must read and write
    "add_noise": 2,
    "score_loss": 3,  # the prediction and z0, and the gradient
    "noise_and_loss": 5,
}
H100 = 90  # 10 times the compute capability; how many programs share a sum depends on it


class OpCase(NamedTuple):
    """One op at one width."""

    op: str
    dim: int
    impls: tuple[str, ...]
    device: torch.device
    mixed: bool = False  # the residual stream is float32 and all else bfloat16, as in autocast

    directions = ("fwd", "bwd")

    @property
    def dtype(self) -> torch.dtype:
        """Of all but the residual stream of a mixed case."""
        return DTYPE if self.mixed else DTYPES[self.device.type]

    @property
    def dtype_name(self) -> str:
        """As a row has it."""
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} on a float32 stream" if self.mixed else name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the residual stream that the op works on, or beside."""
        return B, T, self.dim

    def inputs(self) -> list[Tensor]:
        """Of unit variance, drawn on the device, with the shapes and strides of the report's.

        Words are drawn about as Zipf's law has them: each as often as 1 / its rank.
        """
        random = torch.Generator(self.device).manual_seed(0)
        arguments = CASES[f"{self.op}_fwd"].arguments(self._shapes)[: INPUTS[self.op]]
        has_table = self.op == "qk_norm_rotary"  # of angles, which has no gradient
        likes = map(self._of_dtype, arguments[: len(arguments) - has_table])
        drawn = [
            filled(like, random).requires_grad_()
            if like.is_floating_point()
            else _words(like, random)
            for like in likes
        ]
        table = rotary_table(torch.arange(T), HEAD_DIM).to(self.device)
        return [*drawn, *[table] * has_table]

    @property
    def _shapes(self) -> Shapes:
        return Shapes(self.dim, B, torch.float32 if self.mixed else DTYPE)

    def _of_dtype(self, like: Tensor) -> Tensor:
        """A tensor of the report's in the dtype of this case, its strides as they are."""
        if like.dtype != DTYPE:
            return like
        return torch.empty_strided(like.shape, like.stride(), dtype=self.dtype, device="meta")

    def function(self, impl: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        if impl == "fused":
            op = getattr(ops, self.op)
            # a norm's result is for a branch
            of_branch = self.mixed and self.op == "adaln_norm"
            op = partial(op, dtype=self.dtype) if of_branch else op
            return _on_tensors(op, self.op, self.dim)
        eager = _on_tensors(getattr(reference, self.op), self.op, self.dim)
        if self.mixed and self.op != "gated_residual":
            eager = partial(_for_a_branch, eager, self.dtype)
        # a backward that is timed alone runs often on one forward
        return compiled(eager, {"donated_buffer": False}) if impl == "compiled" else eager

    def calls(
        self, inputs: Sequence[list[Tensor]]
    ) -> dict[tuple[str, str], list[Callable[[], object]]]:
        """By implementation and direction, a call for each copy of the inputs."""
        return by_implementation_and_direction(self, inputs)

    def implementation(self, impl: str, direction: str) -> str:
        """What computes."""
        return what_runs(impl, f"{self.op}_{direction}", self.device)

    def bytes_moved(self, direction: str) -> int:
        case = CASES[f"{self.op}_{direction}"]
        _, launch = record(case, self._shapes, _arch(self.device))
        left_out = FOR_A_LAYER.get(self.op, ()) if direction == "bwd" else ()
        kept = {
            name: self._of_dtype(a) if isinstance(a, Tensor) else a
            for name, a in launch.arguments.items()
            if name not in left_out
        }
        return bytes_moved(case, replace(launch, arguments=kept))


class ByDirection(Protocol):
    """A case of forward and backward apart."""

    impls: tuple[str, ...]
    device: torch.device

    def function(self, impl: str) -> Callable[..., Tensor | tuple[Tensor, ...]]: ...


def by_implementation_and_direction(
    case: ByDirection, inputs: Sequence[list[Tensor]]
) -> dict[tuple[str, str], list[Callable[[], object]]]:
    """A call for each copy of the inputs.

    A backward begins after a forward that is done here. All have the same incoming gradients.
    """
    calls = {}
    for impl in case.impls:
        function = case.function(impl)
        calls[impl, "fwd"] = [partial(function, *each) for each in inputs]
        calls[impl, "bwd"] = [_backward(function, each, case.device) for each in inputs]
    return calls


def _backward(
    function: Callable, inputs: list[Tensor], device: torch.device
) -> Callable[[], object]:
    random = torch.Generator(device)
    outs = _as_tuple(function(*inputs))
    douts = [filled(out, random.manual_seed(1)) for out in outs]
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    return partial(torch.autograd.grad, outs, leaves, douts, retain_graph=True)


def _on_tensors(function: Callable, op: str, D: int) -> Callable:
    """An op as a function of its tensors alone."""
    if op == "table_rows":
        return lambda index, table: function(table, index, unit=True)
    if op != "qk_norm_rotary":
        return function
    return lambda qkv, q_weight, k_weight, rotary: function(
        qkv, D // HEAD_DIM, q_weight=q_weight, k_weight=k_weight, rotary=rotary
    )


def _for_a_branch(
    eager: Callable[..., Tensor | tuple[Tensor, ...]], dtype: torch.dtype, *inputs: Tensor
) -> tuple[Tensor, ...]:
    """Plain torch's results, of which the last is rounded for a branch as autocast does."""
    *stream, y = _as_tuple(eager(*inputs))
    return *stream, y.to(dtype)


def filled(like: Tensor, random: torch.Generator) -> Tensor:
    """Numbers of unit variance, the same for any strides, drawn on the generator's device."""
    place = {"dtype": like.dtype, "device": random.device}
    tensor = torch.empty_strided(like.shape, like.stride(), **place)
    return tensor.copy_(torch.randn(like.shape, generator=random, **place))


def _words(like: Tensor, random: torch.Generator) -> Tensor:
    u = torch.rand(like.shape, generator=random, dtype=torch.float64, device=random.device)
    return (VOCABULARY**u).long() - 1


def _as_tuple(outs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outs,) if isinstance(outs, Tensor) else outs


def _arch(device: torch.device) -> int:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor if 10 * major + minor in PROCESSORS else H100
    return H100


# the noise before the network, and the loss after it


class NoiseCase(NamedTuple):
    """One op on one shape, forward and backward together: the forward computes the gradient."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    impls: tuple[str, ...]
    device: torch.device

    directions = ("fwd+bwd",)

    @property
    def dtype_name(self) -> str:
        """As a row has it."""
        return str(self.dtype).removeprefix("torch.")

    def inputs(self) -> list[Tensor]:
        """z0, sigma and what a network answers, the last with a gradient."""
        # drawn where they are needed: on a host it takes longer than all that is timed
        random = torch.Generator(self.device).manual_seed(0)
        place = {"generator": random, "device": self.device}
        z0 = 0.5 * torch.randn(self.shape, dtype=self.dtype, **place)
        u = torch.rand(len(z0), dtype=torch.float64, **place)
        sigma = LogNormal().level_at(LogNormal().range, u)
        prediction = torch.randn(self.shape, dtype=self.dtype, **place)
        return [z0, sigma, prediction.requires_grad_()]

    def calls(
        self, inputs: Sequence[list[Tensor]]
    ) -> dict[tuple[str, str], list[Callable[[], object]]]:
        """By implementation and direction, a call for each copy of the inputs."""
        return {(impl, "fwd+bwd"): self._calls(impl, inputs) for impl in self.impls}

    def _calls(self, impl: str, inputs: Sequence[list[Tensor]]) -> list[Callable[[], object]]:
        draw = draw_on(self.device)
        fused = partial(_noise, draw), partial(_loss, draw)
        noise, loss = {"fused": fused}.get(impl, (_eager_noise, _eager_loss))
        if impl == "compiled":
            noise, loss = compiled(noise, {}), compiled(loss, {})

        def call(z0: Tensor, sigma: Tensor, prediction: Tensor) -> object:
            # the loss needs z, which eager torch has kept and the fused one draws again
            scaled, z = (None, z0) if self.op == "score_loss" else noise(z0, sigma)
            if self.op == "add_noise":
                return scaled
            return scaled, torch.autograd.grad(loss(prediction, z, z0, sigma), prediction)

        return [partial(call, *each) for each in inputs]

    def bytes_moved(self, direction: str) -> int:
        return PASSES[self.op] * prod(self.shape) * self.dtype.itemsize

    def implementation(self, impl: str, direction: str) -> str:
        """What computes."""
        op = "add_noise_fwd" if self.op == "add_noise" else "score_loss_fwd"
        return what_runs(impl, op, self.device)


def what_runs(impl: str, op: str, device: torch.device) -> str:
    """What computes an op, such as gelu_fwd, for one of those who are compared."""
    fused = ops.implementation(device, op)
    return {"fused": fused, "compiled": "inductor", "eager": "torch"}[impl]


def draw_on(device: torch.device) -> ops.Draw:
    """The step in the device's memory, as where a CUDA graph is replayed with the next."""
    return ops.Draw(seed=1, step=torch.tensor(7, device=device))


def _noise(draw: ops.Draw, z0: Tensor, sigma: Tensor) -> tuple[Tensor, None]:
    return ops.add_noise(z0, *PREDICTION.input(sigma), draw), None


def _loss(draw: ops.Draw, prediction: Tensor, z: None, z0: Tensor, sigma: Tensor) -> Tensor:
    return ops.score_loss(prediction, z0, *PREDICTION.target(sigma), draw)[0]


def _eager_noise(z0: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    level = sigma.view(-1, *[1] * (z0.dim() - 1))
    z = z0 + level * torch.randn_like(z0)
    return (PREDICTION.input(level)[0] * z).to(z0.dtype), z


def _eager_loss(prediction: Tensor, z: Tensor, z0: Tensor, sigma: Tensor) -> Tensor:
    level = sigma.view(-1, *[1] * (z0.dim() - 1))
    of_z, of_F = PREDICTION.estimate(level)
    weight = of_F.square().reciprocal()
    return (weight * (of_z * z + of_F * prediction - z0).square()).mean()
