"""Where documents of text come from. A source is read one document at a time, so it may be larger than memory."""

from __future__ import annotations

import json
import stat
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusionblocks.data.text.chat import FORMATS, Conversation, columns_of, conversation, format_of
from diffusionblocks.data.text.rows import LeftOut, say, text_of
from diffusionblocks.errors import DiskFull, UserError, first_line, nearest
from diffusionblocks.options import check_options, option
from diffusionblocks.system.files import explained

SUFFIXES = (".txt", ".md", ".rst", ".py")
PIECE = 1 << 24  # bytes of a long file that are read at once
OMITTED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "pydoc_data"}


@dataclass(kw_only=True)
class TextConfig:
    """Where text comes from, and how it becomes windows of tokens.

    Args:
        source: Where samples come from; a path alone is enough. `pydocs` (CPython's own documentation), `stdlib` (code
            of the running interpreter's standard library), `folder`, `file` (one text file, such as text8), `jsonl`,
            `parquet` or `huggingface`. Giving only a path means `folder`, or what the file's ending says.
        path: Folder, file, or name of a Hugging Face dataset.
        text_key: Column that holds the text.
        format: What a row of jsonl, parquet or huggingface holds. `text`, `messages` (a conversation: a list of role
            and content; loss on the assistant's answers alone) or `prompt` (a question, and its `completion`);
            `auto` = what its columns say.
        messages_key: Column that holds a conversation.
        subset: Configuration of a Hugging Face dataset.
        suffixes: Endings of the files that a folder is searched for; empty = .txt, .md, .rst and .py.
        tokenizer: characters, bytes, or name or folder of a Hugging Face tokenizer. `characters` are the 27 of text8;
            `auto` is that of model.pretrained.
        trust_remote_code: Run Python code that the tokenizer's repository brings.
        length: Tokens of a window, T.
        packing: How documents become windows. `stream` (windows of the documents' tokens one after the other),
            `documents` (the same windows, but tokens attend only inside their own document), `padded` (a window holds
            one document, or a piece of one), or `auto`: padded for conversations, else stream.
        too_long: What happens to padded documents that are longer than a window. `auto` = truncate conversations,
            split text.
        split: What the splits are made of. `documents` (whole documents, drawn with `split_seed`) or `contiguous` (the
            end of the text: text8).
        validation_share: Share of the tokens that is validated on.
        test_share: Share of the tokens that is tested on.
        split_seed: Seed of the splits.
        max_documents: Documents that are read, at most; 0 = all.
        evaluated: Windows of a split that are evaluated, taken evenly; 0 = all.
        general: A second text that shows what adapting a network forgets, pydocs, stdlib or a path. `evaluated` windows
            of it are measured beside the test text; empty = none.
        encoding_errors: What happens at invalid UTF-8. `strict` is an error that names the place.
        skip_unreadable: Leave out what cannot be read instead of stopping. Of a long file what follows the damage.
        cache_dir: Folder for latents or tokens; empty = below the user's cache folder.
    """

    source: str = "pydocs"
    path: str = ""
    text_key: str = "text"
    format: str = option("auto", choices=FORMATS)
    messages_key: str = "messages"
    subset: str = ""
    suffixes: list[str] = option([])
    tokenizer: str = "characters"
    trust_remote_code: bool = False
    length: int = option(128, least=2)
    packing: str = option("stream", choices=("stream", "documents", "padded", "auto"))
    too_long: str = option("auto", choices=("auto", "split", "truncate", "skip"))
    split: str = option("documents", choices=("documents", "contiguous"))
    validation_share: float = option(0.1, above=0, below=1)
    test_share: float = option(0.1, above=0, below=1)
    split_seed: int = 0
    max_documents: int = option(0, least=0)
    evaluated: int = option(0, least=0)
    general: str = ""
    encoding_errors: str = option("strict", choices=("strict", "replace"))
    skip_unreadable: bool = False
    cache_dir: str = ""


Document = str | Conversation
Documents = Iterator[tuple[str, Document]]  # with a name; pieces of one text follow one another under the same name


def _pydocs(config: TextConfig, left: LeftOut) -> Documents:
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def _stdlib(config: TextConfig, left: LeftOut) -> Documents:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not OMITTED & set(relative.parts[:-1]):
            yield str(relative), path.read_text(encoding="utf-8", errors="replace")


def _folder(config: TextConfig, left: LeftOut) -> Documents:
    root = Path(config.path)
    if not config.path or not root.is_dir():
        raise UserError(f"data.path must be a folder with text files; {config.path!r} is not a folder")
    suffixes = tuple(config.suffixes) or SUFFIXES
    found = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in suffixes and not path.is_dir()]
    if not found:
        raise UserError(f"{root} holds no file ending in {', '.join(suffixes)} (see --data.suffixes)")
    for path in _readable(found, left):
        for piece in _pieces(path, config.encoding_errors, left):
            yield str(path.relative_to(root)), piece


