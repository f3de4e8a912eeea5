import math

import pytest
import torch
from implementations import implementations
from scipy import stats

from dbkernels.ops import _noise
from dbkernels.ops._philox import philox
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.philox import Draw, _forward_op, _uniform_op, normals, uniforms

DRAWS = [Draw(0, 0), Draw(2**64 - 1, 2**56 - 1, 2**32 - 3), Draw(12345678901234567890, 77, 3)]


@pytest.fixture(params=implementations("philox_normal"))
def implementation(request):
    with use_implementation(request.param):
        yield request.param


def of_plain_torch(f):
    with use_implementation("torch"):
        return f()


def correlation(a, b):
    return float((a.double() * b.double()).mean() * math.sqrt(a.numel()))


# 1027: a second tile of three elements, and a group of which one is left out
@pytest.mark.parametrize("elements", [1, 5, 1027])
@pytest.mark.parametrize("draw", DRAWS)
def test_normals_are_those_of_plain_torch(implementation, draw, elements):
    fused, plain = normals(draw, 3, elements), of_plain_torch(lambda: normals(draw, 3, elements))
    assert fused.shape == (3, elements) and fused.dtype == torch.float32
    assert (fused - plain).abs().max() <= 1e-6


@pytest.mark.parametrize("draw", DRAWS)
def test_uniforms_are_those_of_plain_torch_bit_for_bit(implementation, draw):
    fused, plain = uniforms(draw, 3), of_plain_torch(lambda: uniforms(draw, 3))
    assert fused.dtype == torch.float64 and torch.equal(fused, plain)


def test_uniforms_are_53_bits_of_stream_1(implementation):
    draw = Draw(seed=7 * 2**32 + 5, step=3 * 2**32 + 9, sample=2**32 - 300)
    expected = []
    for b in range(300):  # more than one tile
        x0, x1, _, _ = philox(0, draw.sample + b, 9, 3 * 2**8 + 1, 5, 7)
        expected.append(((x0 >> 5) * 2**26 + (x1 >> 6) + 0.5) * 2.0**-53)
    assert uniforms(draw, 300).tolist() == expected


def test_same_bits_every_run(implementation):
    for f in (lambda: normals(DRAWS[2], 2, 300), lambda: uniforms(DRAWS[2], 9)):
        assert torch.equal(f(), f())


def test_launch_shape_changes_no_bit(implementation, monkeypatch):
    expected = normals(DRAWS[1], 3, 1500)
    monkeypatch.setattr(_noise, "MAX_TILE", 256)
    monkeypatch.setattr(_noise, "CHUNK", 512)
    assert torch.equal(normals(DRAWS[1], 3, 1500), expected)


def test_a_micro_batch_draws_its_rows_of_the_batch(implementation):
    whole, levels = normals(Draw(3, 4, 0), 5, 70), uniforms(Draw(3, 4, 0), 5)
    assert torch.equal(normals(Draw(3, 4, 2), 3, 70), whole[2:])
    assert torch.equal(uniforms(Draw(3, 4, 2), 3), levels[2:])


def test_longer_samples_begin_alike(implementation):
    assert torch.equal(normals(DRAWS[0], 2, 1100)[:, :66], normals(DRAWS[0], 2, 66))


def test_each_part_of_a_draw_changes_every_number(implementation):
    draw = Draw(5, 6, 7)
    others = [
        *(Draw(4, 6, 7), Draw(5 + 2**32, 6, 7), Draw(5 + 2**63, 6, 7)),
        *(Draw(5, 7, 7), Draw(5, 6 + 2**32, 7), Draw(5, 6 + 2**55, 7)),
        *(Draw(5, 6, 8), Draw(5, 6, 7 + 2**31)),
    ]
    expected, level = normals(draw, 1, 100), uniforms(draw, 1)
    for other in others:
        assert (normals(other, 1, 100) != expected).all(), other
        assert uniforms(other, 1) != level, other


def test_moments_of_a_unit_normal():
    x = normals(Draw(1, 2), 64, 4096).double().flatten()
    # standard errors of the first four moments of n numbers: 1, sqrt(2), sqrt(15), sqrt(96)
    moments, errors = (0, 1, 0, 3), (1, 2**0.5, 15**0.5, 96**0.5)
    for power, (moment, error) in enumerate(zip(moments, errors, strict=True), start=1):
        assert abs(float((x**power).mean()) - moment) < 3.9 * error / math.sqrt(len(x)), power


