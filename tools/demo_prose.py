"""What the demo's report says: plain words for someone who has never heard of the method."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prose:
    """The words of one section."""

    title: str
    see: str  # what to look for
    how: str  # how the numbers came about; the device and the command follow


INTRODUCTION = """
Training a deep network normally keeps what every layer computed (its activations) in memory until
the backward pass has used it. DiffusionBlocks (arXiv:2506.14202) reads the network as a machine
that removes noise little by little and gives each group of layers, a block, its own range of noise.
Each block is then trained alone, so a step keeps the activations of one block only. This page shows
what that saves and what it costs on 8×8 images of handwritten digits: the same network was trained
end to end and block by block, once to classify digits and once to generate them."""

SECTIONS = {
    "summary": Prose(
        "What it saves and what it costs",
        "Each run is marked against end to end, row by row, also where it loses. A step updates "
        "one block; a sweep is one step of every block, so that every layer is updated once. "
        "Fréchet distance in the features of a small classifier trained on the digits: lower is "
        "better.",
        "one run a column, so a small difference may be chance; memory is what was alive during "
        "one training step.",
    ),
    "loss": Prose(
        "Loss of each block",
        "Compare a line with itself over time: blocks work at different noise, so the height of "
        "one line says little about another. Runs of one task share their vertical axis.",
        "the loss of each logged optimizer step (faint) and its running mean (bold).",
    ),
    "accuracy": Prose(
        "Accuracy after each Euler step",
        "Classification starts from pure noise at the left and removes it step by step. A marker "
        "has the colour of the block that took the step. A later step should not lose what an "
        "earlier one had.",
        "share of held-out digits whose most likely class is right, read out after each step.",
    ),
    "cross-entropy": Prose(
        "Cross-entropy at sigma_max",
        "At the most noise the noisy target says nothing, so the first figure is what the network "
        "knows from the image alone. At less noise a block can win by copying its noisy target: "
        "read the second figure with that in mind. Guessing among ten digits costs 2.30 nats; "
        "lower is better.",
        "mean over held-out digits, at the highest level of noise and for each block.",
    ),
    "noise": Prose(
        "Which block has which noise",
        "The curve is how often training draws a level of noise. A block serves its coloured band "
        "when the network is used. It trains on its bracket, which overlaps its neighbours. Block "
        "0 has the most noise and the first layers. The classifier trained end to end sees the "
        "noisiest end alone, where nothing of the label is left: it is an ordinary classifier.",
        "computed from the runs' intervals and priors.",
    ),
    "memory": Prose(
        "Where the memory goes",
        "Saved activations come first in each bar: that is the part which training block by block "
        "shrinks. What all blocks share stays.",
        "what was alive at the peak of one training step, each storage counted once, binary units.",
    ),
    "digits": Prose(
        "Generated digits beside real ones",
        "Each row of a generated grid was asked for one digit, named at its left. Look for strokes "
        "that join, and for variety within a row.",
        "drawn from noise by each run after training.",
    ),
}
