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
from transformers import AutoModelForCausalLM

import diffusionblocks as dblocks
from diffusionblocks.data.images import sources
from diffusionblocks.data.images.splits import DataConfig, load_images
from diffusionblocks.data.text.corpora import TextConfig, documents
from diffusionblocks.data.text.splits import load_text
from diffusionblocks.data.text.tokenizers import load_tokenizer
from diffusionblocks.errors import DiskFull, UserError
from diffusionblocks.system import files
from tests.conftest import make_autoencoder, make_dit, make_llama, make_vit
from tests.language_models import make_pretrained
from tests.unit.test_chat import write_gguf
from tests.unit.test_text import make_tokenizer


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
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "skipped 1 unreadable images; the first" in record.message and "a/x.png" in record.message


def test_unreadable_permissions_are_named(images, monkeypatch):
    real = Image.open

    def closed(path, **options):
        if str(path).endswith("3.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(Image, "open", closed)
    refused(lambda: load_images(DataConfig(path=str(images))), images / "a" / "3.png", "Permission denied")


def test_folders_that_may_not_be_read_are_named(images, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", closed)
    refused(lambda: load_images(DataConfig(path=str(images))), images, "Permission denied")


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

    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
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
        (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
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
        lambda inner: some.lists(inner, max_size=3) | some.dictionaries(
            some.sampled_from(("text", "role", "content", "prompt", "completion", "messages")), inner, max_size=4),
        max_leaves=8,
    )  # fmt: skip
    path, told = tmp_path / "rows.jsonl", []

    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
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
    monkeypatch.setattr("diffusionblocks.data.text.splits._tokenise", lambda *_: pytest.fail("made again"))
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


def test_damaged_caches_of_latents_are_made_again(images, tmp_path, caplog):
    from safetensors.torch import load_file, save_file

    from diffusionblocks.data.images.latents import load_data
    from diffusionblocks.system.cache import file_hash

    vae = make_autoencoder(tmp_path / "vae")
    config = DataConfig(path=str(images), vae=vae, cache_dir=str(tmp_path / "cache"), image_size=8)
    before = load_data(config, device="cpu")
    (index, *_) = sorted((tmp_path / "cache").rglob("index.json"), key=lambda path: path.stat().st_size)
    shard = index.parent / "shard-00000.safetensors"
    smaller = {"latents": load_file(str(shard))["latents"][:1].clone()}

    def of_another_shape():
        save_file(smaller, str(shard))
        files.write_json(index, {**files.read_json(index), shard.name: file_hash(shard)})

    wrong = [lambda text=text: index.write_text(text) for text in ("[]", "[[1, 2]]", '{"a": 5}', '"a"', "\0")]
    for damage in (*wrong, of_another_shape, lambda: shard.unlink()):
        damage()
        caplog.clear()
        after = load_data(config, device="cpu")
        assert "damaged" in caplog.text
        for one, other in zip(before[:3], after[:3], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one.shards, other.shards, strict=True))
    assert not [path for path in (tmp_path / "cache").rglob("*") if str(os.getpid()) in path.name]
    (tmp_path / "file").touch()
    config.cache_dir = str(tmp_path / "file" / "below")
    refused(lambda: load_data(config, device="cpu"), "file/below", "--data.cache-dir FOLDER")


def test_a_changed_weight_of_the_feature_network_is_found(images, tmp_path, caplog, monkeypatch):
    from diffusionblocks.evaluation import features

    monkeypatch.setattr(features, "STEPS", 3)
    plain = load_images(DataConfig(path=str(images), image_size=4))
    own = DataConfig(cache_dir=str(tmp_path / "features"))
    first = features.small_network(plain.train, own, 2)
    (path,) = (tmp_path / "features").iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # one bit of a weight
    path.write_bytes(content)
    again = features.small_network(plain.train, own, 2)
    assert "is damaged; it is trained again" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    (tmp_path / "file").touch()
    nowhere = DataConfig(cache_dir=str(tmp_path / "file" / "below"))
    refused(lambda: features.small_network(plain.train, nowhere, 2), "file/below", "--data.cache-dir FOLDER")


# ---------------------------------------------------------------- saved models


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model that was saved, and one of its blocks."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = dblocks.convert(make_vit(num_labels=12), 3)  # more than ten: the names of classes have no order as text
    model.save_pretrained(folder)
    model.save_block(1, folder / "block.safetensors")
    return folder


@pytest.fixture
def model(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut(path, count=40):
    path.write_bytes(path.read_bytes()[:-count])


def old(model):
    """As older versions saved it: no hashes, no seal."""
    description = files.read_json(model / "diffusionblocks.json")
    del description["files"]
    (model / "diffusionblocks.json").write_text(json.dumps(description))
    return description


def test_any_changed_byte_of_a_saved_model_is_found(model):
    for name in ("model.safetensors", "diffusionblocks.json"):
        whole = (model / name).read_bytes()
        for place in np.random.default_rng(0).integers(0, len(whole), 12):
            flip(model / name, int(place))
            message = refused(lambda: dblocks.load(model))
            assert f"{model / name} is damaged" in message or "diffusionblocks.json" in message
            (model / name).write_bytes(whole)
        cut(model / name)
        refused(lambda: dblocks.load(model), model / name, "is damaged")
        (model / name).write_bytes(b"")
        refused(lambda: dblocks.load(model), model / name, "is damaged")
        (model / name).unlink()
        refused(lambda: dblocks.load(model), model, "is missing")
        (model / name).write_bytes(whole)
    loaded = dblocks.load(model)
    flip(model / "model.safetensors", -1)
    refused(lambda: loaded.start_from(model), "model.safetensors is damaged")


def test_models_and_blocks_that_were_saved_before_are_read(model):
    from safetensors import safe_open
    from safetensors.torch import save_file

    whole = dblocks.load(model)
    old(model)
    loaded = dblocks.load(model)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), loaded.parameters(), strict=True))
    with safe_open(str(model / "block.safetensors"), "pt") as stream:
        facts = {name: fact for name, fact in stream.metadata().items() if name != "blake2b"}
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    save_file(tensors, str(model / "old.safetensors"), metadata=facts)
    assert loaded.load_block(model / "old.safetensors") == 1
    cut(model / "model.safetensors")
    refused(lambda: dblocks.load(model), model / "model.safetensors", "is damaged")