def _file(config: TextConfig, left: LeftOut) -> Documents:
    for piece in _pieces(_existing(config), config.encoding_errors, left):
        yield config.path, piece


def _jsonl(config: TextConfig, left: LeftOut) -> Documents:
    for path in _readable(_files(config, "*.jsonl"), left):
        start = 0
        for number, line in enumerate(_lines(path, left)):
            where = f"{path}, line {number + 1}"
            text = _decoded(line, path, start, config.encoding_errors, left)
            start += len(line)
            if text and text.strip() and (row := _json(text, where, left)) is not None:
                yield from _documents_of(row, config, where, where, left)


def _lines(path: Path, left: LeftOut) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            yield from stream
    except OSError as error:
        left(f"cannot read {path}: {error.strerror or first_line(error)}")


def _json(text: str, where: str, left: LeftOut) -> dict[str, Any] | None:
    """The object in a line, or None where it is left out."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        left(f"{where} is not valid JSON: {first_line(error)}")
        return None
    if not isinstance(row, dict):
        left(f"{where} is no object with columns but a {type(row).__name__}: {ascii(row)[:60]}")
        return None
    return row


def _parquet(config: TextConfig, left: LeftOut) -> Documents:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("Parquet files are read with pyarrow: pip install 'diffusionblocks[text]'") from None
    damaged = (OSError, ValueError, pyarrow.ArrowException)
    for path in _readable(_files(config, "*.parquet"), left):
        try:
            file = parquet.ParquetFile(path, page_checksum_verification=True)
            names = file.schema_arrow.names
        except damaged as error:
            left(f"cannot read {path}: {first_line(error)}")
            continue
        columns = columns_of(_format(config, names, str(path)), config.text_key, config.messages_key)
        number = 0
        for group in range(file.num_row_groups):
            after = number + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                    for row in _rows(batch):
                        number += 1
                        where = f"{path}, row {number}"
                        yield from _documents_of(row, config, f"{path} {number}", where, left)
            except damaged as error:
                if isinstance(error, UserError):
                    raise
                left(f"cannot read {path} from row {number + 1} to {after}: {first_line(error)}")
            number = after


def _rows(batch: Any) -> list[dict[str, Any]]:
    """Rows of a batch of pyarrow; texts that are not UTF-8 as bytes."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        import pyarrow

        plain = (pyarrow.string(), pyarrow.large_string())
        fields = [field.with_type(pyarrow.binary()) if field.type in plain else field for field in batch.schema]
        return batch.cast(pyarrow.schema(fields)).to_pylist()


def _huggingface(config: TextConfig, left: LeftOut) -> Documents:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "Hugging Face datasets are read with the package datasets: pip install 'diffusionblocks[text]'"
        ) from None
    try:
        rows = datasets.load_dataset(config.path, config.subset or None, split="train", streaming=True)
        iterator = iter(rows)
        first = next(iterator, None)
    except Exception as error:  # the library raises many kinds for the same few causes
        if isinstance(full := explained(error), DiskFull):
            raise full from None
        raise UserError(
            f"cannot load the dataset {config.path!r} ({type(error).__name__}: {first_line(error)}); "
            "without a network, pass a local folder with --data.path"
        ) from None
    number = 0
    while first is not None:
        number += 1
        where = f"{config.path}, row {number}"
        yield from _documents_of(first, config, f"row {number}", where, left)
        try:
            first = next(iterator, None)
        except Exception as error:  # as above
            left(f"cannot read {config.path} after row {number}: {first_line(error)}")
            return


def _documents_of(row: Any, config: TextConfig, name: str, where: str, left: LeftOut) -> Documents:
    """The document of a row, or none where it is left out."""
    kind = ""
    try:
        kind = _format(config, list(row), where)
        if kind == "text":
            what = f"column {config.text_key!r}"
            document: Document = text_of(row[config.text_key], what, where, config.encoding_errors)
        else:
            document = conversation(row, kind, config.messages_key, where, config.encoding_errors)
    except UserError as error:
        if not kind and not left.skip:  # rather an option to set than a row to leave out
            raise
        left(str(error))
        return
    yield name, document


def _format(config: TextConfig, names: list[str], where: str) -> str:
    """What rows with these columns hold. Raises UserError when a column is missing."""
    if config.format == "auto":
        return format_of(names, config.text_key, config.messages_key, where)
    for name in columns_of(config.format, config.text_key, config.messages_key):
        if name not in names:
            raise UserError(
                f"{where} has no column {name!r} (data.format {config.format}); it has {', '.join(names) or 'none'}"
            )
    return config.format


def _files(config: TextConfig, pattern: str) -> list[Path]:
    root = Path(config.path)
    if config.path and root.is_dir():
        return [path for path in sorted(root.rglob(pattern)) if not path.is_dir()]
    return [_existing(config)]


