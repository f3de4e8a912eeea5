"""Tables and pictures of results of benchmarks.

python tools/report.py benchmarks/results --tables benchmarks/RESULTS.md
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from page import Section, html, markdown
from report_names import about, case_text
from report_pictures import pictures
from report_rows import Row, read, tables
from report_studies import study_sections
from report_tables import headline, table_of
from report_text import texts_section

from dbkernels.whole_file import write_whole

PAGE = Path("runs/bench/report.html")
TITLE = "Results: training block by block, against end to end"
INTRODUCTION = """A *step* trains one block; a *sweep* is a step of every block, so that every layer
is updated once. *Of eager* is the ratio to the same model trained end to end in eager torch, on the
same device and at the same precision. *Saved* is what the forward leaves for the backward. Bold is
the best number among ways that compete; ways that lose stay in the tables. A number is *predicted*
where no device has run it. The paper of the method (arXiv:2506.14202) puts the cost of telling
blocks the noise level at 7.1 %, a sweep of 1.07 of eager."""
TITLES = {  # by suite, of which a word after it is the preset
    "demo digits": ("Two models trained on digits",
    """After the same number of updates of every layer, on images that no model has seen; what all
blocks share gets an update from each block's step. A classifier starts from z = 0 and answers
after each Euler step; the paper starts it from noise. Trained end to end it is the ordinary
classifier, which sees the most noise alone. ± is the standard deviation over seeds. The Fréchet
distance, lower is better, compares features of generated and real digits in a small classifier
that the demo trains. The times are of one run beside another process; those of the training
steps below are better."""),
    "demo shakespeare": ("Two models trained on Shakespeare", """After the same number of updates of
every layer, in bits per character of plays that no model has read; lower is better. MDM fills the
gaps of a text, AR writes it character by character. End to end, AR is the ordinary language model,
whose bits are exact; all others are bounds from above. How often each symbol comes, and nothing
else, gives about 4.08."""),
    "answers": ("How a classifier answers", """Accuracy on unseen images after each Euler step, by
the least noise level of the training and by the start of the steps; ± is the standard deviation
over three seeds. Below the least level nothing is trained: there the label is read off the noisy
target, and a block need not look at the image. End to end has the most noise alone and is the
ordinary classifier."""),
    "text": ("Bits of text", """Bits per character of text that no model has read, ± the standard
deviation over seeds; lower is better. *Bits* is the bound at its best stop level, or exact where a
network has no noise. *Down to the least level* has every block in the bound. *At the most noise* is
the likelihood of a sampler that asks the first block once. All have the same number of updates of
every layer; what all blocks share gets an update from each block's step. *Of the sampler* is an
estimate that is too high, by more where there are few starts. *The paper's* has its prior, read-out
and levels; the blocks below it have a prior that is fitted to the text. *Own* reads the text
through a block's own layers, *through* through all layers before them too, with the deepest block
at the most noise; *next token* adds that loss. *All of these* has both, and its noisy stream goes
on from the clean one (`--noisy-input z_and_clean`). *As much arithmetic* has as many updates more
as a conventional step costs more forwards of one layer. The study `text` repeats all but recurrent
depth at `--scale small`; for that there is the study `huginn`."""),
    "noise": ("Digits by noise", """Digits that a DiT generates, by the noise and by what the
