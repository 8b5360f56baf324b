"""Documents as windows of tokens: tokenised once into a file that is mapped, never loaded, and split by document.

The cache is a folder with tokens.npy (all documents, one after the other) and index.json (where each ends, and a hash of the
tokens). Its name is a hash of the source and the tokenizer; a damaged cache is made again.

Shapes: N batch, T positions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusionblocks.data.cache import cache_folder, file_hash
from diffusionblocks.data.corpora import TextConfig, documents, identity
from diffusionblocks.data.tokenizers import Tokenizer, load_tokenizer
from diffusionblocks.errors import UserError, check_choices
from diffusionblocks.seeds import derive

log = logging.getLogger("diffusionblocks")
COUNTED = 1 << 21  # tokens that are decoded to count their characters


class TextData(Dataset):
    """Windows of T tokens -> dicts `input_ids` [T], and `segments` or `attention_mask` where the packing needs them.

    Args:
        tokens: all tokens. spans: documents of this split, rows of [start, end), each ending with its separator.
        length: T. packing: see `TextConfig`.
        seed: None = windows lie side by side (evaluation); else each is moved by a random offset, drawn from the seed and from
            which windows meet in a batch (training; not where windows are padded).
    """

    def __init__(
        self, tokens: np.ndarray, spans: np.ndarray, length: int, packing: str = "stream", seed: int | None = None
    ) -> None:
        self.tokens, self.length, self.packing, self.seed = tokens, length, packing, seed
        if packing == "padded":
            starts = [np.arange(start, end, length) for start, end in spans]
            ends = [np.minimum(begin + length, end) for begin, (_, end) in zip(starts, spans, strict=True)]
            spans = np.stack([np.concatenate(starts), np.concatenate(ends)], 1) if len(spans) else spans
            spans = spans[spans[:, 1] - spans[:, 0] >= 2]  # one token alone teaches nothing
        self.spans = spans
        self.ends = np.cumsum(spans[:, 1] - spans[:, 0])  # in the split's own count of tokens

    @property
    def num_tokens(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __len__(self) -> int:
        return len(self.spans) if self.packing == "padded" else self.num_tokens // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch [N, T]."""
        if self.packing == "padded":
            return self._padded(indices)
        starts = np.asarray(indices, dtype=np.int64) * self.length
        if self.seed is not None:
            moves = np.random.default_rng(derive(self.seed, "offsets", *indices)).integers(
                self.length, size=len(starts)
            )
            starts = np.minimum(starts + moves, self.num_tokens - self.length)
        found = [self._window(int(start)) for start in starts]
        batch = {"input_ids": torch.from_numpy(np.stack([ids for ids, _ in found]))}
        if self.packing == "documents":
            batch["segments"] = torch.from_numpy(np.stack([segments for _, segments in found]))
        return batch

    def _window(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and document numbers of the window that starts at a place of the split [T]."""
        ids = np.empty(self.length, dtype=np.int64)
        segments = np.empty(self.length, dtype=np.int64)
        document, filled = int(np.searchsorted(self.ends, start, side="right")), 0
        while filled < self.length:
            last = self.spans[document, 1]
            begin = last - (self.ends[document] - start - filled)
            part = self.tokens[begin : min(last, begin + self.length - filled)]
            ids[filled : filled + len(part)], segments[filled : filled + len(part)] = part, document
            filled, document = filled + len(part), document + 1
        return ids, segments

    def _padded(self, indices: Sequence[int]) -> dict[str, Tensor]:
        ids = np.zeros((len(indices), self.length), dtype=np.int64)
        real = np.zeros((len(indices), self.length), dtype=np.int64)
        for row, index in enumerate(indices):
            start, end = self.spans[index]
            ids[row, : end - start], real[row, : end - start] = self.tokens[start:end], 1
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(real)}


class TextSplits(NamedTuple):
    """The three splits and the tokenizer that made them."""

    train: Any
    validation: Any
    test: Any
    tokenizer: Tokenizer

    @property
    def num_outputs(self) -> int:
        return self.tokenizer.size


def load_text(config: TextConfig, seed: int = 0, *, mask: bool = True) -> TextSplits:
    """Tokenises (once), checks and splits.

    Args:
        seed: steers the random offsets of training windows, nothing else. mask: the tokenizer has a token that hides others
            (masked diffusion); without one it is as it was made.

    Raises UserError for anything wrong with the data.
    """
    check_choices("data", config, {"packing": ("stream", "documents", "padded"), "split": ("documents", "contiguous")})
    if config.length < 2:
        raise UserError(f"data.length must be at least 2 tokens, got {config.length}")
    if config.validation_share <= 0 or config.test_share <= 0 or config.validation_share + config.test_share >= 1:
        raise UserError(
            f"data.validation_share {config.validation_share} and data.test_share {config.test_share} must be positive and "
            "leave something to train on"
        )
    tokenizer = load_tokenizer(config.tokenizer, mask)
    tokens, ends = _tokens(config, tokenizer)
    train, validation, test = _split(ends, config)
    splits = TextSplits(
        TextData(tokens, train, config.length, config.packing, seed),
        TextData(tokens, validation, config.length, config.packing),
        TextData(tokens, test, config.length, config.packing),
        tokenizer,
    )
    for name, part in zip(("training", "validation", "test"), splits, strict=False):
        if len(part) == 0 and config.packing == "padded":
            raise UserError(f"the {name} text has no document of at least two tokens")
        if len(part) == 0:
            raise UserError(
                f"the {name} text has {part.num_tokens} tokens, less than one window of {config.length}: give it more text, "
                "or a smaller --data.length"
            )
    return splits


def _split(ends: np.ndarray, config: TextConfig) -> list[np.ndarray]:
    """Documents of training, validation and test, in the order of the source. ends [documents] -> rows of [start, end)."""
    spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], 1)
    total = int(ends[-1]) if len(ends) else 0
    if config.split == "contiguous":
        test = total - round(total * config.test_share)
        validation = test - round(total * config.validation_share)
        borders = ((0, validation), (validation, test), (test, total))
        return [_between(spans, low, high) for low, high in borders]
    if len(spans) < 3:
        raise UserError(
            f"{len(spans)} document(s) cannot be split into training, validation and test: pass --data.split contiguous, "
            "which cuts the text itself"
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
            f"the {len(spans)} documents are too uneven to be split (the longest has {sizes.max() / total:.0%} of the text): pass "
            "--data.split contiguous, which cuts the text itself, or another --data.split-seed"
        )
    return [spans[np.sort(order[chosen])] for chosen in (rest, validation, test)]


def _between(spans: np.ndarray, low: int, high: int) -> np.ndarray:
    inside = spans[(spans[:, 1] > low) & (spans[:, 0] < high)].copy()
    return inside.clip(low, high)


def _tokens(config: TextConfig, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """All tokens, mapped from the cache, and where each document ends."""
    key = hashlib.blake2b(f"{identity(config)} {tokenizer.identity()}".encode(), digest_size=12).hexdigest()
    folder = cache_folder(config.cache_dir) / f"text-{key}"
    while (index := _read_index(folder)) is None:
        _tokenise(config, tokenizer, folder)
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    return tokens, np.asarray(index["ends"], dtype=np.int64)


def _read_index(folder: Path) -> dict[str, Any] | None:
    """None when there is no cache, or a damaged one."""
    if not (folder / "index.json").is_file():
        return None
    try:
        index = json.loads((folder / "index.json").read_text())
        path = folder / "tokens.npy"
        # Untouched since it was written, or else of the same content.
        if index["written"] == path.stat().st_mtime_ns or index["hash"] == file_hash(path):
            return index
    except (OSError, ValueError, KeyError, TypeError):
        pass
    log.warning("the text cache %s is damaged; the text is tokenised again", folder)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _tokenise(config: TextConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the cache beside its place and moves it there: other processes may make the same one."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    kind, end = np.dtype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32), np.array([tokenizer.separator])
    total, ends, last = 0, list[int](), None
    try:
        with (partial / "raw").open("wb") as stream:
            for name, text in documents(config):
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
        if total < config.length:
            raise UserError(
                f"the text has {total} tokens, less than one window of {config.length}: give it more text, or a smaller "
                "--data.length"
            )
        raw = np.memmap(partial / "raw", dtype=kind, mode="r")
        np.save(partial / "tokens.npy", raw)
        del raw
        (partial / "raw").unlink()
        path = partial / "tokens.npy"
        index = {"ends": ends, "hash": file_hash(path), "written": path.stat().st_mtime_ns}
        (partial / "index.json").write_text(json.dumps(index) + "\n")
        try:
            partial.rename(folder)
        except OSError:  # another process was first
            if not (folder / "index.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("tokenised %d documents, %d tokens", len(ends), total)


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
