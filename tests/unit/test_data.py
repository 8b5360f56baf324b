"""Data: splits, batches by number, augmentation, labels, and pictures of every kind."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionblocks.data.images import sources
from diffusionblocks.data.images.sources import decode
from diffusionblocks.data.images.splits import DataConfig, ImageData, check_labels, load_images
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
        check_labels(torch.tensor(labels), 4)


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


# ---------------------------------------------------------------- pictures of every kind


def png(width, height, depth, kind, rows, *extra):
    """A PNG file with any depth, which Pillow cannot write. kind: 0 grey, 2 colour, 4 and 6 the same with opacity."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*one) for one in extra) + pixels + chunk(b"IEND", b"")


def words(*values):
    return struct.pack(f">{len(values)}H", *values)


def shown(source, channels, size=2, formats=("PNG", "JPEG", "TIFF")):
    return decode(source, DataConfig(image_size=size, channels=channels), formats)


GREYS = words(0, 0x8000), words(0x1234, 0xFFFF)  # of 16 bits
PNGS = {
    "16-bit grey": (png(2, 2, 16, 0, GREYS), [0, 128, 18, 255], False),
    "16-bit grey, one value transparent": (
        png(2, 2, 16, 0, GREYS, (b"tRNS", words(0x1234))),
        [0, 128, 255, 255],
        True,
    ),
    "16-bit grey with opacity": (
        png(2, 2, 16, 4, [words(0, 0xFFFF, 0x8080, 0xFFFF), words(0, 0, 0xFFFF, 0x8080)]),
        [0, 128, 255, 255],
        True,
    ),
    # Pillow reads the upper 8 bits of 16-bit colour.
    "16-bit colour": (
        png(2, 2, 16, 2, [words(*[0] * 3, *[0x80FF] * 3), words(*[0x1234] * 3, *[0xFFFF] * 3)]),
        [0, 128, 18, 255],
        False,
    ),
    "16-bit colour, one transparent": (
        png(
            2,
            2,
            16,
            2,
            [words(*[0] * 3, *[0x80FF] * 3), words(*[0x1234] * 3, *[0xFFFF] * 3)],
            (b"tRNS", words(0, 0, 0)),
        ),
        [255, 128, 18, 255],
        True,
    ),
    "8-bit colour, one transparent": (
        png(2, 2, 8, 2, [bytes([0] * 3 + [9] * 3), bytes([1] * 3 + [2] * 3)], (b"tRNS", words(9, 9, 9))),
        [0, 255, 1, 2],
        True,
    ),
    "8-bit grey, one transparent": (png(2, 2, 8, 0, [b"\0\1", b"\2\3"], (b"tRNS", words(1))), [0, 255, 2, 3], True),
    "2-bit grey": (png(2, 2, 2, 0, [b"\x10", b"\xb0"]), [0, 85, 170, 255], False),
    "black and white": (png(2, 2, 1, 0, [b"\x40", b"\x80"]), [0, 255, 255, 0], False),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PNGS)
def test_pngs_of_every_depth(name, channels, tmp_path):
    content, expected, transparent = PNGS[name]
    (tmp_path / "a.png").write_bytes(content)
    array, seen = shown(tmp_path / "a.png", channels)
    assert array.shape == (channels, 2, 2) and array.dtype == np.uint8
    assert [channel.flatten().tolist() for channel in array] == [expected] * channels
    assert seen == transparent


PLAIN = {
    "L": (100, [100] * 3),
    "RGB": ((10, 20, 30), [10, 20, 30]),
    "RGBX": ((10, 20, 30, 0), [10, 20, 30]),
    "CMYK": ((255, 0, 0, 0), [0, 255, 255]),
    "YCbCr": ((100, 128, 128), [100] * 3),
    "1": (1, [255] * 3),
    "I;16": (0x8080, [128] * 3),
    "I;16B": (0x8080, [128] * 3),
    "I": (0x8080, [128] * 3),
    "RGBA": ((10, 20, 30, 0), [255] * 3),
    "LA": ((10, 0), [255] * 3),
    "RGBa": ((0, 0, 0, 0), [255] * 3),
    "La": ((0, 0), [255] * 3),
    "PA": ((0, 0), [255] * 3),
}