def _readable(paths: list[Path], left: LeftOut) -> Iterator[Path]:
    """Those that are files: a pipe or a device is never opened, reading it may not end."""
    for path in paths:
        try:
            regular = stat.S_ISREG(path.stat().st_mode)
        except OSError as error:
            gone = path.is_symlink() and isinstance(error, FileNotFoundError)
            left(f"cannot read {path}: {'it is a link to a file that does not exist' if gone else error.strerror}")
            continue
        if regular:
            yield path
        else:
            left(f"cannot read {path}: it is no file but a pipe, socket or device")


def _existing(config: TextConfig) -> Path:
    path = Path(config.path)
    if not config.path:
        raise UserError("data.path is not set: pass --data.path FILE")
    if not path.exists():
        raise UserError(f"data.path: there is no file or folder {config.path!r}")
    if not path.is_file():
        raise UserError(f"data.path must be a file; {config.path!r} is not one")
    return path


def _pieces(path: Path, errors: str, left: LeftOut) -> Iterator[str]:
    """The text of a file, a long one in pieces that end at white space; up to what cannot be read where that is left
    out."""
    try:
        with path.open("rb") as stream:
            start, rest = 0, b""
            while read := stream.read(PIECE):
                piece = rest + read
                cut = max(piece.rfind(b" "), piece.rfind(b"\n")) + 1 if len(read) == PIECE else len(piece)
                while cut == 0 or (
                    cut < len(piece) and piece[cut] & 0xC0 == 0x80
                ):  # no white space: between characters
                    cut = cut - 1 if cut else len(piece) - 4
                if (text := _decoded(piece[:cut], path, start, errors, left)) is None:
                    return
                yield text
                start, rest = start + cut, piece[cut:]
            if rest and (text := _decoded(rest, path, start, errors, left)) is not None:
                yield text
    except OSError as error:
        left(f"cannot read {path}: {error.strerror or first_line(error)}")


def _decoded(content: bytes, path: Path, start: int, errors: str, left: LeftOut) -> str | None:
    """Text, or None where it is left out."""
    try:
        return content.decode("utf-8", errors=errors)
    except UnicodeDecodeError as error:
        left(f"{path} is not valid UTF-8 at byte {start + error.start}", "pass --data.encoding-errors replace")
        return None


SOURCES: dict[str, Callable[[TextConfig, LeftOut], Documents]] = {
    "pydocs": _pydocs,
    "stdlib": _stdlib,
    "folder": _folder,
    "file": _file,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "huggingface": _huggingface,
}


def source_of(config: TextConfig) -> str:
    """The source that a configuration means. Raises UserError for an unknown one."""
    if config.source not in SOURCES:
        raise UserError(f"unknown data source {config.source!r}{nearest(config.source, SOURCES)}")
    if not config.path or config.source not in ("pydocs", "stdlib"):
        return config.source
    path = Path(config.path)
    if path.is_dir():
        endings = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
        if endings & set(tuple(config.suffixes) or SUFFIXES):
            return "folder"
        return "jsonl" if ".jsonl" in endings else "parquet" if ".parquet" in endings else "folder"
    return {".jsonl": "jsonl", ".parquet": "parquet"}.get(path.suffix, "file")


def documents(config: TextConfig, left: LeftOut | None = None) -> Documents:
    """Names and texts of a source, in a fixed order. left: counts what is left out, for a caller who says it; else this
    does.

    Raises UserError for what cannot be read.
    """
    check_options("data", config)
    own = LeftOut(config.skip_unreadable) if left is None else left
    count, last = 0, None
    for name, text in SOURCES[source_of(config)](config, own):
        if name != last:
            count, last = count + 1, name
            if config.max_documents and count > config.max_documents:
                break
        yield name, text
    if left is None and own.count:
        say({"count": own.count, "first": own.first})


def identity(config: TextConfig) -> str:
    """Tells sources apart that give different documents, without reading them all."""
    source, path = source_of(config), Path(config.path)
    facts = [source, config.text_key, config.subset, config.max_documents, config.encoding_errors]
    facts += [config.format, config.messages_key, *(["skip_unreadable"] if config.skip_unreadable else [])]
    if source == "pydocs":
        facts += [len(text) for _, text in _pydocs(config, LeftOut(False))]
    elif source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        facts += [f"{path} {path.stat().st_size}" for path in sorted(root.rglob("*.py"))]
    elif source == "folder" and path.is_dir():
        facts += [config.suffixes, *(_facts(p) for p in sorted(path.rglob("*")) if p.is_file())]
    elif path.is_file():
        facts.append(_facts(path))
    else:
        facts += [config.path, *(_facts(p) for p in sorted(path.rglob("*")) if path.is_dir() and p.is_file())]
    return repr(facts)


def _facts(path: Path) -> str:
    return f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}"
