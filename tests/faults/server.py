"""Starts commands in milliseconds: a process that has imported everything forks one child per command.

It reads one JSON object a line from stdin (`id`, `argv`, `cwd`, `out`, `err`, `memory`) and writes one a line to
stdout: `id` and `pid` when a child has begun, `pid` and `code` when it has ended (negative: the signal that ended it).
A child is a process like any other, with the signal handlers that a fresh interpreter has.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import threading
import traceback
from typing import Any

MODULES = (
    "diffusionblocks.cli", "diffusionblocks.cli.sample", "diffusionblocks.experiments.train",
    "diffusionblocks.experiments.sample", "diffusionblocks.experiments.compare", "diffusionblocks.tasks.classification",
    "diffusionblocks.tasks.image_generation", "diffusionblocks.tasks.masked_lm", "diffusionblocks.tasks.causal_lm",
    "diffusionblocks.tasks.recurrent_lm", "diffusionblocks.report.page", "diffusionblocks.recipes.network",
    "sklearn.datasets", "matplotlib.figure", "transformers.models.vit.modeling_vit",
    "transformers.models.llama.modeling_llama", "torch.distributed._tools.mem_tracker",
)  # fmt: skip


def serve() -> None:
    import torch

    torch.set_num_threads(1)
    for name in MODULES:
        with contextlib.suppress(ImportError):  # what moves or is missing makes a start slower, no more
            importlib.import_module(name)
    gc.freeze()
    say({"ready": True})
    buffer = b""
    running: set[int] = set()
    while True:
        readable, _, _ = select.select([0], [], [], 0.01 if running else 1.0)
        if readable:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                break
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if not pid:
                    child(request)
                running.add(pid)
                say({"id": request["id"], "pid": pid})
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            running.discard(pid)
            say({"pid": pid, "code": os.waitstatus_to_exitcode(status)})
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def say(content: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def child(request: dict[str, Any]) -> None:
    """Runs one command and ends the process as an interpreter would."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL if number != signal.SIGPIPE else signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for path, descriptor in ((os.devnull, 0), (request["out"], 1), (request["err"], 2)):
            flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
            os.dup2(os.open(path, flags, 0o644), descriptor)
        os.chdir(request["cwd"])
        if request.get("memory"):
            resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
        sys.argv = ["dblocks", *request["argv"]]
        from diffusionblocks.cli import program

        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            program()
        except SystemExit as finished:
            code = finished.code if isinstance(finished.code, int) else int(finished.code is not None)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    with contextlib.suppress(BaseException):
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