network predicts, after the same number of updates of every layer; what all blocks share gets an
update from each block's step. The Fréchet distance, ± its standard deviation over seeds, is that of
the demo's classifier; lower is better. The study `noise` repeats them at `--scale
small`, with another judge."""),
    "conversion": ("Blocks of a trained network", """Blocks that start from a network trained end to
end, after few updates more of every layer, by what they are trained on; what all blocks share gets
an update from each block's step. *Untrained*: as they start. *Alone*: their own loss. *Distilled*:
the target is what the whole network predicts. *Half distilled*: half of it. *Clean loss*: the clean
stream guesses the next token too, with a gradient in the block alone; *whole*, behind all layers.
*Own*: a block reads the text through its own layers, all others through the layers before them too.
Bits are per character. *As an ordinary network* they are those of all layers without noise, which
the source was trained for.
The Fréchet distance is that of the demo's classifier; lower is better. ± is the standard deviation
over seeds. The study `conversion` repeats them at `--scale small`, with another judge."""),
    "training": ("Training steps", """Methods of one model: end to end, and cut into blocks. *On the
device* says how many blocks' parameters and optimizer state the device holds; the others wait in
the memory of the host. *Fused layers* are this library's, *eager layers* are the published
method."""),
    "cost": ("What blocks cost a model of text", """Operations of one token, forward and backward,
in a step of every block, and numbers that a step keeps for its backward, in multiples of the width.
All of it is counted; nothing ran. End to end is the ordinary model without noise, where the family
has one, in the same fused layers. A language model in blocks reads each text twice, clean and
noisy, and each block has the head's work of its own: cut in 4, it takes more arithmetic than the
ordinary model, and keeps less, but not 4 times less. The last layer of a block computes of its
clean tokens keys and values alone, unless they guess the next token: the layers of a way with
next-token loss are those without this saving. A classifier or a generator of images in blocks reads
nothing twice."""),
    "composition": ("What composes with blocks", """What other ways to need less memory give beside
blocks, as one GPU sees it. Each block has a job of its own, whose GPUs hold no other block; *one
job* has all on one GPU. Every GPU has the same number of samples of a step, so more GPUs share a
larger batch. *Of alone* is the ratio of the peak to that of one block alone, end to end in the same
layers. *Its parts save* adds up what blocks and each word of the way save by themselves. *Additive*
reaches the product of their ratios within 10 %; *overlapping* does not, and no part is better
without the others; *harmful* is worse than some of its parts. *Sent* is the whole buffer of every
collective of a step, without the factors of a ring. *Plain torch* and *checkpointing* run no fused
layer. End to end a language model is the ordinary one, without noise."""),
    "loading": ("Waiting for images", """Steps on JPEGs of a folder, which workers decode while
steps run. A step waits while it reads samples itself, or while it asks workers for them. *Asleep*
is a step that takes no processor, as that of a host whose GPU computes."""),
    "checkpoints": ("Checkpoints", """Ways to save the same numbers, by this library, by
torch.distributed.checkpoint (DCP) and by `torch.save` with a flush. *Beside* is by a thread, while
steps go on, which are products of matrices. Of two processes each holds half of every tensor. A
flip of one bit of a file is noticed where a load refuses the checkpoint; otherwise it gives wrong
numbers, or the bit means nothing."""),
    "timeline": ("Memory within one step", "What is alive at the peak of a step, by category."),
    "layer": ("One layer", "Forward and backward of one layer: AdaLN where no other is named."),
    "ops": ("Ops", """Each op against eager torch and `torch.compile`; forward and backward of noise
and loss are one call. *Of copies* is the share of the rate at which the device copies."""),
}  # fmt: skip

STUDIES_AFTER = "answers"  # title behind which they stand


def sections(rows: Sequence[Row]) -> list[Section]:
    """Lay out everything that was read.

    Args:
        rows:  of `report_rows.read`
    Returns:
        the sections of the page, its pictures first; Markdown leaves those out.
    """
    found = []
    lines, letters = headline(rows)
    if len(lines) > 1:
        found.append(Section("In short", table=lines, note=f"Commands: {letters}."))
    found += pictures(rows)
    for name, (title, text) in TITLES.items():
        suite, _, preset = name.partition(" ")
        of_suite = [each for each in tables(rows, suite) if preset in ("", each[0].get("preset"))]
        if of_suite:
            found.append(Section(title, text=" ".join(text.split())))
        for table in of_suite:
            case = "" if suite == "demo" else f"{case_text(table[0])}, "
            heading = f"{case}{table[0]['device']}"
            found.append(Section(heading, table=table_of(table), note=about(table), level=3))
            found += texts_section(table) if suite == "demo" else []
        if name == STUDIES_AFTER:
            found += study_sections(rows)
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the command line.

    Args:
        arguments:  after the program's name
    Returns:
        exit status: 1 where something is wrong, which a sentence on stderr names.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="files or folders of *.jsonl")
    parser.add_argument("--page", type=Path, default=PAGE, help=f"HTML to write; default {PAGE}")
    parser.add_argument("--tables", type=Path, help="write the tables as Markdown too")
    options = parser.parse_args(arguments)
    try:
        rows = read(options.results)
        found = [Section("How to read the tables", text=" ".join(INTRODUCTION.split()))]
        found += sections(rows)
        for path, write in ((options.page, html), (options.tables, markdown)):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, write(TITLE, found))
                print(path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{path} must be a file that can be written, got {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