@pytest.mark.parametrize(
    "change",
    [
        lambda description: [],
        lambda description: "a",
        lambda description: {},
        lambda description: {**description, "blocks": "three"},
        lambda description: {**description, "source": []},
        lambda description: {**description, "source": {}},
        lambda description: {**description, "source": {"class": 5, "config": {}}},
        lambda description: {**description, "files": "a"},
        lambda description: {**description, "files": {"model.safetensors": 5}},
        lambda description: {**description, "blocks": {**description["blocks"], "num_blocks": "a"}},
        lambda description: {**description, "blocks": {**description["blocks"], "layers_per_block": {"a": []}}},
        lambda description: {
            **description,
            "source": {**description["source"], "config": {**description["source"]["config"], "hidden_size": "a"}},
        },
    ],
)
def test_descriptions_of_a_wrong_shape(change, model):
    (model / "diffusionblocks.json").write_text(json.dumps(change(old(model))))
    refused(lambda: dblocks.load(model), model)


def test_any_changed_byte_of_a_block_is_found(model):
    loaded, path = dblocks.load(model), model / "block.safetensors"
    before, whole = [parameter.clone() for parameter in loaded.parameters()], path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 30):
        flip(path, int(place))
        refused(lambda: loaded.load_block(path), f"{path} is damaged")
        path.write_bytes(whole)
    for damage in (cut, lambda path: path.write_bytes(b"")):
        damage(path)
        refused(lambda: loaded.load_block(path), f"{path} is damaged")
    assert all(torch.equal(a, b) for a, b in zip(before, loaded.parameters(), strict=True))
    path.write_bytes(whole)
    assert loaded.load_block(path) == 1


