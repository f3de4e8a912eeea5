"""What studies are expected to show, and whether rows show it."""

import pytest
from benchmark_rows import SHALLOW, WHOLE, of_study
from checkout_tools import tool


def verdicts(rows, *claims):
    """What a table of claims says: by how much, and whether it is so."""
    module = tool("report_claims")
    table = module.verdicts(rows, claims) if claims else module.verdicts(rows)
    assert not table or table[0] == module.HEADINGS
    return [line[3:] for line in table[1:]]


def claim(*words, **changes):
    return tool("report_claims").Claim("families", "vit", "expected", *words, **changes)


@pytest.mark.parametrize(
    ("blocks", "margin", "by", "so"),
    [
        ((0.960, 0.962), None, "+5.1 points", "yes"),
        ((0.905, 0.925), None, "+0.5 points", "within the spread"),
        ((0.912, 0.932), None, "+1.2 points", "within the spread"),
        ((0.912, 0.912), None, "+0.2 points", "within the spread"),
        ((0.80, 0.82), None, "-10.0 points", "**no**"),
        ((0.80, 0.82), 0.1, "-10.0 points", "yes"),
        ((0.80, 0.82), 0.099, "-10.0 points", "**no**"),
        ((0.905, 0.915), 0.0, "+0.0 points", "yes"),
        ((0.900, 0.918), 0.0, "-0.1 points", "within the spread"),
    ],
)
def test_a_claim_holds_beyond_the_spread_or_within_its_margin(blocks, margin, by, so):
    rows = [*of_study("3 blocks", blocks), *of_study(WHOLE, (0.905, 0.915))]
    assert verdicts(rows, claim("3 blocks", (WHOLE,), margin=margin)) == [[by, so]]


def test_a_lower_figure_is_better_where_it_is_a_distance_or_bits():
    rows = [
        *of_study("3 blocks", (20.0, 22.0), "frechet", family="dit"),
        *of_study(WHOLE, (20.0, 20.0), "frechet", family="dit"),
    ]
    told = claim("3 blocks", (WHOLE,), margin=0.05, relative=True)._replace(family="dit")
    assert verdicts(rows, told) == [["-1 (-5.0 %)", "yes"]]
    assert verdicts(rows, told._replace(margin=0.049)) == [["-1 (-5.0 %)", "within the spread"]]


def test_a_generator_is_compared_on_close_levels_too_where_it_was_drawn_on_them():
    def rows(name, levels, close):
        both = (levels, levels)
        return [
            row | {"frechet_close": close}
            for row in of_study(name, both, "frechet", family="dit", study="more-data")
        ]

    both = [*rows("3 blocks", 30.0, 20.0), *rows(WHOLE, 20.0, 30.0)]
    [_, *lines] = tool("report_claims").verdicts(both)
    assert [(line[0], *line[3:]) for line in lines] == [
        ("within 5 % of end to end", "-10 (-50.0 %)", "**no**"),
        ("within 5 % of end to end, on close levels", "+10 (+33.3 %)", "yes"),
    ]
    del both[0]["frechet_close"]
    assert len(tool("report_claims").verdicts(both)) == 2


@pytest.mark.parametrize(
    ("recommended", "shallow", "whole", "so"),
    [
        (2.699, 2.6, 2.4, "yes"),
        (2.701, 2.6, 2.4, "**no**"),
        (2.601, 2.6, 2.8, "**no**"),  # a whole that is worse leaves no room
        (2.599, 2.6, 2.8, "yes"),
    ],
)
def test_half_the_distance_to_another_arm_may_be_a_margin(recommended, shallow, whole, so):
    def rows(name, bits):
        return of_study(name, [bits, bits], "bits", family="ar", data="shakespeare")

    two = [*rows("3 blocks, recommended", recommended), *rows(SHALLOW, shallow)]
    [(_, said)] = verdicts([*two, *rows(WHOLE, whole)])
    assert said == so
    assert not verdicts(two)


