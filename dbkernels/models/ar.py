"""A language model that denoises the next token's embedding, given the clean tokens before it.

    E^     = rows of target_table at unit length,    z = E^[x] + sigma noise
    noisy  = p z, or p z + clean, or M p z + clean,    clean = clean_table[BOS, x_<]
    h      = layers(noisy, clean): noisy i sees clean j <= i and itself, clean i sees clean j <= i
    logits = `read_out.ReadOutHead` of h and z

p is that of `prediction.EDM`. arXiv:2506.14202, section 5.4 and appendix E.4. The two streams
are stacked as samples, noisy ones first. Clean token i is the one before x_i, BOS for the first,
and both streams stand at position i, as in any language model, whose query for x_i stands at the
token before it. The clean stream's condition is learned and knows no level, so that its keys and
values serve every level of a token that is being drawn.

A block reads the context through its own layers alone (clean="own", the paper's), or through all
layers before them too, which keep nothing and get no gradient (clean="through"). Then its context
is as deep as the stack up to it, and its steps read the weights of earlier blocks. The clean stream
may guess the next token itself, which is what trains the layers' keys and values for later blocks:
at the block's own end, or behind all layers (next_token_from="network"), where the layers behind
the block pass a gradient on and get none, so that the block learns to serve them.

The noisy stream begins with z alone (noisy_input="z", the paper's), and has to fetch the context by
attention. Or it begins where the clean stream stands at its position, plus z (z_and_clean) or plus
a map of z that starts at zero (map_and_clean): then a block goes on from what the layers before it
have made of the context, as layers of an ordinary network do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dbkernels.data.images import Batch
from dbkernels.diffusion.path import log_level
from dbkernels.diffusion.process import Interval
from dbkernels.models.layer import run_layers
from dbkernels.models.noisy_text import NoisyText, scale_of_token
from dbkernels.models.read_out import per_token
from dbkernels.models.text import CleanStream, Guesser, NoisyInput, NoisyTextConfig
from dbkernels.ops.philox import Draw
from dbkernels.settings import check_choice


@dataclass(frozen=True, kw_only=True)
class ARConfig(NoisyTextConfig):
    """An autoregressive language model."""

    clean: CleanStream = "own"
    """Layers through which a block reads earlier tokens: its own, or all up to its last."""
    noisy_input: NoisyInput = "z"
    """What the noisy stream begins with: z, or z on top of the clean stream at its position, or a
    map of z there that starts at zero, as a network needs that has learned without z."""
    next_token_weight: float = 1.0
    """Weight of the clean stream's own cross-entropy in a block's loss; 0 leaves it out."""
    next_token_from: Guesser = "block"
    """Whose guess of the next token that is: the block's, at its own end, or the whole network's,
    of which no layer but the block's learns from it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("clean", self.clean, get_args(CleanStream))
        check_choice("noisy_input", self.noisy_input, get_args(NoisyInput))
        if not 0 <= self.next_token_weight < float("inf"):
            raise ValueError(
                f"next_token_weight must be finite and at least 0, got {self.next_token_weight}"
            )
        check_choice("next_token_from", self.next_token_from, get_args(Guesser))
        if self.next_token_from == "network" and self.clean == "own":
            raise ValueError("clean must be through where next_token_from is network, got own")

    def as_blocks(self) -> "ARConfig":
        """With what lets blocks of a network that never met noise keep what it knows."""
        told: dict[str, Any] = {
            "clean": "through",
            "noisy_input": "map_and_clean",
            "read_out": "posterior",
        }
        return replace(self, **told)

    @property
    def independent(self) -> bool:
        """Whether a block's steps read no layer of another."""
        return self.clean == "own"


PRESETS = {
    "paper": ARConfig(
        dim=768, depth=12, num_heads=12, mlp_hidden=2048, cond_dim=768,
        length=256, vocabulary=32000, next_token_weight=0.0,
    ),
    "small": ARConfig(
        dim=128, depth=6, num_heads=4, mlp_hidden=352, cond_dim=128, length=64, vocabulary=27,
        read_out="posterior",
    ),
}  # fmt: skip