def test_a_full_disk_keeps_the_model_that_was_there(model, monkeypatch):
    import safetensors.torch

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    loaded, before = dblocks.load(model), sorted(path.name for path in model.iterdir())
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    for save in (lambda: loaded.save_pretrained(model), lambda: loaded.save_block(1, model / "block.safetensors")):
        with pytest.raises(DiskFull):
            save()
    assert sorted(path.name for path in model.iterdir()) == before
    dblocks.load(model).load_block(model / "block.safetensors")


def test_how_a_whole_network_is_called_is_sealed(tmp_path):
    from diffusionblocks.blocks.kinds import whole_network
    from diffusionblocks.networks.registry import take_apart

    whole_network(take_apart(make_dit()), dblocks.BlocksConfig(), 2).save_pretrained(tmp_path / "whole")
    assert files.read_json(tmp_path / "whole" / "denoiser.json")["preconditioning"] == "edm"
    flip(tmp_path / "whole" / "denoiser.json", 30)
    refused(lambda: files.read_json(tmp_path / "whole" / "denoiser.json"), "is damaged")


# ---------------------------------------------------------------- pretrained networks


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    for name, make in (("llama", make_llama), ("vit", make_vit), ("dit", make_dit)):
        make().save_pretrained(folder / name)
    return folder


def weights_of(folder):
    return next(folder.glob("*.safetensors"))


def rewritten(change):
    def write(folder):
        from safetensors.torch import load_file, save_file

        save_file(change(load_file(str(weights_of(folder)))), str(weights_of(folder)), metadata={"format": "pt"})

    return write


def with_config(**changes):
    def write(folder):
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in config.items() if value != "left out"}))

    return write


def as_pickle(folder):
    path, name = weights_of(folder), "pytorch_model.bin"
    torch.save({"a": torch.zeros(1)}, folder / (name if path.stem == "model" else f"diffusion_{name}"))
    path.unlink()


NETWORKS = {
    "cut weights": (lambda folder: cut(weights_of(folder)), "damaged"),
    "weights cut in the header": (lambda folder: weights_of(folder).write_bytes(b"\x50\0\0\0\0\0\0\0{"), "damaged"),
    "empty weights": (lambda folder: weights_of(folder).write_bytes(b""), "damaged"),
    "a flipped length": (lambda folder: flip(weights_of(folder), 7), "damaged"),
    "a flipped header": (lambda folder: flip(weights_of(folder), 12), ""),
    "no weights": (lambda folder: weights_of(folder).unlink(), "no weights as safetensors"),
    "pickled weights": (as_pickle, "other files (.bin) may run code"),
    "weights of other names": (
        rewritten(lambda tensors: {f"x.{name}": tensor for name, tensor in tensors.items()}),
        "not those of its config",
    ),
    "half of the weights": (
        rewritten(lambda tensors: dict(sorted(tensors.items())[: len(tensors) // 2])),
        "not those of its config",
    ),
    "weights of another shape": (
        rewritten(lambda tensors: {name: tensor[:1].clone() for name, tensor in tensors.items()}),
        "not those of its config",
    ),
    "more layers": (with_config(num_hidden_layers=9, num_layers=9), "not those of its config"),
    "no layers": (with_config(num_hidden_layers=0, num_layers=0), "num_"),
    "too many layers": (with_config(num_hidden_layers=10**9, num_layers=10**9), "num_"),
    "layers that are a list": (with_config(num_hidden_layers=[1], num_layers=[1]), "num_"),
    "a width that is text": (with_config(hidden_size="a", attention_head_dim="a"), ""),
    "a negative width": (with_config(hidden_size=-5, attention_head_dim=-5), ""),
    "another activation": (with_config(hidden_act="nope", activation_fn="nope"), ""),
    "no type": (with_config(model_type="left out", _class_name="left out"), ""),
    "types that are numbers": (with_config(model_type=5, _class_name=5, architectures=5), ""),
    "a config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "a config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), ""),
    "a config that is no text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "not valid JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), ""),
}


