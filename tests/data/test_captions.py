"""Images with embeddings of their texts: what is read, what is refused, and what is known again."""

import re

import numpy as np
import pytest
import torch

from dbkernels.data.captions import open_captions, read_prompts
from dbkernels.data.digest import digest
from dbkernels.data.formats import MissingSplit
from dbkernels.models import MMDiT

SHAPES = {"": (2, 4, 4), "_text": (3, 5), "_pooled": (6,)}
NAMES = dict(zip(("image", "text", "pooled"), SHAPES, strict=True))
EMBEDDED = {"text": np.ones((2, 3, 5), np.float32), "pooled": np.ones((2, 6), np.float32)}


@pytest.fixture
def arrays(tmp_path):
    """Writes both splits, with changes by the end of a file's name; None leaves a file out."""

    def write(**changed):
        random, written = np.random.default_rng(0), {}
        for split, count in (("", 7), ("_test", 4)):
            for end, shape in SHAPES.items():
                made = random.normal(size=(count, *shape)).astype(np.float32)
                array = changed.get(split + end or "image", made)
                if array is not None:
                    np.save(tmp_path / f"z{split}{end}.npy", array)
                    written[split + end] = array
        return written

    write.source = tmp_path / "z.npy"
    return write


@pytest.mark.parametrize("half", [False, True])
def test_a_split_has_an_image_its_text_and_one_embedding_of_all_of_it(arrays, half):
    given = {"_text": np.ones((7, 3, 5), np.float16)} if half else {}
    written, rows = arrays(**given), torch.tensor([2, 0])
    for split, count in (("train", 7), ("test", 4)):
        data = open_captions(arrays.source, split)
        assert len(data) == count and data.image_shape == (2, 4, 4)
        assert (data.text_shape, data.pooled_dim) == ((3, 5), 6)
        batch = data.batch(rows, put=lambda tensor: tensor * 2)
        assert batch.keys() == NAMES.keys()
        for name, end in NAMES.items():
            expected = written[("" if split == "train" else "_test") + end][[2, 0]]
            assert batch[name].dtype == torch.float32
            assert np.array_equal(batch[name], 2 * expected.astype(np.float32))


def test_an_encoder_may_give_no_embedding_of_all_the_text(arrays):
    arrays(_pooled=None)
    data = open_captions(str(arrays.source))
    assert data.pooled_dim == 0 and data.batch(torch.tensor([6])).keys() == {"image", "text"}
    config = MMDiT.preset("small").fitted(data)
    assert (config.pooled_dim, config.text_length, config.text_dim) == (0, 3, 5)
    assert (config.image_size, config.channels) == (4, 2)
    with pytest.raises(ValueError, match=r"must have text, as .*, got text and pooled"):
        config.open(str(arrays.source), "test")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"_text": np.zeros((6, 3, 5), np.float32)}, "z_text.npy must have a row for each of 7"),
        ({"_pooled": np.zeros((8, 6), np.float32)}, "z_pooled.npy must have a row for .* got 8"),
        ({"_text": None}, "z_text.npy is missing"),
        ({"image": None}, "z.npy has no train split: expected z.npy beside it"),
        ({"_text": np.zeros((7, 3, 5))}, r"text must be \(N, S, E\) .* got \(7, 3, 5\) float64"),
        ({"_text": np.zeros((7, 15), np.float32)}, r"text must be \(N, S, E\) .* got \(7, 15\)"),
        ({"_pooled": np.zeros((7, 6), np.int64)}, r"pooled must be \(N, P\) .* got \(7, 6\) int64"),
        ({"_text": np.zeros((7, 0, 5), np.float32)}, r"not empty, got \(7, 0, 5\) float32"),
        ({"image": np.zeros((7, 4, 4, 2), np.uint8)}, r"images must be \(N, C, H, W\) .* uint8"),
    ],
    ids=lambda given: None if isinstance(given, str) else "-".join(given),
)
def test_rejects(arrays, changed, message):
    arrays(**changed)
    with pytest.raises(ValueError, match=message):
        open_captions(arrays.source)


