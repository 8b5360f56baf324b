"""Text: tokenizers, sources, splits, windows, cache."""

import json

import numpy as np
import pytest
import torch

import diffusionblocks as dblocks
from diffusionblocks.data.text import corpora
from diffusionblocks.data.text import splits as text
from diffusionblocks.data.text.corpora import TextConfig, documents
from diffusionblocks.data.text.splits import TextData, load_text, units
from diffusionblocks.data.text.tokenizers import Bytes, Characters, load_tokenizer
from diffusionblocks.evaluation.judges import distinct_2, entropy
from diffusionblocks.tasks.prompts import start_of

POEM = "One two, three: 4 small Birds sit in the tree.\n"


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    for number in range(12):
        path = root / f"part{number % 2}" / f"text{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {number} " + POEM * (number % 4 + 2))
    (root / "ignored.bin").write_bytes(b"\xff\xfe")
    return root


def config(where="", **changes):
    cache = {"cache_dir": str(where / "cache")} if where else {}
    return TextConfig(**{"length": 16, "tokenizer": "bytes", **cache, **changes})


def make_tokenizer(folder, mask=False):
    """A small word-level tokenizer in the format of the Hugging Face hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", *sorted(set(POEM.replace("\n", "").replace(",", " ,").replace(":", " :").split()))]
    own = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    extra = {"mask_token": "<m>"} if mask else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", eos_token="</s>", **extra)
    fast.save_pretrained(folder)
    return str(folder)


# ---------------------------------------------------------------- tokenizers


def test_characters_follow_the_protocol_of_text8():
    tokenizer = Characters()
    assert tokenizer.decode(tokenizer.encode(POEM)) == "one two three four small birds sit in the tree"
    plain = "already plain text stays"
    assert tokenizer.decode(tokenizer.encode(plain)) == plain
    assert tokenizer.encode("az ").tolist() == [0, 25]
    assert tokenizer.decode([0, tokenizer.mask_id, 26, 25]) == "a_ z"


def test_bytes_are_a_round_trip():
    tokenizer = Bytes()
    ids = tokenizer.encode("naïve ✓\n")
    assert tokenizer.decode(ids.tolist()) == "naïve ✓\n" and ids.max() < 256
    assert tokenizer.size == tokenizer.mask_id + 1


def test_a_tokenizer_without_a_mask_gets_one_and_says_so(tmp_path, caplog):
    with caplog.at_level("INFO", logger="diffusionblocks"):
        tokenizer = load_tokenizer(make_tokenizer(tmp_path / "plain"))
    assert "has no mask token" in caplog.text
    assert tokenizer.mask_id == tokenizer.size - 1
    ids = tokenizer.encode("two small Birds").tolist()
    assert tokenizer.decode([ids[0], tokenizer.mask_id, ids[2]]) == "two _ Birds"
    caplog.clear()
    assert load_tokenizer(make_tokenizer(tmp_path / "with", mask=True)).mask_id == tokenizer.mask_id
    assert "mask" not in caplog.text


def test_an_unknown_tokenizer_says_what_there_is():
    with pytest.raises(dblocks.UserError, match="'characters', 'bytes', or the name or folder"):
        load_tokenizer("/nowhere/at-all")


# ---------------------------------------------------------------- sources


def test_every_source_gives_the_same_documents(folder, tmp_path):
    import pyarrow
    import pyarrow.parquet

    expected = [path.read_text() for path in sorted(folder.rglob("*.txt"))]
    rows = [{"content": content} for content in expected]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    hub = tmp_path / "hub"
    hub.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), hub / "train-00000.parquet")
    found = {
        "folder": TextConfig(path=str(folder)),
        "jsonl": TextConfig(path=str(tmp_path / "rows.jsonl"), text_key="content"),
        "parquet": TextConfig(path=str(tmp_path / "rows.parquet"), text_key="content"),
        "huggingface": TextConfig(source="huggingface", path=str(hub), text_key="content"),
    }
    for kind, own in found.items():
        assert corpora.source_of(own) == kind
        assert [content for _, content in documents(own)] == expected
    limited = TextConfig(path=str(folder), max_documents=3)
    assert [content for _, content in documents(limited)] == expected[:3]


def test_embedded_texts_are_real():
    prose = dict(documents(TextConfig()))
    assert len(prose) > 60 and "lambda" in prose["lambda"]
    name, code = next(iter(documents(TextConfig(source="stdlib"))))
    assert name.endswith(".py") and "import" in code


def test_a_long_file_is_read_in_pieces_that_lose_nothing(tmp_path, monkeypatch):
    path = tmp_path / "long.txt"
    path.write_text(POEM * 40 + "é" * 30, encoding="utf-8")
    whole = load_text(config(tmp_path, path=str(path), split="contiguous"))
    monkeypatch.setattr(corpora, "PIECE", 64)
    pieces = [piece for _, piece in documents(TextConfig(path=str(path)))]
    assert len(pieces) > 10 and "".join(pieces) == path.read_text()
    again = load_text(config(tmp_path / "other", path=str(path), split="contiguous"))
    assert np.array_equal(whole.train.tokens, again.train.tokens)
    letters = [
        load_text(config(tmp_path / f"letters{size}", path=str(path), split="contiguous", tokenizer="characters"))
        for size in (64, 1 << 24)
        if not monkeypatch.setattr(corpora, "PIECE", size)
    ]
    assert np.array_equal(letters[0].train.tokens, letters[1].train.tokens)


def test_invalid_text_names_file_and_place(folder, tmp_path):
    bad = folder / "part0" / "bad.txt"
    bad.write_bytes(b"good until \xff here")
    with pytest.raises(dblocks.UserError, match=r"bad\.txt is not valid UTF-8 at byte 11; .*encoding-errors replace"):
        load_text(config(tmp_path, path=str(folder)))
    assert load_text(config(tmp_path, path=str(folder), encoding_errors="replace")).train.num_tokens


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": "/nowhere"}, "there is no file or folder"),
        ({"source": "folder", "path": "/nowhere"}, "not a folder"),
        ({"source": "pydoc"}, "'pydocs'"),
        ({"length": 1}, "at least 2"),
        ({"test_share": 0.0}, "must be above 0 and below 1"),
        ({"validation_share": 0.6, "test_share": 0.4}, "leave nothing to train on"),
        ({"packing": "tight"}, "packing"),
        ({"length": 4_000_000}, "less than one window of 4000000"),
        ({"length": 100_000}, "less than one window of 100000"),
        ({"source": "huggingface", "path": "/no/such/set"}, "cannot load the dataset"),
    ],
)
def test_mistakes_say_what_is_needed(changes, words, tmp_path):
    with pytest.raises(dblocks.UserError, match=words):
        load_text(config(tmp_path, **changes))


def test_a_missing_column_names_those_that_exist(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(dblocks.UserError, match=r"line 1 has no column 'text'.*it has body"):
        load_text(config(tmp_path, path=str(tmp_path / "rows.jsonl")))
    (tmp_path / "rows.jsonl").write_text('{"text": \n')
    with pytest.raises(dblocks.UserError, match="line 1 is not valid JSON"):
        load_text(config(tmp_path, path=str(tmp_path / "rows.jsonl")))


# ---------------------------------------------------------------- splits and windows


def test_documents_are_split_whole_and_always_alike(folder, tmp_path):
    first, second = (load_text(config(tmp_path / name, path=str(folder))) for name in "ab")
    spans = [tuple(span) for part in first[:3] for span in part.spans.tolist()]
    assert sorted(spans) == sorted(set(spans)) and len(spans) == 12
    assert [part.spans.tolist() for part in first[:3]] == [part.spans.tolist() for part in second[:3]]
    other = load_text(config(tmp_path / "a", path=str(folder), split_seed=1))
    assert other.test.spans.tolist() != first.test.spans.tolist()


def test_a_contiguous_split_is_the_end_of_the_text(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text(POEM * 40)
    with pytest.raises(dblocks.UserError, match=r"--data\.split contiguous"):
        load_text(config(tmp_path, path=str(path)))
    train, validation, test, *_ = load_text(config(tmp_path, path=str(path), split="contiguous"))
    borders = [part.spans.tolist()[0] for part in (train, validation, test)]
    assert borders[0][1] == borders[1][0] and borders[1][1] == borders[2][0] and borders[0][0] == 0
    assert test.num_tokens / (borders[2][1]) == pytest.approx(0.1, abs=0.01)


def test_windows_of_a_stream_are_the_documents_one_after_the_other():
    tokens = np.arange(100)
    data = TextData(tokens, np.array([[0, 7], [20, 41], [50, 55]]), 10)
    expected = [*range(7), *range(20, 41), *range(50, 55)][:30]
    found = torch.cat([data[index]["input_ids"] for index in range(len(data))])
    assert found.tolist() == expected
    packed = TextData(tokens, np.array([[0, 7], [20, 41], [50, 55]]), 10, "documents")
    assert packed[0]["segments"].tolist() == [0] * 7 + [1] * 3
    assert packed[2]["segments"].tolist() == [1] * 8 + [2] * 2


def test_padded_windows_hold_one_document_each():
    """What would hold a single token is left out."""
    data = TextData(np.arange(100), np.array([[0, 7], [10, 11], [20, 42], [50, 61]]), 10, "padded")
    batch = data.__getitems__(range(len(data)))
    assert batch["attention_mask"].sum(1).tolist() == [7, 10, 10, 2, 10]
    assert batch["input_ids"][0, :7].tolist() == list(range(7))
    assert batch["input_ids"][3, 0] == 40


def test_training_windows_move_and_are_the_same_for_the_same_seed():
    spans = np.array([[0, 1000]])
    still, moved, again, other = (TextData(np.arange(1000), spans, 10, seed=seed) for seed in (None, 0, 0, 1))
    rows = list(range(0, 100, 7))
    starts = [data.__getitems__(rows)["input_ids"][:, 0] for data in (still, moved, again, other)]
    assert starts[0].tolist() == [10 * row for row in rows]
    assert torch.equal(starts[1], starts[2]) and not torch.equal(starts[1], starts[3])
    assert ((starts[1] - starts[0]) >= 0).all() and ((starts[1] - starts[0]) < 10).all()
    last = moved.__getitems__([99] * 20)["input_ids"]
    assert last.max() <= 999


def test_units_turn_tokens_into_characters_and_bytes():
    ids = Bytes().encode("naïve naïve ")
    found = units(TextData(ids, np.array([[0, len(ids)]]), 4), Bytes())
    assert found.bytes == 1.0 and found.characters == pytest.approx(12 / 14)


# ---------------------------------------------------------------- cache


def test_the_cache_is_used_again_and_made_again_when_damaged(folder, tmp_path, caplog, monkeypatch):
    load_text(config(tmp_path, path=str(folder)))
    (cached,) = (tmp_path / "cache").iterdir()
    calls = []
    monkeypatch.setattr(text, "_tokenise", lambda *arguments, own=text._tokenise: calls.append(1) or own(*arguments))
    first = load_text(config(tmp_path, path=str(folder)))
    assert not calls
    content = bytearray((cached / "tokens.npy").read_bytes())
    content[-1] ^= 1
    (cached / "tokens.npy").write_bytes(bytes(content))
    second = load_text(config(tmp_path, path=str(folder)))
    assert calls and "damaged" in caplog.text
    assert np.array_equal(first.train.tokens[:50], second.train.tokens[:50])
    (folder / "part0" / "text00.txt").write_text("something else " * 20)
    load_text(config(tmp_path, path=str(folder)))
    assert len(calls) == 2 and len(list((tmp_path / "cache").iterdir())) == 2


def test_a_failed_tokenisation_leaves_nothing_behind(folder, tmp_path):
    (folder / "part0" / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(dblocks.UserError):
        load_text(config(tmp_path, path=str(folder)))
    assert not list((tmp_path / "cache").iterdir())


# ---------------------------------------------------------------- prompts and measures


def test_units_of_a_hugging_face_tokenizer_leave_out_what_only_marks(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path))
    ids = np.concatenate([tokenizer.encode("two small"), [tokenizer.separator]])
    assert tokenizer.count(ids) == (9, 9)


def test_a_text_that_spells_the_mask_hides_nothing(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, mask=True))
    assert tokenizer.mask_id not in tokenizer.encode("two <m> small").tolist()


def test_folders_are_told_apart_whatever_reads_them(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        rows = [{"text": f"{name} {number} " * 30} for number in range(9)]
        (tmp_path / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in ("huggingface", "jsonl", "pydocs"):  # the last: what the folder holds decides
        found = [
            load_text(config(tmp_path, path=str(tmp_path / name), source=source, split="contiguous")).train.tokens[0]
            for name in "ab"
        ]
        assert found == [ord("a"), ord("b")]


def test_a_giant_among_the_documents_is_said(tmp_path):
    for number, repeats in enumerate((400, 9, 9)):
        (tmp_path / f"{number}.txt").write_text(POEM * repeats)
    with pytest.raises(dblocks.UserError, match=r"too uneven.*9\d%.*contiguous"):
        load_text(config(tmp_path, path=str(tmp_path)))


def test_text_without_white_space_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE", 64)
    (tmp_path / "dense.txt").write_text("é漢字" * 200, encoding="utf-8")
    pieces = [piece for _, piece in documents(TextConfig(path=str(tmp_path / "dense.txt")))]
    assert "".join(pieces) == "é漢字" * 200


def test_prompts_with_blanks():
    tokenizer = Characters()
    assert tokenizer.decode(start_of("the {3} of", tokenizer, 64).tolist()) == "the ___ of"
    assert tokenizer.decode(start_of("the {3} of", tokenizer, 64, 14).tolist()) == "the ___ of____"
    assert tokenizer.decode(start_of("abc", tokenizer, 8).tolist()) == "abc_____"
    assert tokenizer.decode(start_of("", tokenizer, 8).tolist()) == "_" * 8


@pytest.mark.parametrize(
    ("prompt", "length", "words"),
    [
        ("abcdefghi", 0, "the prompt has 9 tokens and exceeds the network's window of 8"),
        ("{20}", 0, "exceeds the network's window"),
        ("abc", 9, "--length 9 exceeds"),
        ("abcdef", 4, "less than the 6 tokens"),
        ("abcdefgh", 0, "leaves nothing to write"),
        ("{100000000000}", 0, "100000000000. of the prompt exceeds"),
        ("???", 0, "no token of"),
    ],
)
def test_prompts_that_do_not_fit(prompt, length, words):
    with pytest.raises(dblocks.UserError, match=words):
        start_of(prompt, Characters(), 8, length)


@pytest.mark.parametrize("blank", ["9", "9" * 30, "9" * 10_000, "0" * 50 + "9"])
def test_a_huge_blank_is_compared_with_the_window(blank):
    with pytest.raises(dblocks.UserError, match="exceeds the network's window of 8 tokens") as found:
        start_of(f"a {{{blank}}}", Characters(), 8)
    assert len(str(found.value)) < 150
    assert len(start_of("{" + "0" * 50 + "5}", Characters(), 8)) == 5


def test_measures_of_texts():
    assert entropy([1, 1, 1]) == 0 and entropy([1, 2, 3, 4]) == pytest.approx(np.log(4))
    assert distinct_2([1, 1, 1, 1]) == pytest.approx(1 / 3) and distinct_2([1, 2, 3]) == 1
