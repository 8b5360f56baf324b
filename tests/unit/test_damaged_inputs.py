"""Damaged and hostile inputs: one line that names the file, nothing that hangs, nothing half written."""

import os
import socket
import struct
import zlib

import pytest
import torch
from PIL import Image

import diffusionblocks as dblocks
from diffusionblocks.data import sources
from diffusionblocks.data.images import DataConfig, load_images
from diffusionblocks.errors import UserError


def refused(call, *words):
    """The one line that a call ends with."""
    with pytest.raises(UserError) as found:
        call()
    message = str(found.value)
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert str(word) in message, message
    return message


# ---------------------------------------------------------------- images in folders


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "images"
    for label in "ab":
        (root / label).mkdir(parents=True)
        for number in range(8):
            Image.new("L", (4, 4), number * 30).save(root / label / f"{number}.png")
    return root


def bomb(path, size=40_000):
    """A PNG of 1.6 billion pixels in 100 bytes."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))


def animated_bomb(path):
    """The same as an animation: its first picture is small, the sheet of its later ones is not."""
    Image.new("L", (4, 4)).save(path, save_all=True, append_images=[Image.new("L", (4, 4), 9)])
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 40_000, 40_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def truncated(path):
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-400])


def socket_at(path):
    place = os.getcwd()
    os.chdir(path.parent)  # the names of sockets are short
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(path.name)
    os.chdir(place)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n(/tmp/x) (w) file\n%%EOF\n"
DAMAGED = {
    "bomb": (bomb, "exceeds limit"),
    "animated bomb": (animated_bomb, "exceeds limit"),
    "broken link": (lambda path: path.symlink_to(path.parent / "nowhere.png"), "link to a file that does not exist"),
    "link to itself": (lambda path: path.symlink_to(path), "levels of symbolic links"),
    "pipe": (os.mkfifo, "pipe, socket or device"),
    "socket": (socket_at, "pipe, socket or device"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "pipe, socket or device"),
    "folder": (lambda path: path.mkdir(), "it is a folder"),
    "empty": (lambda path: path.touch(), "it is empty"),
    "truncated": (truncated, "truncated"),
    "text": (lambda path: path.write_text("no image"), "no PNG or JPEG image"),
    "PostScript": (lambda path: path.write_bytes(POSTSCRIPT), "no PNG or JPEG image"),
    "a header alone": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "no PNG or JPEG image"),
    "TIFF": (lambda path: Image.new("F", (4, 4)).save(path, "TIFF"), "no PNG or JPEG image"),
}


@pytest.mark.timeout(20)  # a pipe that is opened never answers
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_images_are_named_or_counted(kind, images, caplog, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    make, reason = DAMAGED[kind]
    make(images / "a" / "x.png")
    refused(lambda: load_images(DataConfig(path=str(images))), images / "a" / "x.png", reason, "--data.skip-unreadable")
    splits = load_images(DataConfig(path=str(images), skip_unreadable=True))
    assert sum(len(part) for part in splits[:3]) == 16
    (record,) = caplog.records
    assert "skipped 1 unreadable images; the first" in record.message and "a/x.png" in record.message


def test_unreadable_permissions_are_named(images, monkeypatch):
    real = sources.pictures.Image.open

    def closed(path, **options):
        if str(path).endswith("3.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(sources.pictures.Image, "open", closed)
    refused(lambda: load_images(DataConfig(path=str(images))), images / "a" / "3.png", "Permission denied")


def test_images_that_are_read_when_needed_are_checked_too(images, monkeypatch):
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    os.mkfifo(images / "a" / "x.png")
    splits = load_images(DataConfig(path=str(images)))
    refused(lambda: [part.__getitems__(list(range(len(part)))) for part in splits[:3]], "a/x.png", "pipe")


def test_flipped_bytes_of_an_image_give_a_picture_or_one_line(images):
    from hypothesis import given, settings
    from hypothesis import strategies as some

    picture = images / "a" / "7.png"
    Image.effect_noise((8, 8), 50).convert("RGBA").save(picture, exif=Image.Exif())
    whole = picture.read_bytes()
    config = DataConfig(path=str(images), image_size=4)

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(some.integers(0, len(whole) - 1), some.integers(0, 255), some.booleans())
    def damaged(place, value, cut):
        picture.write_bytes(whole[:place] + bytes([value]) + (b"" if cut else whole[place + 1 :]))
        try:
            images, _ = sources.decode(picture, config, ("PNG",))
            assert images.shape == (1, 4, 4)
        except UserError:
            pytest.fail("says nothing of the file")
        except Exception as error:  # what the reader of a folder turns into one line
            assert error

    damaged()


# ---------------------------------------------------------------- Hugging Face datasets


def hub(folder, images, labels, **types):
    """A local dataset of one Parquet file. types: of its columns."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    columns = {"image": images, "label": labels}
    table = pyarrow.table({name: pyarrow.array(values, type=types.get(name)) for name, values in columns.items()})
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    return DataConfig(source="huggingface", path=str(folder), image_size=4, split_seed=1)