@pytest.mark.parametrize(
    ("blocks", "limits", "so"),
    [
        (0.905, {"margin": 0.01, "near": True}, "yes"),
        (0.895, {"margin": 0.01, "near": True}, "yes"),
        (0.92, {"margin": 0.01, "near": True}, "**no**"),
        (0.88, {"margin": 0.01, "near": True}, "**no**"),
        (0.95, {"least": 0.04}, "yes"),
        (0.93, {"least": 0.04}, "**no**"),
    ],
)
def test_near_and_far_have_limits(blocks, limits, so):
    rows = [*of_study("3 blocks", (blocks, blocks)), *of_study(WHOLE, (0.9, 0.9))]
    [(_, said)] = verdicts(rows, claim("3 blocks", (WHOLE,), **limits))
    assert said == so


def test_one_seed_tells_nothing():
    rows = [*of_study("3 blocks", (0.9, 0.9)), *of_study(WHOLE, (0.8,))]
    assert verdicts(rows, claim("3 blocks", (WHOLE,))) == [
        ["+10.0 points", "one seed tells nothing"]
    ]


def test_claims_of_other_studies_families_and_arms_are_left_out():
    rows = [*of_study("3 blocks", (0.9,)), *of_study(WHOLE, (0.9,))]
    one = claim("3 blocks", (WHOLE,))
    others = [one._replace(study="blocks"), one._replace(family="dit"), one._replace(better="3")]
    assert len(verdicts(rows, one, *others)) == 1
    assert len(verdicts(rows, one._replace(better="3 bl*"))) == 1
    assert verdicts(rows, *others) == []


def test_every_claim_is_of_arms_that_its_study_has():
    claims, studies = tool("report_claims").CLAIMS, tool("studies")
    for each in claims:
        study = studies.STUDIES[each.study]
        names = [arm.name for arm in study.arms("tiny") if arm.family == each.family]
        # arms of a second stage depend on what the first one found
        better = [] if each.better.endswith("*") else [each.better]
        wanted = {*better, *each.worse, *filter(None, [each.halfway])}
        assert wanted <= set(names), each


def test_claims_that_name_the_paper_are_of_these_arms_the_better_one_first():
    even, nets = "equal probability, [4, 4, 4]", "diffusion blocks, CNN"
    said = [
        ("families", "vit", "better than with the paper's prior", "3 blocks",
         ("3 blocks, the paper's prior",)),
        ("families", "ar", "better than the paper's mode", "3 blocks, recommended",
         ("3 blocks, the paper's",)),
        ("blocks", "dit", "the paper: two blocks are best", "2 blocks",
         ("1 block", "3 blocks", "4 blocks", "6 blocks")),
        ("partition", "dit", "the paper: equal probability is best", even,
         ("log uniform, [4, 4, 4]", "linear, [4, 4, 4]")),
        ("partition", "dit", "the paper: an even split is best", even,
         ("equal probability, [3, 6, 3]", "equal probability, [6, 4, 2]",
          "equal probability, [2, 4, 6]")),
        ("overlap", "dit", "the paper: overlap is not worse than none", "overlap 0.05",
         ("overlap 0",)),
        ("baselines", "vit", "the paper: Forward-Forward is 25 points behind or more",
         "diffusion blocks, ViT", ("forward-forward, ViT",)),
        ("baselines", "vit", "the paper: NoProp-DT is within a point", nets, ("noprop-dt, CNN",)),
        ("baselines", "vit", "the paper: NoProp's continuous forms are behind", nets,
         ("noprop-ct, CNN", "noprop-fm, CNN")),
    ]  # fmt: skip
    claims = tool("report_claims").CLAIMS
    assert [each[:5] for each in claims if "the paper" in each.text] == said


def test_a_difference_from_zero_has_no_share():
    both = [of_study(name, (value,) * 2, "bits") for name, value in (("3 blocks", 1.0), (WHOLE, 0))]
    rows = [row | {"family": "mdm"} for rows in both for row in rows]
    told = claim("3 blocks", (WHOLE,))._replace(family="mdm")
    assert verdicts(rows, told) == [["-1", "**no**"]]