def test_a_split_is_missing_where_its_images_are_and_a_source_is_an_npy(arrays):
    arrays(_test=None)
    with pytest.raises(MissingSplit, match=r"no test split: expected z_test.npy beside it"):
        open_captions(arrays.source, "test")
    for source in ("digits", arrays.source.with_suffix(".npz")):
        with pytest.raises(ValueError, match=f"an .npy file with .* beside it, got {source}"):
            open_captions(source)


@pytest.mark.parametrize("name", NAMES)
def test_a_number_that_is_not_finite_is_told_by_its_array_and_row(arrays, name):
    broken = np.ones((7, *SHAPES[NAMES[name]]), np.float32)
    broken[5].flat[1] = np.inf
    arrays(**{NAMES[name] or "image": broken})
    data = open_captions(arrays.source)
    data.batch(torch.tensor([4, 6]))
    with pytest.raises(ValueError, match=f"^{name} must be finite in float32, sample 5 is not"):
        data.batch(torch.tensor([4, 5, 6]))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"convert": "grey"}, "convert must be none where data is no folder of images, got grey"),
        ({"stride": 2}, "stride must be 0 where data is no text, got 2"),
    ],
    ids=["convert", "stride"],
)
def test_a_configuration_rejects_what_is_for_other_data(arrays, ask, message):
    arrays()
    config = MMDiT.preset("small").fitted(open_captions(arrays.source))
    assert len(config.open(str(arrays.source), "test")) == 4
    with pytest.raises(ValueError, match=message):
        config.open(str(arrays.source), "train", **ask)
    if "convert" in ask:
        with pytest.raises(ValueError, match=message):
            config.find(str(arrays.source), **ask)


@pytest.mark.parametrize("end", SHAPES)
def test_data_are_known_again_by_each_of_their_arrays(arrays, end):
    written = arrays()
    before = digest(open_captions(arrays.source))
    for change in (
        lambda array: array + (np.arange(7) == 3).reshape(-1, *[1] * (array.ndim - 1)),
        lambda array: array[::-1],
        lambda array: array.astype(np.float16).astype(np.float32),
    ):
        arrays(**{end or "image": change(written[end]).astype(np.float32)})
        assert digest(open_captions(arrays.source)) != before
    arrays()
    assert digest(open_captions(arrays.source)) == before


def test_arrays_of_the_same_bytes_are_other_data_under_other_shapes(arrays):
    found = []
    for shape in ((7, 3, 5), (7, 5, 3)):
        arrays(_text=np.zeros(shape, np.float32), _pooled=None)
        found.append(digest(open_captions(arrays.source)))
    assert found[0] != found[1]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_prompts_are_read_in_their_order_as_float32(tmp_path, save):
    text = np.random.default_rng(1).normal(size=(2, 3, 5)).astype(np.float16)
    save(tmp_path / "p.npz", text=text, pooled=EMBEDDED["pooled"], tokens=np.arange(2))
    found = read_prompts(tmp_path / "p.npz")
    assert list(found) == ["text", "pooled"]
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert np.array_equal(found["text"], text.astype(np.float32))
    save(tmp_path / "p.npz", text=text)
    assert list(read_prompts(tmp_path / "p.npz")) == ["text"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "prompts must be an .npz of embeddings, got .*p.npz, which is no file"),
        (b"nothing", "p.npz is not a whole .npz file"),
        ({"pooled": EMBEDDED["pooled"]}, "p.npz must have an array text, got none"),
        (EMBEDDED | {"pooled": np.ones((3, 6), np.float32)}, "must have as many rows as each"),
        ({"text": np.ones((3, 5), np.float32)}, r"text must be \(N, S, E\) float16 or float32"),
        ({"text": np.ones((2, 3, 5))}, r"text must be .* got \(2, 3, 5\) float64: .*p.npz"),
        (EMBEDDED | {"pooled": np.full((2, 6), np.nan, np.float16)}, "pooled must be finite .* 0"),
    ],
    ids=["missing", "damaged", "no text", "rows", "axes", "dtype", "not finite"],
)
def test_rejects_prompts(tmp_path, given, message):
    path = tmp_path / "p.npz"
    if isinstance(given, dict):
        np.savez(path, **given)
    elif given:
        path.write_bytes(given)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_a_cut_file_of_prompts_is_refused(tmp_path):
    path = tmp_path / "p.npz"
    np.savez(path, **EMBEDDED)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a whole .npz file")):
        read_prompts(path)
