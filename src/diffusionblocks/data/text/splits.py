"""Documents as windows of tokens: tokenised once into a file that is mapped, never loaded, and split by document.

The cache is a folder with tokens.npy (all documents, one after the other), ends.npy (where each ends), of conversations
answers.npy (which tokens are answers), and index.json with their hashes. Its name is a hash of the source and the
tokenizer; a damaged cache is made again.

Shapes: N batch, T positions.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusionblocks.data.text.chat import Conversation, Encoded, encode, template_of
from diffusionblocks.data.text.corpora import TextConfig, documents, identity
from diffusionblocks.data.text.rows import LeftOut, say
from diffusionblocks.data.text.tokenizers import Tokenizer, load_tokenizer
from diffusionblocks.errors import UserError
from diffusionblocks.networks.readout import IGNORED
from diffusionblocks.options import check_options
from diffusionblocks.seeds import derive
from diffusionblocks.system.cache import cache_folder, file_hash, making, publish, writable
from diffusionblocks.system.files import Damaged, read_json, write_json

log = logging.getLogger("diffusionblocks")
COUNTED = 1 << 21  # tokens that are decoded to count their characters


class TextData(Dataset):
    """Windows of T tokens -> dicts `input_ids` [T], and `segments` or `attention_mask` where the packing needs them; of
    conversations also `labels` [T], the same tokens where they are answers and -100 elsewhere.

    Args:
        tokens: all tokens. spans: documents of this split, rows of [start, end), each text ending with its separator.
        length: T. packing: see `TextConfig`.
        seed: None = windows lie side by side (evaluation); else each is moved by a random offset, drawn from the seed
            and from which windows meet in a batch (training; not where windows are padded).
        too_long: what becomes of padded documents of more than T tokens: `split`, `truncate` or `skip` (`long` counts
            them).
        answers: which of all tokens are answers; None = all count. Padded documents without one are left out (`mute`
            counts them).
    """

    def __init__(
        self,
        tokens: np.ndarray,
        spans: np.ndarray,
        length: int,
        packing: str = "stream",
        seed: int | None = None,
        *,
        too_long: str = "split",
        answers: np.ndarray | None = None,
    ) -> None:
        self.tokens, self.length, self.packing, self.seed = tokens, length, packing, seed
        self.answers, self.long, self.mute = answers, 0, 0
        self._chosen: np.ndarray | None = None
        if packing == "padded":
            spans = self._fitted(spans, too_long)
        self.spans = spans
        self.ends = np.cumsum(spans[:, 1] - spans[:, 0])  # in the split's own count of tokens

    @property
    def num_tokens(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def _fitted(self, spans: np.ndarray, too_long: str) -> np.ndarray:
        """Documents that fit a window."""
        long = spans[:, 1] - spans[:, 0] > self.length
        self.long = int(long.sum())
        if too_long == "skip":
            spans = spans[~long]
        elif too_long == "truncate":
            spans = np.stack([spans[:, 0], np.minimum(spans[:, 1], spans[:, 0] + self.length)], 1)
        elif len(spans):
            starts = [np.arange(start, end, self.length) for start, end in spans]
            ends = [np.minimum(begin + self.length, end) for begin, (_, end) in zip(starts, spans, strict=True)]
            spans = np.stack([np.concatenate(starts), np.concatenate(ends)], 1)
        spans = spans[spans[:, 1] - spans[:, 0] >= 2]  # one token alone teaches nothing
        if self.answers is None:
            return spans
        # The first token of a window is not predicted.
        says = np.array([bool(self.answers[start + 1 : end].any()) for start, end in spans], dtype=bool)
        self.mute = int((~says).sum())
        return spans[says]

    def evenly(self, count: int) -> TextData:
        """The same text with only `count` of its windows, taken evenly (all where there are fewer, or for 0)."""
        if not 0 < count < len(self):
            return self
        chosen = copy.copy(self)
        chosen._chosen = np.arange(count) * len(self) // count
        return chosen

    def __len__(self) -> int:
        if self._chosen is not None:
            return len(self._chosen)
        return len(self.spans) if self.packing == "padded" else self.num_tokens // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch [N, T]; padded ones are as long as their longest text, up to a multiple of 64 tokens."""
        if self._chosen is not None:
            indices = self._chosen[np.asarray(indices, dtype=np.int64)].tolist()
        if self.packing == "padded":
            return self._padded(indices)
        starts = np.asarray(indices, dtype=np.int64) * self.length
        if self.seed is not None:
            moves = np.random.default_rng(derive(self.seed, "offsets", *indices)).integers(
                self.length, size=len(starts)
            )
            starts = np.minimum(starts + moves, self.num_tokens - self.length)
        found = [self._window(int(start)) for start in starts]
        batch = {"input_ids": torch.from_numpy(np.stack([ids for ids, _, _ in found]))}
        if self.packing == "documents":
            batch["segments"] = torch.from_numpy(np.stack([segments for _, segments, _ in found]))
        if self.answers is not None:
            batch["labels"] = torch.from_numpy(np.stack([labels for _, _, labels in found]))
        return batch

    def _window(self, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, document numbers and labels of the window that starts at a place of the split [T]."""
        ids, segments, labels = (np.empty(self.length, dtype=np.int64) for _ in range(3))
        document, filled = int(np.searchsorted(self.ends, start, side="right")), 0
        while filled < self.length:
            last = self.spans[document, 1]
            begin = last - (self.ends[document] - start - filled)
            end = min(last, begin + self.length - filled)
            here = slice(filled, filled + end - begin)
            ids[here], segments[here], labels[here] = self.tokens[begin:end], document, self._labels(begin, end)
            filled, document = here.stop, document + 1
        return ids, segments, labels

    def _labels(self, start: int, end: int) -> np.ndarray:
        ids = self.tokens[start:end].astype(np.int64)
        return ids if self.answers is None else np.where(self.answers[start:end], ids, IGNORED)

    def _padded(self, indices: Sequence[int]) -> dict[str, Tensor]:
        longest = max(int(self.spans[index, 1] - self.spans[index, 0]) for index in indices)
        size = (len(indices), min(self.length, -(-longest // 64) * 64))
        ids, real = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        labels = np.full(size, IGNORED, dtype=np.int64)
        for row, index in enumerate(indices):
            start, end = self.spans[index]
            here = slice(0, end - start)
            ids[row, here], real[row, here], labels[row, here] = self.tokens[start:end], 1, self._labels(start, end)
        batch = {"input_ids": ids, "attention_mask": real, **({} if self.answers is None else {"labels": labels})}
        return {name: torch.from_numpy(array) for name, array in batch.items()}


class TextSplits(NamedTuple):
    """The three splits and the tokenizer that made them. general: text of another kind (`data.general`)."""

    train: Any
    validation: Any
    test: Any
    tokenizer: Tokenizer
    general: Any = None

    @property
    def num_outputs(self) -> int:
        return self.tokenizer.size

    @property
    def facts(self) -> dict[str, Any]:
        """What a run's summary says of the data: nothing."""
        return {}


def load_text(config: TextConfig, seed: int = 0, *, mask: bool = True) -> TextSplits:
    """Tokenises (once), checks and splits.

    Args:
        seed: steers the random offsets of training windows, nothing else. mask: the tokenizer has a token that hides
            others (masked diffusion); without one it is as it was made.

    Raises UserError for anything wrong with the data.
    """
    check_options("data", config)
    if config.validation_share + config.test_share >= 1:
        raise UserError(
            f"data.validation_share {config.validation_share} and data.test_share {config.test_share} leave nothing to "
            "train on"
        )
    tokenizer = load_tokenizer(config.tokenizer, mask, config.trust_remote_code)
    tokens, ends, answers = _tokens(config, tokenizer)
    packing, too_long = packing_of(config, answers is not None)
    if answers is not None and mask:
        raise UserError("conversations train models that write answers: masked diffusion takes text (data.format text)")

    def part(spans: np.ndarray, seed: int | None = None) -> TextData:
        return TextData(tokens, spans, config.length, packing, seed, too_long=too_long, answers=answers)

    train, validation, test = _split(ends, config)
    parts = {"training": part(train, seed), "validation": part(validation), "test": part(test)}
    for name, found in parts.items():
        _check_part(name, found, config)
    _count(parts, too_long, config)
    validation_part, test_part = (parts[name].evenly(config.evaluated) for name in ("validation", "test"))
    return TextSplits(parts["training"], validation_part, test_part, tokenizer, _general(config, mask))


def packing_of(config: TextConfig, conversations: bool) -> tuple[str, str]:
    """Packing, and what becomes of documents that are too long for a window."""
    packing, too_long = config.packing, config.too_long
    packing = ("padded" if conversations else "stream") if packing == "auto" else packing
    too_long = ("truncate" if conversations else "split") if too_long == "auto" else too_long
    return packing, too_long


def _check_part(name: str, part: TextData, config: TextConfig) -> None:
    """Raises UserError where there is nothing to train on or to evaluate."""
    if part.answers is not None and (part.mute or part.packing != "padded"):
        spans = part.spans if len(part) else np.zeros((0, 2), np.int64)
        if not any(part.answers[start + 1 : end].any() for start, end in spans):
            raise UserError(
                f"the {name} conversations have no answer tokens: nothing that the assistant says lies within "
                f"{config.length} tokens (data.length)"
            )
    if len(part) == 0 and part.packing == "padded":
        raise UserError(f"the {name} text has no document of at least two tokens" + (" that fits" if part.long else ""))
    if len(part) == 0:
        raise UserError(
            f"the {name} text has {part.num_tokens} tokens, less than one window of {config.length}: give it more "
            "text, or a smaller --data.length"
        )


def _count(parts: Mapping[str, TextData], too_long: str, config: TextConfig) -> None:
    """Says what was cut or left out."""
    long, mute = sum(part.long for part in parts.values()), sum(part.mute for part in parts.values())
    if long and too_long != "split":
        done = "truncated" if too_long == "truncate" else "skipped"
        log.warning("%d documents are longer than %d tokens: %s (data.too_long)", long, config.length, done)
    if mute:
        log.warning("%d conversations have no answer tokens and were left out", mute)


def _general(config: TextConfig, mask: bool) -> TextData | None:
    """Windows of the text that shows what is forgotten."""
    if not config.general:
        return None
    if config.general not in ("pydocs", "stdlib") and not Path(config.general).exists():
        raise UserError(f"data.general must be pydocs, stdlib or a path; {config.general!r} does not exist")
    named = config.general in ("pydocs", "stdlib")
    own = dataclasses.replace(
        config,
        source=config.general if named else "pydocs",  # a path says by itself what it is
        path="" if named else config.general,
        format="text",
        subset="",
        max_documents=0,
    )
    if identity(own) == identity(dataclasses.replace(config, format="text", subset="", max_documents=0)):
        raise UserError(f"data.general {config.general} is the training text itself: name another text, or none")
    tokens, ends, _ = _tokens(own, load_tokenizer(config.tokenizer, mask, config.trust_remote_code))
    part = TextData(tokens, _spans(ends), config.length)
    if len(part) == 0:
        raise UserError(f"data.general {config.general} has less than one window of {config.length} tokens")
    return part.evenly(config.evaluated)


def _spans(ends: np.ndarray) -> np.ndarray:
    """Where documents end [documents] -> rows of [start, end)."""
    return np.stack([np.concatenate([[0], ends[:-1]]), ends], 1)


def _split(ends: np.ndarray, config: TextConfig) -> list[np.ndarray]:
    """Documents of training, validation and test, in the order of the source. ends [documents] -> rows of
    [start, end)."""
    spans = _spans(ends)
    total = int(ends[-1]) if len(ends) else 0
    if config.split == "contiguous":
        test = total - round(total * config.test_share)
        validation = test - round(total * config.validation_share)
        borders = ((0, validation), (validation, test), (test, total))
        return [_between(spans, low, high) for low, high in borders]
    if len(spans) < 3:
        raise UserError(
            f"{len(spans)} document(s) cannot be split into training, validation and test: pass --data.split "
            "contiguous, which cuts the text itself"
        )
    order = np.random.default_rng(derive(config.split_seed, "documents")).permutation(len(spans))
    sizes = spans[order, 1] - spans[order, 0]
    reached = np.cumsum(sizes) / total
    # A document goes where its middle lies, so that one long document does not swallow a whole split.
    middle = reached - sizes / total / 2
    test = middle < config.test_share
    validation = ~test & (middle < config.test_share + config.validation_share)
    rest = ~(test | validation)
    left = 1 - config.test_share - config.validation_share
    if not (test.any() and validation.any()) or sizes[rest].sum() < left / 2 * total:
        raise UserError(
            f"the {len(spans)} documents are too uneven to be split (the longest has {sizes.max() / total:.0%} of the "
            "text): pass --data.split contiguous, which cuts the text itself, or another --data.split-seed"
        )
    return [spans[np.sort(order[chosen])] for chosen in (rest, validation, test)]


def _between(spans: np.ndarray, low: int, high: int) -> np.ndarray:
    inside = spans[(spans[:, 1] > low) & (spans[:, 0] < high)].copy()
    return inside.clip(low, high)


def _tokens(config: TextConfig, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """All tokens, mapped from the cache; where each document ends; and, of conversations, which tokens are answers."""
    key = hashlib.blake2b(f"{identity(config)} {tokenizer.identity()}".encode(), digest_size=12).hexdigest()
    folder = cache_folder(config.cache_dir) / f"text-{key}"
    for _ in range(3):  # other processes may make, or damage, the same one
        if (found := _cached(folder)) is not None:
            break
        _tokenise(config, tokenizer, folder)
    else:
        raise UserError(f"the text cache {folder} does not keep what is written: pass --data.cache-dir FOLDER")
    left, tokens, ends, answers = found
    if left:
        say(left)
    return tokens, ends, answers


def _cached(folder: Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray | None] | None:
    """What was left out, tokens, ends and answers in a cache; None when there is none, or a damaged one."""
    if not (folder / "index.json").is_file():
        return None
    try:
        index = read_json(folder / "index.json")
        path = folder / "tokens.npy"
        # Untouched since it was written, or else of the same content.
        if index["written"] != path.stat().st_mtime_ns and index["hash"] != file_hash(path):
            raise Damaged(path, "its content is not what was written")
        tokens = np.load(path, mmap_mode="r")
        if isinstance(index["ends"], list):  # as older versions wrote it
            ends = np.asarray(index["ends"], dtype=np.int64)
        else:
            ends = _checked(folder / "ends.npy", index["ends"])
        answers = _checked(folder / "answers.npy", index["answers"], "r") if index.get("conversations") else None
        whole = tokens.ndim == ends.ndim == 1 and len(ends) > 0 and int(ends[0]) >= 0 and int(ends[-1]) == len(tokens)
        if whole and (np.diff(ends) >= 0).all() and (answers is None or answers.shape == tokens.shape):
            return index.get("left_out") or {}, tokens, ends, answers
    except (OSError, ValueError, KeyError, TypeError, EOFError, OverflowError, AttributeError):
        pass
    log.warning("the text cache %s is damaged; the text is tokenised again", folder)
    with writable(folder):
        shutil.rmtree(folder)
    return None


def _checked(path: Path, expected: str, mode: Any = None) -> np.ndarray:
    """An array in a file. Raises Damaged where it is not what was written."""
    if file_hash(path) != expected:
        raise Damaged(path, "its content is not what was written")
    return np.load(path, mmap_mode=mode)


def _tokenise(config: TextConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the cache beside its place and moves it there: other processes may make the same one."""
    left = LeftOut(config.skip_unreadable)
    with making(folder) as partial:
        partial.mkdir()
        path = partial / "tokens.npy"
        ends, answers = _write_tokens(config, tokenizer, path, left)
        _write_array(partial / "ends.npy", ends)
        index: dict[str, Any] = {"format": 2, "hash": file_hash(path), "written": path.stat().st_mtime_ns}
        index["ends"] = file_hash(partial / "ends.npy")
        if answers is not None:
            _write_array(partial / "answers.npy", answers)
            index |= {"conversations": True, "answers": file_hash(partial / "answers.npy")}
        if left.count:
            index["left_out"] = {"count": left.count, "first": left.first}
        write_json(partial / "index.json", index)
        publish(partial, folder, "index.json")
    log.info("tokenised %d documents, %d tokens", len(ends), int(ends[-1]))


def _write_tokens(
    config: TextConfig, tokenizer: Tokenizer, path: Path, left: LeftOut
) -> tuple[np.ndarray, np.ndarray | None]:
    """Writes all tokens of a source as an array [tokens]. Returns where documents end, and which tokens of
    conversations are answers."""
    kind, end = np.dtype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32), np.array([tokenizer.separator])
    total, ends, last = 0, list[int](), None
    answers: list[np.ndarray] = []
    with path.open("wb") as stream:
        start = _write_header(stream, kind, 0)
        for name, text in documents(config, left):
            if not isinstance(text, str):  # its chat template says how it ends
                if (found := _encoded(text, tokenizer, name, left)) is None:
                    continue
                stream.write(found.ids.astype(kind).tobytes())
                answers.append(found.answers)
                total += len(found.ids)
                ends.append(total)
                continue
            if last is not None and name != last:
                stream.write(end.astype(kind).tobytes())
                total += 1
                ends.append(total)
            ids, begun = tokenizer.encode(text), total > (ends[-1] if ends else 0)
            if begun and len(ids):
                ids = np.concatenate([tokenizer.between, ids])
            stream.write(ids.astype(kind).tobytes())
            total, last = total + len(ids), name
        if last is not None:
            stream.write(end.astype(kind).tobytes())
            ends.append(total + 1)
            total += 1
        stream.seek(0)
        assert _write_header(stream, kind, total) == start  # numpy leaves room for any length
    if answers and last is not None:
        raise UserError(f"{config.path} mixes texts and conversations: set data.format to text, messages or prompt")
    if not ends and left.count:
        raise UserError(f"no row or file of the text can be read; the first: {left.first}")
    if total < (2 if answers else config.length):
        raise UserError(
            f"the text has {total} tokens, less than one window of {config.length}: give it more text, or a smaller "
            "--data.length"
        )
    return np.asarray(ends, dtype=np.int64), np.concatenate(answers) if answers else None


def _write_header(stream: Any, kind: np.dtype, length: int) -> int:
    """The header of a .npy file with a vector of numbers. Returns where these begin."""
    facts = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(stream, facts)
    return int(stream.tell())


def _write_array(path: Path, array: np.ndarray) -> None:
    """As np.save does, which does not tell a full disk from other errors."""
    with path.open("wb") as stream:
        _write_header(stream, array.dtype, len(array))
        stream.write(array.tobytes())


def _encoded(messages: Conversation, tokenizer: Tokenizer, name: str, left: LeftOut) -> Encoded | None:
    """A conversation as tokens, or None where its chat template refuses it and it is left out."""
    template_of(tokenizer)  # without one every conversation would be left out
    try:
        return encode(messages, tokenizer, name)
    except UserError as error:
        if not left.skip:
            raise
        left(str(error))
        return None


class Units(NamedTuple):
    """characters and bytes per token of a text."""

    characters: float
    bytes: float


def units(part: TextData, tokenizer: Tokenizer) -> Units:
    """Of a split: what turns nats per token into bits per character. Long ones are judged by their beginning."""
    count = characters = size = 0
    for start, end in part.spans:
        ids = np.asarray(part.tokens[start : min(end, start + COUNTED - count)])
        more = tokenizer.count(ids)
        count, characters, size = count + len(ids), characters + more[0], size + more[1]
        if count >= COUNTED:
            break
    return Units(max(characters, 1) / count, max(size, 1) / count)
