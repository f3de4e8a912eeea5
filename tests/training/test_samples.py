import torch
from training.tiny import make_data

from dbkernels.training.pending import HeldSamples, ReadSamples

INDICES = torch.tensor([3, 1, 4, 1, 5])


def joined(pieces):
    pieces = list(pieces)
    sizes = [len(piece["label"]) for piece in pieces]
    return sizes, {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def test_both_give_the_same_pieces_as_often_as_they_are_asked():
    data = make_data()
    whole = data.batch(INDICES)
    held = HeldSamples()
    held.fill(whole)
    for samples in (ReadSamples(data, INDICES, torch.clone), held):
        for size, sizes in ((5, [5]), (2, [2, 2, 1]), (9, [5])):
            found, together = joined(samples.pieces(size))
            assert found == sizes
            assert all(torch.equal(together[name], whole[name]) for name in whole)


def test_held_samples_stay_at_their_addresses():
    data, held = make_data(), HeldSamples()
    held.fill(data.batch(INDICES))
    (piece,) = held.pieces(5)
    addresses = {name: tensor.data_ptr() for name, tensor in piece.items()}
    other = data.batch(INDICES.flip(0))
    held.fill(other)
    for name, tensor in piece.items():
        assert torch.equal(tensor, other[name]) and tensor.data_ptr() == addresses[name]
    assert all(tensor.data_ptr() != addresses[name] for name, tensor in other.items())


def test_what_was_given_is_not_held_itself():
    batch, held = make_data().batch(INDICES), HeldSamples()
    held.fill(batch)
    batch["image"].zero_()
    (piece,) = held.pieces(5)
    assert piece["image"].abs().sum() > 0