class AR(NoisyText):
    """The autoregressive family: z is (B, S, dim), a prediction is logits (B, S, vocabulary)."""

    config: ARConfig
    presets, smallest = PRESETS, "small"

    def __init__(self, config: ARConfig):
        super().__init__(config)
        self.independent = config.independent
        if config.noisy_input == "map_and_clean":
            self.z_map = nn.Linear(config.dim, config.dim, bias=False)
            nn.init.zeros_(self.z_map.weight)

    def add_noise(self) -> None:
        """Give a network that never met noise a condition of noisy tokens: that of clean ones.

        With noisy_input="map_and_clean" and read_out="posterior" noisy token i then has the logits
        of the clean one beside it, plus what z tells by Bayes' rule, but for this: it sees itself
        beside that clean one, so that in the attention the newest token counts twice.
        """
        with torch.no_grad():
            self.condition.fc2.weight.zero_()
            self.condition.fc2.bias.copy_(self.clean_condition)

    def before(self, layers: Sequence[int]) -> Sequence[int]:
        """Layers that the clean stream passes through before these, without a gradient."""
        return range(layers[0]) if self.config.clean == "through" and layers else ()

    def read(self, z: Tensor, level: Tensor, layers: Sequence[int], token: Tensor) -> Tensor:
        """Rows for the head of token i from z at sigma and the clean tokens before it."""
        return self._rows(z, level, layers, token, guess=False)[0]

    def guess(self, layers: Sequence[int], batch: Batch) -> Tensor:
        """Logits (B, S, vocabulary) of token i from the clean tokens before it alone."""
        rows, _ = self._guess(layers, batch)
        return self.head.logits(rows, self.read_table())

    def loss(
        self,
        draw: Draw,
        level: Tensor,
        scale: Tensor,
        layers: Sequence[int],
        batch: Batch,
        interval: Interval,
    ) -> Tensor:
        """Sum of scale times each sample's or token's cross-entropy in nats, a mean over tokens.

        The mean cross-entropy of the clean stream, times next_token_weight, is added.
        """
        token, guess = batch["token"], self.config.next_token_weight
        z, of_token = self.noisy(level, batch, draw), scale_of_token(scale, token)
        noisy, clean = self._rows(z, level, layers, token, guess=bool(guess))
        if clean is not None:
            share = torch.full_like(of_token, guess / max(token.numel(), 1))
            of_token = torch.cat([of_token, share])
            noisy, token = self.head.beside(noisy, clean), token.repeat(2, 1)
        return self.cross_entropy(noisy, token, of_token, "sum")

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
        """As `loss`, whose noisy tokens have taught words; what the clean stream guesses is its
        own."""
        token, guess = batch["token"], self.config.next_token_weight
        noisy, clean = self._rows(z, level, layers, token, guess=bool(guess))
        loss = self.taught_entropy(noisy, taught, share, scale, token)
        if clean is not None:
            loss = loss + guess * self.cross_entropy(clean, token, None, "mean")
        return loss

    def conventional_loss(self, draw: Draw, layers: Sequence[int], batch: Batch) -> Tensor:
        """Mean cross-entropy of the next token, (), by the clean stream alone, in nats."""
        return self.cross_entropy(*self._guess(layers, batch), None, "mean")

    def conventional_losses(self, draw: Draw, layers: Sequence[int], batch: Batch) -> Tensor:
        """The same of each sample, (B,)."""
        return self.cross_entropy(*self._guess(layers, batch), None, "none").mean(1)

    def _guess(self, layers: Sequence[int], batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows for the head of what the clean stream guesses, and the tokens that it should."""
        token = batch["token"]
        x, c = self._clean(layers, token), self.constant_condition(token.shape[0])
        return self.head.clean(self.run(layers, x, c), c), token

    def _rows(
        self, z: Tensor, level: Tensor, layers: Sequence[int], token: Tensor, *, guess: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Rows for the head: of the noisy stream, and of the clean one where it guesses."""
        B = token.shape[0]
        x, c = self.stem(z, level, self._clean(layers, token))
        some = [self.layers[index] for index in layers]
        num_samples = None if guess else B
        x = run_layers(
            some, x, c, self.rotary(token), attention="two_stream", num_samples=num_samples
        )
        noisy, clean = self.tail(x[:B], c[:B], z, level), None
        if guess:
            clean = self.head.clean(self._to_the_end(layers, x[B:]), c[B:])
        return noisy, clean

    def _to_the_end(self, layers: Sequence[int], x: Tensor) -> Tensor:
        """The clean stream as the head meets it, from some layers' end."""
        if self.config.next_token_from == "block" or not layers:
            return x
        behind = _Causal(self.layers[layers[-1] + 1 :])
        weights = {name: p.detach() for name, p in behind.named_parameters()}
        # what only they learn from is no matter of this block, nor their condition
        c = self.constant_condition(len(x)).detach()
        return torch.func.functional_call(behind, weights, (x, c, self.rotary(x)))

    def _clean(self, layers: Sequence[int], token: Tensor) -> Tensor:
        """The clean stream as the layers meet it, (B, S, dim)."""
        x, earlier = self.tokens_before(token), self.before(layers)
        if not earlier:
            return x
        with torch.no_grad():
            deep = self.run(earlier, x, self.constant_condition(token.shape[0]))
        # the value of the deep one; the table learns as if the layers between added to it
        return deep + (x - x.detach())

    def stem(self, z: Tensor, level: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer reads, (2 B, S, dim), and the conditions, (2 B, ..., cond_dim)."""
        c = self.condition(log_level(level))
        of_clean = self.clean_condition.to(c.dtype).expand_as(c)
        return torch.cat([self.enter(z, level, clean), clean]), torch.cat([c, of_clean])

    def enter(self, z: Tensor, level: Tensor, clean: Tensor) -> Tensor:
        """What the first layer reads of noisy tokens z (B, S, dim) beside clean ones, alike."""
        x = (self.prediction.scale(per_token(level)) * z).to(clean.dtype)
        if self.config.noisy_input == "map_and_clean":
            x = self.z_map(x)
        return x if self.config.noisy_input == "z" else x + clean


class _Causal(nn.Module):
    """Some layers in order, each token of which sees those before it."""

    def __init__(self, layers: nn.ModuleList):
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, c: Tensor, rotary: Tensor) -> Tensor:
        """As `NoisyText.run`."""
        return run_layers(list(self.layers), x, c, rotary, attention="causal")
