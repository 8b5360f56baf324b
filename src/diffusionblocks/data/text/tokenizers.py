"""Text to token ids and back: characters, bytes, or any tokenizer of Hugging Face transformers, with a mask token or
without."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np

from diffusionblocks.errors import UserError
from diffusionblocks.networks import pretrained

log = logging.getLogger("diffusionblocks")
BLANK = "_"  # how a masked token is shown
MOST_GAPS = 4  # numbers of tokens per token: more are a mistake


class Tokenizer(Protocol):
    """size: number of ids, the mask included. mask_id: of what hides a token, None without one. separator: id that ends
    a document. between: ids that join the pieces of a long document, which are cut after white space and encoded
    apart."""

    size: int
    mask_id: int | None
    separator: int
    between: tuple[int, ...]

    def encode(self, text: str) -> np.ndarray:
        """Token ids, uint32."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text; masked tokens are shown as `BLANK`."""
        ...

    def count(self, ids: np.ndarray) -> tuple[int, int]:
        """Characters and bytes of the text that ids stand for; tokens that only mark something count nothing."""
        ...

    def identity(self) -> str:
        """Tells tokenizers apart that give different ids."""
        ...


class Characters:
    """The 27 characters of text8: a to z and the space (Mahoney's protocol: lower case, digits spelled out, everything
    else is a space, spaces collapse). Text that is in this form already stays as it is."""

    separator = 26
    between: tuple[int, ...] = (26,)  # encoding strips the white space
    _letters = "abcdefghijklmnopqrstuvwxyz "
    _digits = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def __init__(self, mask: bool = True) -> None:
        self.size = 28 if mask else 27
        self.mask_id = 27 if mask else None

    def encode(self, text: str) -> np.ndarray:
        text = text.lower()
        for digit, word in enumerate(self._digits):
            text = text.replace(str(digit), f" {word} ")
        plain = re.sub(r"[^a-z]+", " ", text).strip()
        codes = np.frombuffer(plain.encode("ascii"), dtype=np.uint8).astype(np.uint32)
        return np.where(codes == 32, self.separator, codes - 97).astype(np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join((self._letters + BLANK)[i] for i in ids)

    def count(self, ids: np.ndarray) -> tuple[int, int]:
        return len(ids), len(ids)

    def identity(self) -> str:
        return "characters 1"


class Bytes:
    """The bytes of UTF-8; documents end with a newline."""

    separator = 10
    between: tuple[int, ...] = ()

    def __init__(self, mask: bool = True) -> None:
        self.size = 257 if mask else 256
        self.mask_id = 256 if mask else None

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ord(BLANK) if i == self.mask_id else i for i in ids).decode("utf-8", errors="replace")

    def count(self, ids: np.ndarray) -> tuple[int, int]:
        return int((ids & 0xC0 != 0x80).sum()), len(ids)  # bytes that begin a character

    def identity(self) -> str:
        return "bytes 1"


class HuggingFace:
    """A tokenizer of transformers by name or folder. One without a mask token gets one where it is needed, and says so.

    Raises UserError when it cannot be loaded.
    """

    between: tuple[int, ...] = ()

    def __init__(self, name_or_path: str, mask: bool = True, trust_remote_code: bool = False) -> None:
        self.name, self.own = name_or_path, pretrained.load_tokenizer(name_or_path, trust_remote_code)
        if mask and self.own.mask_token_id is None:
            self.own.add_special_tokens({"mask_token": "<mask>"})
            log.info(
                "the tokenizer %s has no mask token; added <mask> as token %d", name_or_path, self.own.mask_token_id
            )
        self.size = 1 + max(self.own.get_vocab().values(), default=-1)  # of some, ids have gaps
        if not 0 < self.size <= MOST_GAPS * len(self.own):
            raise UserError(
                f"the tokenizer {name_or_path!r} is damaged: it has {len(self.own)} tokens with numbers up to "
                f"{self.size - 1}"
            )
        self.mask_id = int(self.own.mask_token_id) if mask else None
        ends = (self.own.eos_token_id, self.own.sep_token_id, self.own.bos_token_id)
        found = next((int(end) for end in ends if end is not None), None)
        if found is None:
            raise UserError(f"the tokenizer {name_or_path!r} has no token that ends a document (eos, sep or bos)")
        self.separator, unknown = found, self.own.unk_token_id
        self.spelled = found if unknown is None else int(unknown)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer beside a network."""
        self.own.save_pretrained(folder)

    def encode(self, text: str) -> np.ndarray:
        ids = np.asarray(self.own(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.uint32)
        if self.mask_id is not None:
            ids[ids == self.mask_id] = self.spelled  # a text that spells the mask does not hide anything
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text = self.own.decode([i for i in ids if i < self.size])
        return text if self.mask_id is None else text.replace(self.own.mask_token, BLANK)

    def count(self, ids: np.ndarray) -> tuple[int, int]:
        text = self.own.decode(ids.tolist(), skip_special_tokens=True)
        return len(text), len(text.encode())

    def identity(self) -> str:
        vocabulary = repr(sorted(self.own.get_vocab().items())).encode()
        probe = self.own("Probe: naïve Text_1, 2 - x\n", add_special_tokens=False)["input_ids"]
        return f"{hashlib.blake2b(vocabulary, digest_size=16).hexdigest()} {probe} {self.own.chat_template or ''}"


@cache
def load_tokenizer(name: str, mask: bool = True, trust_remote_code: bool = False) -> Tokenizer:
    """`characters`, `bytes`, or a Hugging Face tokenizer by name or folder. mask: with a token that hides others."""
    if name == "auto":
        raise UserError(
            "data.tokenizer auto is that of a pretrained network: set model.pretrained to its name or folder, or "
            "choose a tokenizer"
        )
    if name == "characters":
        return Characters(mask)
    return Bytes(mask) if name == "bytes" else HuggingFace(name, mask, trust_remote_code)
