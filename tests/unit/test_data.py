"""Data: splits, batches by number, augmentation, labels."""

import pytest
import torch

from diffusionblocks.data.images import DataConfig, ImageData, _check_labels, load_images
from diffusionblocks.data.stream import BatchStream
from diffusionblocks.errors import UserError
from tests.conftest import make_data


def test_splits_are_disjoint_stratified_and_repeatable():
    first, second = load_images(DataConfig()), load_images(DataConfig())
    sizes = [len(part) for part in first[:3]]
    assert sum(sizes) == 1797
    assert sizes[2] == pytest.approx(0.3 * 1797, abs=2)
    for a, b in zip(first[:3], second[:3], strict=True):
        assert torch.equal(a.images, b.images)
    images = torch.cat([part.images.flatten(1) for part in first[:3]])
    assert len(images.unique(dim=0)) == 1797  # every image is in exactly one part
    assert torch.bincount(first.test.labels).min() >= 50


def test_pixels_are_in_minus_one_to_one():
    batch = load_images(DataConfig()).train.__getitems__(list(range(50)))
    assert batch["pixel_values"].min() == -1.0
    assert batch["pixel_values"].max() == 1.0


def test_batches_by_number_cover_every_epoch_once_and_can_start_anywhere():
    stream = BatchStream(make_data(48), 8, seed=3)
    numbers = [index for batch in range(6) for index in stream.indices(batch)]
    assert sorted(numbers) == list(range(48))
    later = [batch["labels"] for batch in stream.load([7, 8])]
    again = [batch["labels"] for batch in BatchStream(make_data(48), 8, seed=3).load(range(9))][7:]
    assert all(torch.equal(a, b) for a, b in zip(later, again, strict=True))
    assert stream.indices(0) != BatchStream(make_data(48), 8, seed=4).indices(0)


def test_items_one_by_one_equal_a_batch():
    class OneByOne(torch.utils.data.Dataset):
        def __len__(self):
            return 48

        def __getitem__(self, index):
            return make_data(48)[index]

    whole, single = (next(BatchStream(d, 8, 0).load([2])) for d in (make_data(48), OneByOne()))
    assert torch.equal(whole["pixel_values"], single["pixel_values"])
    assert torch.equal(whole["labels"], single["labels"])


def test_augmentation_depends_on_seed_and_batch_alone_and_leaves_global_randomness():
    pytest.importorskip("kornia")
    config = DataConfig(augment=["shift", "flip", "randaugment"], channels=3)
    data, other = load_images(config, seed=1).train, load_images(config, seed=2).train
    state = torch.random.get_rng_state()
    a, b, c = (d.__getitems__([1, 2, 3])["pixel_values"] for d in (data, data, other))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.min() >= -1
    assert a.max() <= 1
    plain = ImageData(data.images, data.labels).__getitems__([1, 2, 3])["pixel_values"]
    assert not torch.equal(a, plain)


@pytest.mark.parametrize("labels", [[0, 1, 4], [-1, 0, 1]])
def test_labels_outside_the_range_are_refused(labels):
    with pytest.raises(UserError, match="labels must be 0 to 3"):
        _check_labels(torch.tensor(labels), 4)


def test_unknown_augmentation_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'flip'"):
        load_images(DataConfig(augment=["flipp"]))


class Unreadable(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        raise UserError("cannot read image 3.png")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_sample_is_one_line_from_a_worker_too(workers):
    with pytest.raises(UserError) as found:
        next(BatchStream(Unreadable(), 4, seed=0, num_workers=workers).load([0]))
    assert str(found.value) == "cannot read image 3.png"
