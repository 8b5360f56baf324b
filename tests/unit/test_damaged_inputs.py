"""Damaged and hostile inputs: one line that names the file, nothing that hangs, nothing half written."""

import errno
import json
import os
import shutil
import socket
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionblocks import files
from diffusionblocks.data import sources
from diffusionblocks.data.corpora import TextConfig, documents
from diffusionblocks.data.images import DataConfig, load_images
from diffusionblocks.data.text import load_text
from diffusionblocks.errors import DiskFull, UserError


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
    read, told = sources._Files([picture], {}, DataConfig(path=str(images), image_size=4)), []

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(some.integers(0, len(whole) - 1), some.integers(0, 255), some.booleans())
    def damaged(place, value, cut):
        picture.write_bytes(whole[:place] + bytes([value]) + (b"" if cut else whole[place + 1 :]))
        try:
            assert read(0).shape == (1, 4, 4)
        except UserError as error:
            told.append(str(error))

    damaged()
    assert told and all(str(picture) in message and "\n" not in message for message in told)


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
    refused(lambda: load_images(DataConfig(path=str(images))), "at least two sub-folders", "only 'a'")


# ---------------------------------------------------------------- text


def text(path, where, **changes):
    settings = {"length": 16, "tokenizer": "bytes", "split": "contiguous", "cache_dir": str(where / "cache")}
    return TextConfig(path=str(path), **{**settings, **changes})


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


