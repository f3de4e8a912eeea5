"""The part of a report that studies have: what each asks, its tables, its claims, its picture."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from page import Section
from report_claims import verdicts
from report_names import FAMILIES, about
from report_rows import CHOICES, Row, tables
from report_study import study_picture, study_table
from report_sweep import sweep_section

ABOUT = """The paper's comparisons, repeated by `python benchmarks/study.py NAME`. A line is a way
of training over seeds, ± the standard deviation; all have the same number of updates of every layer
but where the table says more, and what blocks share gets an update from each block's step. A
classifier answers on test images, from z = 0, or from noise as in the paper. Fréchet distance,
precision and recall compare drawn images with training images, by features of a small classifier of
these. They are drawn on levels of equal probability, as in the paper, and on as many *close
levels*, for Gaussian noise those of EDM. Bits are per character, exact where a network has no noise
and bounds from above otherwise. Below each table stands what was expected and whether it is so at
this size; what loses stays."""
FOLDER = "../docs/pictures"  # from the tables
TITLES = {  # by study: a title, and what it asks
    "families": ("Every family", """End to end, a network that is as deep as one block, and blocks.
End to end a classifier has the most noise alone, and a language model has none. *The paper's*
language model has its prior and read-out, and each block reads the text through its own layers.
*Recommended* has a prior that is fitted to the text, all layers before a block read it too, the
deepest block serves the most noise, and the clean stream guesses the next token."""),
    "more-data": ("The families on more data", """The same arms on the other data of a family."""),
    "blocks": ("How many blocks", """The same layers in more and more blocks, without overlap. One
block is trained on all levels of noise."""),
    "partition": ("How noise and layers are cut", """Without overlap. The numbers are layers of each
block, that of the most noise first. Of text, *equal information* is a prior that is fitted to the
information of a character, cut into equal probabilities."""),
    "overlap": ("How far blocks overlap", """Each block trains on so much more than it serves, as a
share of its interval's width on either side."""),
    "weighting": ("What weight a level has", """In the loss of a block. *The published code's* is
the product of the mean loss and the mean weight of a batch."""),
    "sharing": ("What blocks share", """One stem and head that every block's step updates, or a copy
for each block, which may then be trained apart."""),
    "conditioning": ("Whether layers know the noise level", """*Without*, the modulation of every
layer has a constant condition; the preconditioning stays."""),
    "baselines": ("Beside other ways without one long backward", """On the same transformer, and on
the CNN of NoProp, whose nets stand in the place of layers. Contrastive Forward-Forward alone shifts
its images, of which it compares two views. Forward-Forward asks its network once for each class.
The times are the least of seven steps of every block beside another busy process, so small
differences mean nothing."""),
    "layer-sweep": ("Where layers space the classes as the answers do", """r correlates distances
between the classes in a layer's label token with those in the answers. The third line is cut where
the end-to-end network's r changes most."""),
    "huginn": ("Recurrent depth", """Layers that run again and again, with a gradient through the
last recurrences, beside one pass that denoises: with as many updates, or with as much
arithmetic."""),
    "text": ("How blocks of a text know more of it", """The names are those of *Bits of text*."""),
    "noise": ("Which noise, and what is predicted", """End to end and in blocks."""),
    "conversion": ("Blocks that start from a trained network",
                   """The names are those of *Blocks of a trained network*."""),
}  # fmt: skip


def study_sections(rows: Sequence[Row]) -> list[Section]:
    """Lay out the rows of all studies.

    Args:
        rows:  of `report_rows.read`, of all suites
    Returns:
        sections; nothing where there is no study.
    """
    every = tables(rows, "study")
    if unknown := {table[0]["study"] for table in every} - TITLES.keys():
        raise ValueError(f"study must be one of {', '.join(TITLES)}, got {unknown.pop()}")
    found = [Section("Studies", " ".join(ABOUT.split()))] if every else []
    for name, (title, text) in TITLES.items():
        of_study = [table for table in every if table[0]["study"] == name]
        # the pictures of the pages are those of the smallest scale
        file = f"{FOLDER}/study-{name}.svg"
        for some in by_scale(of_study):
            heading = f"{title} (`{name}`, {some[0][0]['scale']})"
            picture = picture_of(some)
            found.append(Section(heading, " ".join(text.split()), picture=picture, file=file))
            file = ""
            for table in some:
                case = f"{FAMILIES[table[0]['family']]}, {table[0]['data']}"
                found.append(Section(case, table=study_table(table), note=about(table), level=3))
                if claims := verdicts(table):
                    found.append(Section("As expected?", table=claims, level=4))
    return found


def by_scale(every: Sequence[list[Row]]) -> list[list[list[Row]]]:
    """The tables of a study at each of its scales, the smallest first."""
    scales = CHOICES["scale"]
    found = [[table for table in every if table[0]["scale"] == scale] for scale in scales]
    return [some for some in found if some]


def picture_of(some: Sequence[list[Row]]) -> Figure:
    """Of the tables of one study: its main figures, or r over the layers."""
    swept = [row for table in some for row in table if "sweeps" in row]
    if not swept:
        return study_picture(some)
    named = [row | {"arm": f"{row['data']}, {row['arm']}"} for row in swept]
    return sweep_section(named).picture
