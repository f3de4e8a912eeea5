import pytest
import torch

from dbkernels.ops._score_checks import check_score, error_weight

SIGMA = torch.tensor([0.1, 0.5, 80.0], device="cpu").double()
C_OUT2 = SIGMA**2 * 0.25 / (SIGMA**2 + 0.25)


def of(weight="edm", mask=None, z0=None):
    z0 = torch.zeros(3, 4, 5, device="cpu") if z0 is None else z0
    return error_weight(z0, SIGMA.float(), 0.5, weight, mask)


def test_the_edm_weight_of_the_error_of_the_network_is_1():
    assert of() is None


def test_other_weights_are_times_c_out_squared():
    torch.testing.assert_close(of("none"), C_OUT2.float())
    weight = torch.tensor([1.0, 2.0, 0.5], device="cpu")
    torch.testing.assert_close(of(weight), C_OUT2.float() * weight)
    assert of(weight.half()).dtype == torch.float32
    assert of(weight, z0=torch.zeros(3, 4, device="cpu").double()).dtype == torch.float64


def test_a_mask_makes_the_rest_count_more():
    mask = torch.zeros(3, 4, dtype=torch.bool, device="cpu")
    mask[0, :1], mask[1] = True, True
    share = torch.tensor([4.0, 1.0, 4.0], device="cpu")  # of nothing, anything finite
    torch.testing.assert_close(of(mask=mask), share)
    torch.testing.assert_close(of("none", mask), C_OUT2.float() * share)
    every = mask[..., None].expand(3, 4, 5)
    torch.testing.assert_close(of(mask=every)[:2], share[:2])


def test_no_elements_have_no_weight_of_a_mask():
    mask = torch.zeros(3, 0, dtype=torch.bool, device="cpu")
    assert of(mask=mask, z0=torch.zeros(3, 0, device="cpu")) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": torch.zeros(3, 5, 4)}, r"shape of z0 = \(3, 4, 5\), got \(3, 5, 4\)"),
        ({"prediction": torch.zeros(3, 4, 5).int()}, "prediction must be one of float32"),
        ({"prediction": torch.zeros(3, 4, 5, device="meta")}, "must be on one device"),
        ({"reduction": "max"}, "reduction must be mean, sum or none, got max"),
        ({"weight": "snr"}, "weight must be edm, none or a tensor, got snr"),
        ({"weight": torch.ones(4)}, r"weight must be \(3,\) of floats on .*, got \(4,\)"),
        ({"weight": torch.ones(3).int()}, r"of floats on .*, got \(3,\) torch.int32"),
        ({"weight": torch.ones(3, device="meta")}, "weight must be .* on meta"),
        ({"weight": torch.ones(3).requires_grad_()}, "weight must not require a gradient"),
        ({"mask": torch.ones(3, 5).bool()}, r"mask must be bool of the shape .*, got \(3, 5\)"),
        ({"mask": torch.ones(3, 4)}, r"mask must be bool .*, got \(3, 4\) torch.float32"),
        ({"mask": torch.ones(()).bool()}, r"mask must be bool .*, got \(\)"),
        ({"mask": torch.ones(3, 4, 5, 1).bool()}, r"got \(3, 4, 5, 1\)"),
        ({"mask": torch.ones(3, 4, device="meta").bool()}, "mask must be on .*, got meta"),
    ],
)
def test_rejects(change, message):
    given = {
        "prediction": torch.zeros(3, 4, 5),
        "z0": torch.zeros(3, 4, 5),
        "weight": "edm",
        "reduction": "mean",
        "mask": None,
    } | change
    with pytest.raises(ValueError, match=message):
        check_score(**given)