GOOD = {"text": "words that are enough for windows " * 10}
ROWS = {
    "a list": ([1, 2], "is no object with columns but a list"),
    "a number": (5, "is no object with columns but a int"),
    "null": ("null", "is no object with columns but a NoneType"),
    "not JSON": ('{"text": ', "is not valid JSON"),
    "deep": ("[" * 100_000, "is not valid JSON"),
    "half a character": ('{"text": "a\\ud800b"}', "a lone surrogate"),
    "a numeric text": ({"text": 5}, "column 'text' must be text, got 5 (int)"),
    "a false text": ({"text": False}, "must be text, got False (bool)"),
    "a list as text": ({"text": ["a"]}, "must be text, got ['a'] (list)"),
    "an object as text": ({"text": {"a": 1}}, "must be text, got {'a': 1} (dict)"),
    "invalid UTF-8": ('{"text": "\udcff"}', "not valid UTF-8 at byte"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_damaged_rows_of_text_are_named_or_counted(kind, tmp_path, caplog):
    row, reason = ROWS[kind]
    path = tmp_path / "rows.jsonl"
    content = "\n".join(json.dumps(one) if not isinstance(one, str) else one for one in (GOOD, row, GOOD))
    path.write_bytes(content.encode("utf-8", errors="surrogateescape"))
    where = path if kind == "invalid UTF-8" else f"{path}, line 2"
    refused(lambda: load_text(text(path, tmp_path)), where, reason, "--data.skip-unreadable")
    assert not list((tmp_path / "cache").iterdir())
    for _ in range(2):  # made, and read from the cache
        caplog.clear()
        splits = load_text(text(path, tmp_path, skip_unreadable=True))
        assert len(splits.train.tokens) == 2 * (len(GOOD["text"]) + 1)
        (record,) = caplog.records
        assert "left out 1 unreadable rows or files of the text; the first: " in record.message
        assert reason in record.message and "skip" not in record.message


def test_missing_texts_are_empty_and_zero_bytes_are_text(tmp_path):
    path = lines(tmp_path / "rows.jsonl", GOOD, {"text": None}, {"text": "a\0b"}, GOOD)
    assert [content for _, content in documents(text(path, tmp_path))][1:3] == ["", "a\0b"]


def test_half_characters_can_be_replaced(tmp_path):
    path = lines(tmp_path / "rows.jsonl", '{"text": "a\\ud800b \\ud83d\\ude00"}')
    assert [content for _, content in documents(text(path, tmp_path, encoding_errors="replace"))] == [
        "a\ufffdb \U0001f600"
    ]


def test_a_text_of_which_nothing_can_be_read_says_why(tmp_path):
    path = lines(tmp_path / "rows.jsonl", *[{"txt": "a"}] * 20)
    refused(lambda: load_text(text(path, tmp_path, skip_unreadable=True)), "no row or file", "has no column 'text'")
    assert "repair" not in refused(lambda: load_text(text(path, tmp_path)), "has no column 'text'")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", ["pipe", "broken link", "device", "socket"])
def test_what_is_no_file_in_a_folder_of_text_is_never_opened(kind, suffix, tmp_path, caplog):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "texts"
    folder.mkdir()
    good = folder / f"good.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD]), good)
    else:
        lines(good, GOOD if suffix == "jsonl" else GOOD["text"])
    make, reason = DAMAGED[kind]
    make(folder / f"x.{suffix}")
    refused(lambda: load_text(text(folder, tmp_path)), folder / f"x.{suffix}", reason, "--data.skip-unreadable")
    load_text(text(folder, tmp_path, skip_unreadable=True))
    assert "left out 1 unreadable" in caplog.text and f"x.{suffix}" in caplog.text


def test_files_that_may_not_be_read_are_named(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    lines(tmp_path / "texts" / "a.txt", GOOD["text"])
    real = Path.open

    def closed(path, *arguments, **options):
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", closed)
    refused(lambda: load_text(text(tmp_path / "texts", tmp_path)), "a.txt", "Permission denied")


def parquet(path, values, kind=None, **options):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": pyarrow.array(values, type=kind)})
    pyarrow.parquet.write_table(table, path, **options)
    return path


def test_parquet_with_damaged_pages(tmp_path, caplog):
    texts = [f"{number} {GOOD['text']}" for number in range(30)]
    path = parquet(tmp_path / "a.parquet", texts, row_group_size=10, compression="none", write_page_checksum=True)
    content = bytearray(path.read_bytes())
    place = content.find(b"14 words")
    content[place : place + 40] = os.urandom(40)
    path.write_bytes(content)
    refused(lambda: load_text(text(path, tmp_path)), path, "from row 11 to 20", "--data.skip-unreadable")
    found = [content for _, content in documents(text(path, tmp_path, skip_unreadable=True))]
    assert found == texts[:10] + texts[20:]
    assert "from row 11 to 20" in caplog.text


def test_parquet_that_is_none_or_cut(tmp_path):
    path = parquet(tmp_path / "a.parquet", [GOOD["text"]])
    whole = path.read_bytes()
    for content in (b"", b"no parquet", whole[:-20], whole[:4] + whole[20:], b"PAR1" + b"\xff" * 30 + b"PAR1"):
        path.write_bytes(content)
        refused(lambda: load_text(text(path, tmp_path)), path)


def test_columns_of_parquet_that_are_no_text(tmp_path):
    import pyarrow

    path = tmp_path / "a.parquet"
    for values in ([1, 2], [1.5], [["a"]], [True]):
        refused(
            lambda values=values: load_text(text(parquet(path, values), tmp_path)), f"{path}, row 1", "must be text"
        )
    found = documents(text(parquet(path, [b"na\xc3\xafve", None]), tmp_path))
    assert [content for _, content in found] == ["naïve", ""]
    invalid = pyarrow.array([b"whole", b"\xff"]).view(pyarrow.string())  # as pyarrow writes it without a check
    for values in ([b"whole", b"\xff"], invalid):
        parquet(path, values)
        refused(lambda: list(documents(text(path, tmp_path))), f"{path}, row 2", "not valid UTF-8 at byte 0")
        replaced = documents(text(path, tmp_path, encoding_errors="replace"))
        assert [content for _, content in replaced] == ["whole", "\ufffd"]


def test_a_dataset_whose_later_rows_cannot_be_read(tmp_path, monkeypatch, caplog):
    import datasets

    def rows():
        yield from [GOOD] * 3
        raise OSError("Couldn't deserialize thrift\nand more")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    config = text("hub/name", tmp_path, source="huggingface")
    refused(lambda: list(documents(config)), "hub/name after row 3: Couldn't deserialize thrift; ")
    config.skip_unreadable = True
    assert len(list(documents(config))) == 3 and "left out 1" in caplog.text


TALK = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}
CONVERSATIONS = {
    "no list": ({"messages": "Hello"}, "must be a list of {role, content}"),
    "null": ({"messages": None}, "must be a list of {role, content}, got None"),
    "no objects": ({"messages": ["a"]}, "must be a list of {role, content}"),
    "no role": ({"messages": [{"content": "a"}]}, "must be a list of {role, content}"),
    "a content that is null": ({"messages": [{"role": "user", "content": None}]}, "content of a message must be text"),
    "a role that is a number": ({"messages": [{"role": 5, "content": "a"}]}, "role of a message must be text"),
    "half a character": ('{"messages": [{"role": "user", "content": "\\udc00"}]}', "a lone surrogate"),
    "a prompt that is a number": ({"prompt": 5, "completion": "a"}, "the prompt must be text, got 5"),
    "a completion that is an object": ({"prompt": "a", "completion": {}}, "the completion must be text"),
}


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_conversations_of_a_wrong_shape_are_named_or_counted(kind, tmp_path, caplog):
    row, reason = CONVERSATIONS[kind]
    good = {"messages": list(TALK)} if "messages" in str(row) else {"prompt": "a?", "completion": "b."}
    path = lines(tmp_path / "rows.jsonl", good, row)
    refused(lambda: list(documents(text(path, tmp_path))), f"{path}, line 2", reason)
    assert list(documents(text(path, tmp_path, skip_unreadable=True))) == [(f"{path}, line 1", list(TALK))]
    assert reason in caplog.text


def test_any_line_of_json_gives_a_document_or_one_line(tmp_path):
    from hypothesis import given, settings
    from hypothesis import strategies as some

    values = some.recursive(
        some.none() | some.booleans() | some.floats() | some.integers() | some.text(),
        lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.sampled_from(("text", "role", "content", "prompt", "completion", "messages")), inner, max_size=4),
        max_leaves=8,
    )  # fmt: skip
    path, told = tmp_path / "rows.jsonl", []

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(values)
    def row(value):
        lines(path, json.dumps(value))
        for _, document in documents(text(path, tmp_path, skip_unreadable=True)):
            assert isinstance(document, str | list)
        try:
            list(documents(text(path, tmp_path)))
        except UserError as error:
            told.append(str(error))

    row()
    assert told and all(f"{path}, line 1" in message and "\n" not in message for message in told)


# ---------------------------------------------------------------- caches


@pytest.fixture
def cached(tmp_path):
    """A text with its cache, and what was read from it."""
    path = lines(tmp_path / "rows.jsonl", *[{"text": f"{number} {GOOD['text']}"} for number in range(5)])
    config = text(path, tmp_path)
    splits = load_text(config)
    (folder,) = (tmp_path / "cache").iterdir()
    return config, folder, splits.train


def old_index(change):
    """An index as older versions wrote it: the ends inside."""

    def write(folder):
        index = json.loads((folder / "index.json").read_text())
        own = {"hash": index["hash"], "written": index["written"], "ends": np.load(folder / "ends.npy").tolist()}
        (folder / "index.json").write_text(json.dumps(change(own) or own))

    return write


def sealed(name, change):
    def write(folder):
        index = files.read_json(folder / "index.json")
        files.write_json(folder / name, change(index) or index)

    return write


DAMAGES = {
    "a list": lambda folder: (folder / "index.json").write_text("[]"),
    "no JSON": lambda folder: (folder / "index.json").write_text("{"),
    "a changed index": lambda folder: (folder / "index.json").write_text(
        (folder / "index.json").read_text().replace("hash", "hush")
    ),
    "no ends": lambda folder: (folder / "ends.npy").unlink(),
    "ends that are cut": lambda folder: (folder / "ends.npy").write_bytes((folder / "ends.npy").read_bytes()[:-8]),
    "no tokens": lambda folder: (folder / "tokens.npy").unlink(),
    "tokens that are cut": lambda folder: (folder / "tokens.npy").write_bytes(
        (folder / "tokens.npy").read_bytes()[:-8]
    ),
    "answers that are missing": sealed("index.json", lambda index: index | {"conversations": True, "answers": "0"}),
    "old ends that fall": old_index(lambda index: index | {"ends": index["ends"][::-1]}),
    "old ends beyond the tokens": old_index(lambda index: index["ends"].append(10**6)),
    "old ends that are huge": old_index(lambda index: index["ends"].append(10**30)),
    "old ends that are text": old_index(lambda index: index | {"ends": ["a"]}),
    "old ends that are nested": old_index(lambda index: index | {"ends": [[1, 2], [3]]}),
    "no old ends": old_index(lambda index: index | {"ends": []}),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_text_caches_are_made_again(kind, cached, caplog):
    config, folder, before = cached
    tokens = np.array(before.tokens)
    DAMAGES[kind](folder)
    after = load_text(config).train
    assert "is damaged; the text is tokenised again" in caplog.text
    assert np.array_equal(tokens, after.tokens) and np.array_equal(before.ends, after.ends)
    caplog.clear()
    load_text(config)
    assert not caplog.records


def test_caches_of_older_versions_are_read(cached, monkeypatch):
    config, folder, before = cached
    old_index(lambda index: None)(folder)
    (folder / "ends.npy").unlink()
    monkeypatch.setattr("diffusionblocks.data.text._tokenise", lambda *_: pytest.fail("made again"))
    assert np.array_equal(load_text(config).train.ends, before.ends)


class Full:
    """A file on a disk that is full after some bytes."""

    def __init__(self, path, mode="r", room=1000):
        self.stream, self.room = open(path, mode), room  # noqa: SIM115

    def write(self, content):
        self.room -= len(content)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.stream.write(content)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()


@pytest.mark.parametrize("name", ["tokens.npy", "ends.npy"])
def test_a_full_disk_leaves_no_half_cache(name, tmp_path, monkeypatch):
    path, real = lines(tmp_path / "rows.jsonl", *[GOOD] * 5), Path.open

    def full(path, mode="r", *arguments, **options):
        return Full(path, mode, 100) if path.name == name and "w" in mode else real(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DiskFull, match="the disk is full"):
        load_text(text(path, tmp_path))
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.undo()
    load_text(text(path, tmp_path))


@pytest.mark.parametrize("place", ["file/below", "/proc/nowhere", "/dev/null"])
def test_caches_that_cannot_be_written_say_where_and_what_to_do(place, tmp_path):
    (tmp_path / "file").touch()
    path = lines(tmp_path / "rows.jsonl", GOOD)
    config = text(path, tmp_path, cache_dir=str(tmp_path / place))
    refused(lambda: load_text(config), tmp_path / place, "cannot write the cache", "--data.cache-dir FOLDER")


def test_what_killed_processes_left_is_removed_and_what_others_make_is_not(cached):
    config, folder, _ = cached
    host, dead = socket.gethostname(), subprocess.Popen(["true"])
    dead.wait()
    stays = [f"{folder.name}.{host}.{os.getppid()}", f"{folder.name}.another-host.{dead.pid}", f"text-other.{dead.pid}"]
    for name in (*stays, f"{folder.name}.{host}.{dead.pid}", f"{folder.name}.{dead.pid}"):
        (folder.parent / name).mkdir()
        (folder.parent / name / "raw").touch()
    shutil.rmtree(folder)
    load_text(config)
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted([folder.name, *stays])