def test_normals_follow_the_normal_distribution():
    x = normals(Draw(2, 3), 16, 4096)
    for place in range(4):  # of a group
        assert stats.kstest(x[:, place::4].flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-3


def test_tails_are_as_heavy_as_a_normal_s():
    x = normals(Draw(3, 4), 256, 4096).abs()
    for radius in (3.0, 4.0):
        expected = x.numel() * 2 * stats.norm.sf(radius)
        assert abs(int((x > radius).sum()) - expected) < 3.9 * math.sqrt(expected)


def test_uniforms_follow_the_uniform_distribution():
    u = uniforms(Draw(4, 5), 20_000)
    assert u.min() > 0 and u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    # the bits below those of float32 count too
    assert stats.kstest((u * 2**24 % 1).numpy(), "uniform").pvalue > 1e-3


def test_draws_are_uncorrelated():
    x = normals(Draw(5, 6, 8), 16, 4096)
    pairs = {
        "samples": (x[:-1], x[1:]),
        "elements": (x[:, :-1], x[:, 1:]),
        "places of a group": (x[:, ::2], x[:, 1::2]),
        "radii": (x[:, :-2].square() - 1, x[:, 2:].square() - 1),
        "steps": (x, normals(Draw(5, 7, 8), 16, 4096)),
        "high steps": (x, normals(Draw(5, 6 + 2**32, 8), 16, 4096)),
        "seeds": (x, normals(Draw(6, 6, 8), 16, 4096)),
        "high seeds": (x, normals(Draw(5 + 2**32, 6, 8), 16, 4096)),
        "far samples": (x, normals(Draw(5, 6, 2**31), 16, 4096)),
    }
    for name, (a, b) in pairs.items():
        # a product of two squares less 1 has a variance of 4
        spread = 2 if name == "radii" else 1
        assert abs(correlation(a, b)) < 3.9 * spread, name


def test_levels_are_uncorrelated_with_the_noise():
    draw = Draw(8, 9)
    u = (uniforms(draw, 4000) - 0.5) * math.sqrt(12)
    noise = normals(draw, 4000, 4)
    for place in range(4):
        assert abs(correlation(u, noise[:, place])) < 3.9
        assert abs(correlation(u, (noise[:, place].square() - 1) / math.sqrt(2))) < 3.9


def test_nothing_is_drawn_for_an_empty_batch(implementation):
    assert normals(Draw(1, 2, 2**32 - 1), 0, 5).shape == (0, 5)
    assert normals(Draw(1, 2), 2, 0).shape == (2, 0)
    assert uniforms(Draw(1, 2), 0).shape == (0,)


def test_are_well_formed_torch_ops(implementation):
    step = torch.tensor(6)
    torch.library.opcheck(_forward_op, (torch.empty(2, 9), 5, step, 7))
    torch.library.opcheck(_uniform_op, (torch.empty(2, dtype=torch.float64), 5, step, 7))


def test_a_step_does_not_compile_anew(implementation):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda draw: normals(draw, 2, 9), backend=backend, fullgraph=True)
    for step in (5, 6, 7, 2**40, 2**56 - 1):
        draw = Draw(2**64 - 5, step, sample=2 * step % 2**31)
        assert torch.equal(compiled(draw), normals(draw, 2, 9))
    assert len(graphs) <= 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Draw(2**64, 0), r"seed must be in \[0, 18446744073709551616\), got 184467"),
        (lambda: Draw(-1, 0), "seed must be in"),
        (lambda: Draw(0, 2**56), "step must be in .*, got 72057594037927936"),
        (lambda: Draw(0, 0, 2**32), "sample must be in .*, got 4294967296"),
        (lambda: Draw(0, 0, -1), "sample must be in .*, got -1"),
        (lambda: Draw(0, 0.5), "step must be an integer, got 0.5"),
        (lambda: Draw(True, 0), "seed must be an integer, got True"),
        (lambda: Draw(0, torch.zeros(1).long()), r"or \(\) torch.int64, got \(1,\) torch.int64"),
        (lambda: Draw(0, torch.zeros(())), r"or \(\) torch.int64, got \(\) torch.float32"),
        (lambda: Draw(0, torch.zeros(()).int()), r"step must be an integer or .* torch.int32"),
        (lambda: Draw(torch.tensor(0), 0), r"seed must be an integer, got tensor\(0"),
        (lambda: Draw(0, 0, torch.tensor(0)), r"sample must be an integer, got tensor\(0"),
        (lambda: normals(Draw(0, 0, 2**32 - 2), 3, 1), r"at most 4294967296, got 4294967294 \+ 3"),
        (lambda: uniforms(Draw(0, 0, 2**32 - 2), 3), r"sample \+ B must be at most"),
        (lambda: normals(Draw(0, 0), 1, 2**34 + 1), "at most 17179869184 elements, got 1717986918"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_last_of_everything_is_accepted():
    seed, step, sample = Draw(2**64 - 1, 2**56 - 1, 2**32 - 1).arguments(1, 2**34)
    assert (seed, step.item(), sample) == (-1, 2**56 - 1, 2**32 - 1)
    assert step.shape == () and step.dtype == torch.int64
    assert Draw(2**63 - 1, 0).arguments(2**32)[0] == 2**63 - 1
    assert Draw(2**63, 0).arguments(1)[0] == -(2**63)
