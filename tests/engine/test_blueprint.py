"""A folder made of a config alone has the tensors that the real checkpoint has."""

import json
from pathlib import Path

import pytest

from engine.blueprint import write_blueprint
from engine.card import ModelCard
from engine.tiny import FAMILIES, write_tiny
from engine.tiny_quantised import write_mxfp4
from store.checkpoint import CheckpointMap
from store.errors import InvalidInput, UnsupportedFamily

FIELDS = {
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 32},
    "qwen2_moe": {"hidden_size": 64, "moe_intermediate_size": 32},
    "granitemoe": {"hidden_size": 64, "intermediate_size": 32},
}


def shapes(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (span.dtype, tuple(span.shape)) for name, span in CheckpointMap.open(folder).tensors.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_blueprint_has_the_tensors_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    real = write_tiny(family, tmp_path / "real", dtype="bfloat16")
    drawn = write_blueprint(real / "config.json", tmp_path / "drawn")
    assert shapes(drawn) == shapes(real)
    assert ModelCard.read(drawn).geometry == ModelCard.read(real).geometry


@pytest.mark.parametrize("family", ["gpt_oss", "qwen2_moe", "granitemoe"])
def test_a_blueprint_in_four_bits_has_the_tensors_of_a_quantised_copy(family: str, tmp_path: Path) -> None:
    """Asked for, or because the config says so."""
    real = write_tiny(family, tmp_path / "real", dtype="bfloat16", **FIELDS[family])
    plain = real / "config.json"
    asked = write_blueprint(plain, tmp_path / "asked", way="mxfp4")
    write_mxfp4(real)
    said = write_blueprint(plain, tmp_path / "said")
    assert shapes(asked) == shapes(said) == shapes(real)
    assert {dtype for dtype, _ in shapes(real).values()} == {"BF16", "U8"}
    assert ModelCard.read(asked).geometry == ModelCard.read(said).geometry == ModelCard.read(real).geometry


def test_a_blueprint_of_a_large_model_takes_no_disk(tmp_path: Path) -> None:
    real = write_tiny("mixtral", tmp_path / "real", dtype="bfloat16")
    config = json.loads((real / "config.json").read_text()) | {"hidden_size": 4096, "intermediate_size": 14336}
    (tmp_path / "config.json").write_text(json.dumps(config))
    drawn = write_blueprint(tmp_path / "config.json", tmp_path / "drawn")
    assert CheckpointMap.open(drawn).weight_bytes > 8e9
    assert (drawn / "model.safetensors").stat().st_blocks * 512 < 2**20


@pytest.mark.parametrize("text", ["", "[1]", "{}", "not json"])
def test_a_file_that_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidInput, match="model_type"):
        write_blueprint(tmp_path / "config.json", tmp_path / "drawn")


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_moe"}')
    with pytest.raises(UnsupportedFamily, match="no_such_moe"):
        write_blueprint(tmp_path / "config.json", tmp_path / "drawn")
    assert not (tmp_path / "drawn").exists()