@pytest.mark.parametrize("mode", PLAIN)
def test_every_mode_of_pillow_is_shown_as_a_viewer_would(mode):
    value, expected = PLAIN[mode]
    array, transparent = shown(Image.new(mode, (2, 2), value), 3)
    assert array[:, 0, 0].tolist() == expected
    assert transparent == (mode in ("RGBA", "LA", "RGBa", "La", "PA"))
    grey = 0.299 * expected[0] + 0.587 * expected[1] + 0.114 * expected[2]
    assert shown(Image.new(mode, (2, 2), value), 1)[0][0, 0, 0] == pytest.approx(grey, abs=1)


@pytest.mark.parametrize("mode", ["F", "LAB", "HSV"])
def test_other_modes_are_refused_by_name(mode):
    with pytest.raises(ValueError, match=f"mode {mode}"):
        shown(Image.new(mode, (2, 2)), 3)


def test_more_than_16_bits_are_refused(tmp_path):
    Image.new("I", (2, 2), 70000).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="more than 16 bits"):
        shown(tmp_path / "a.tiff", 1)


def test_palettes_with_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "one.png", transparency=1)
    image.save(tmp_path / "half.png", transparency=bytes([255, 128]))
    image.save(tmp_path / "none.png")
    one, half, none = (pictures_of(tmp_path / f"{name}.png") for name in ("one", "half", "none"))
    assert one == ([10, 20, 30], [255, 255, 255], True)
    assert half == ([10, 20, 30], [147, 152, 157], True)
    assert none == ([10, 20, 30], [40, 50, 60], False)


def pictures_of(path):
    from diffusionblocks.data.images import pictures

    image, transparent = pictures.read(path, "RGB", pictures.FILES)
    return list(image.getpixel((0, 0))), list(image.getpixel((1, 0))), transparent


def test_opaque_images_with_an_opacity_channel_are_not_called_transparent():
    array, transparent = shown(Image.new("RGBA", (2, 2), (10, 20, 30, 255)), 3)
    assert array[:, 0, 0].tolist() == [10, 20, 30] and not transparent


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(orientation, suffix, tmp_path):
    from PIL import ImageOps

    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, :8] = 255, 0, 0
    pixels[:8, 8:] = 0, 255, 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(
        tmp_path / f"a.{suffix}", exif=exif, **({"quality": 100, "subsampling": 0} if suffix == "jpg" else {})
    )
    array, _ = shown(tmp_path / f"a.{suffix}", 3, 16)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(array.transpose(1, 2, 0), expected)
    assert orientation == 1 or not np.array_equal(array.transpose(1, 2, 0), pixels)


def test_damaged_exif_data_do_not_matter(tmp_path):
    Image.new("L", (4, 4), 9).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert shown(tmp_path / "a.jpg", 1)[0].max() == 9


def test_transparency_is_said_once_with_its_count(tmp_path, caplog, monkeypatch):
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(10):
            mode, value = ("RGBA", (0, 0, 0, 0)) if number < 3 else ("RGB", (0, 0, 0))
            Image.new(mode, (4, 4), value).save(tmp_path / label / f"{number}.png")
    splits = load_images(DataConfig(path=str(tmp_path), image_size=4))
    assert [record.message for record in caplog.records] == ["6 images with transparent places are shown on white"]
    assert sum(int((part.images == 255).flatten(1).all(1).sum()) for part in splits[:3]) == 6
    caplog.clear()
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    for part in load_images(DataConfig(path=str(tmp_path), image_size=4))[:3]:
        part.pixels(list(range(len(part))))
    (record,) = caplog.records
    assert "has transparent places, shown on white" in record.message