@pytest.fixture
def pixels(images):
    return [(images / label / f"{number}.png").read_bytes() for number in range(8) for label in "ab"]


@pytest.fixture(autouse=True)
def quick_hub(tmp_path_factory, monkeypatch):
    """Datasets of a test are kept with the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))


def test_rows_of_bytes_and_paths_are_read(tmp_path, images, pixels):
    splits = load_images(hub(tmp_path / "bytes", pixels, [0, 1] * 8))
    paths = [str(images / label / f"{number}.png") for number in range(8) for label in "ab"]
    by_path = load_images(hub(tmp_path / "paths", paths, ["a", "b"] * 8))
    assert by_path.classes == ["a", "b"]
    structs = load_images(hub(tmp_path / "structs", [{"bytes": one, "path": None} for one in pixels], [0, 1] * 8))
    for other in (by_path, structs):
        assert all(torch.equal(a.images, b.images) for a, b in zip(splits[:3], other[:3], strict=True))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (POSTSCRIPT, "no PNG, JPEG, WEBP, GIF, BMP or TIFF image"),
        (b"", "no PNG"),
        (b"\x89PNG\r\n\x1a\n", "no PNG"),
        (None, "there is none"),
    ],
)
def test_damaged_rows_are_named_or_counted(bad, reason, tmp_path, pixels, caplog, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    config = hub(tmp_path / "hub", [*pixels[:3], bad, *pixels[3:]], [0, 1] * 8 + [0])
    refused(lambda: load_images(config), "image 3 of", reason, "--data.skip-unreadable")
    config.skip_unreadable = True
    assert sum(len(part) for part in load_images(config)[:3]) == 16
    assert "skipped 1 unreadable" in caplog.text


@pytest.mark.timeout(20)
def test_paths_in_rows_that_are_pipes_or_missing(tmp_path, images):
    os.mkfifo(tmp_path / "pipe.png")
    for bad, reason in ((tmp_path / "pipe.png", "pipe"), (tmp_path / "no.png", "No such file")):
        paths = [*(str(images / "a" / f"{number}.png") for number in range(7)), str(bad)]
        refused(lambda paths=paths: load_images(hub(tmp_path / "hub", paths, [0, 1] * 4)), "image 7 of", bad, reason)


def test_a_column_that_holds_no_images(tmp_path):
    refused(lambda: load_images(hub(tmp_path / "hub", list(range(16)), [0, 1] * 8)), "column 'image'", "no images")


@pytest.mark.parametrize(
    ("labels", "row", "got"),
    [
        ([0.0, 1.0] * 8, 0, "got 0.0 (float)"),
        ([0, 1] * 7 + [0, None], 15, "got None (NoneType)"),
        ([[0], [1]] * 8, 0, "got [0] (list)"),
        ([0, 1] * 7 + [10**12, 1], 14, "got 1000000000000"),
        ([0, 1] * 7 + [0, 2**63 - 1], 15, "got 9223372036854775807"),
        ([0, 1] * 7 + [0, -3], 15, "got -3"),
        ([None] * 16, 0, "got None"),
    ],
)
def test_labels_that_are_no_number_of_a_class(labels, row, got, tmp_path, pixels):
    refused(lambda: load_images(hub(tmp_path / "hub", pixels, labels)), "column 'label'", f"row {row} ", "'train'", got)


def test_labels_that_are_text_with_a_missing_one(tmp_path, pixels):
    refused(
        lambda: load_images(hub(tmp_path / "hub", pixels, ["a", "b"] * 7 + ["a", None])), "column 'label'", "row 15"
    )


def test_a_single_class_keeps_its_message(images):
    for path in (images / "b").iterdir():
        path.unlink()
    refused(lambda: load_images(DataConfig(path=str(images))), images / "b", "holds no readable PNG or JPEG image")
    (images / "b").rmdir()
    refused(lambda: dblocks.load_images(DataConfig(path=str(images))), "at least two sub-folders", "only 'a'")