@pytest.mark.parametrize("name", ["llama", "vit", "dit"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_damaged_pretrained_networks_are_one_line(kind, name, networks, tmp_path, monkeypatch):
    from diffusionblocks.networks.registry import pretrained_config

    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    folder = Path(shutil.copytree(networks / name, tmp_path / "network"))
    damage, reason = NETWORKS[kind]
    damage(folder)
    message = refused(lambda: pretrained_config(str(folder)).load(str(folder)), reason)
    assert str(folder) in message or "config of the" in message or "are not supported" in message


@pytest.mark.parametrize(
    "kind",
    ["cut weights", "no weights", "pickled weights", "half of the weights", "a config that is a list", "a number"],
)
def test_damaged_autoencoders_are_one_line(kind, tmp_path, monkeypatch):
    from diffusionblocks.data.images.latents import Autoencoder

    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    vae = Path(make_autoencoder(tmp_path / "vae"))
    (NETWORKS[kind][0] if kind in NETWORKS else with_config(block_out_channels=5))(vae)
    refused(lambda: Autoencoder(DataConfig(vae=str(vae), image_size=8), "cpu"), vae)


def test_a_new_readout_is_no_damage(networks):
    from diffusionblocks.networks.registry import pretrained_config

    vit = pretrained_config(str(networks / "vit"))
    vit.config.num_labels = 7
    assert vit.load(str(networks / "vit")).classifier.out_features == 7
    dit = pretrained_config(str(networks / "dit")).changed(num_embeds_ada_norm=7)
    assert dit.load(str(networks / "dit")).config.num_embeds_ada_norm == 7


def test_an_adapter_of_peft_is_no_network(networks, tmp_path):
    from diffusionblocks.networks.registry import pretrained_config

    (tmp_path / "adapter_config.json").write_text("{")
    refused(lambda: pretrained_config(str(tmp_path)), tmp_path, "holds a peft adapter, no network")


TOKENIZERS = {
    "cut": lambda folder: cut(folder / "tokenizer.json", 100),
    "empty": lambda folder: (folder / "tokenizer.json").write_text(""),
    "a list": lambda folder: (folder / "tokenizer.json").write_text("[]"),
    "no text": lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff"),
    "missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "a huge number of a token": lambda folder: vocabulary(folder).update(tree=10**9),
    "a negative number of a token": lambda folder: vocabulary(folder).update(tree=-1),
    "a config that is a list": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "a length that is text": lambda folder: (folder / "tokenizer_config.json").write_text(
        json.dumps({**json.loads((folder / "tokenizer_config.json").read_text()), "model_max_length": "a"})
    ),
}


class vocabulary:
    """Changes the vocabulary in a tokenizer.json."""

    def __init__(self, folder):
        self.path = folder / "tokenizer.json"

    def update(self, **tokens):
        content = json.loads(self.path.read_text())
        content["model"]["vocab"].update(tokens)
        self.path.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_damaged_tokenizers_are_one_line(kind, tmp_path):
    make_tokenizer(tmp_path / "own")
    TOKENIZERS[kind](tmp_path / "own")
    refused(lambda: load_tokenizer(str(tmp_path / "own"), mask=False), tmp_path / "own")


def test_a_gguf_file_that_is_cut(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from diffusionblocks.networks import pretrained

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_pretrained(tmp_path / "own", layers=1)
    network, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "own"),
        load_tokenizer(str(tmp_path / "own"), False),
    )
    write_gguf(tmp_path / "net.gguf", network, tokenizer.own)
    whole = (tmp_path / "net.gguf").read_bytes()
    for count in (30, len(whole) // 2, len(whole) - 100):
        (tmp_path / "net.gguf").write_bytes(whole[:count])
        refused(lambda: pretrained.local(str(tmp_path / "net.gguf")), tmp_path / "net.gguf", "cannot read the network")
    assert not list((tmp_path / "cache" / "diffusionblocks").iterdir())
    (tmp_path / "net.gguf").write_bytes(whole)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "net.gguf"))
    refused(lambda: pretrained.local(str(tmp_path / "net.gguf")), "set XDG_CACHE_HOME")
