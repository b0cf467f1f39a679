import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import UserError
from retrieval import encoder as encoder_module
from retrieval.config import EncoderConfig
from retrieval.encoder import (
    Encoder,
    EncoderSource,
    encoder_digest,
    encoder_directory,
    encoder_max_tokens,
    encoder_tokenizer,
    load_encoder,
    resolve_precision,
    unknown_share,
)
from tests.retrieval.tiny import COUNTRIES, country_text

TEXTS = ["copper", *(country_text(place)[: 40 * place + 20] for place in range(8)), "", "in year 1999 exported"]


def test_encode_passages_batched_by_length_equals_one_at_a_time_in_order(encoder_path: Path) -> None:
    encoder = load_encoder(EncoderSource(EncoderConfig(model=str(encoder_path), precision="float32", batch_tokens=256)))
    together = encoder.encode_passages(TEXTS)
    assert together.shape == (len(TEXTS), 32)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    alone = np.concatenate([encoder.encode_passages([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_encode_batches_stay_within_the_padded_token_budget(
    encoder_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(EncoderSource(EncoderConfig(model=str(encoder_path), precision="float32", batch_tokens=256)))
    shapes = []
    forward = encoder._model.forward

    def spy(features: dict, **kwargs: object) -> dict:
        shapes.append(tuple(features["input_ids"].shape))
        return forward(features, **kwargs)

    monkeypatch.setattr(encoder._model, "forward", spy)
    encoder.encode_passages(TEXTS * 3)
    assert sum(rows for rows, _ in shapes) == len(TEXTS) * 3
    assert all(rows * width <= 256 for rows, width in shapes)
    assert len(shapes) < len(TEXTS) * 3 / 2


def test_encode_bfloat16_points_almost_the_same_way(encoder_path: Path) -> None:
    config = EncoderConfig(model=str(encoder_path))
    exact, rough = (
        Encoder(EncoderSource(config), precision, "cpu").encode_passages(TEXTS) for precision in ("float32", "bfloat16")
    )
    assert rough.dtype == np.float32
    assert np.all((exact * rough).sum(axis=1) > 0.99)
    assert not np.array_equal(exact, rough)


def test_encode_queries_uses_the_model_own_query_prompt(encoder_path: Path, tmp_path: Path) -> None:
    prompted = tmp_path / "prompted"
    shutil.copytree(encoder_path, prompted)
    settings = json.loads((prompted / "config_sentence_transformers.json").read_text())
    settings["prompts"] = {"query": "copper ", "document": ""}
    (prompted / "config_sentence_transformers.json").write_text(json.dumps(settings))
    encoder = load_encoder(EncoderSource(EncoderConfig(model=str(prompted), precision="float32")))
    np.testing.assert_allclose(
        encoder.encode_queries(["exports"]), encoder.encode_passages(["copper exports"]), atol=1e-5
    )


def test_resolve_precision_auto_is_measured_once_and_remembered(
    encoder_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path))
    config = EncoderConfig(model=str(encoder_path))
    first = resolve_precision(EncoderSource(config), "cpu")
    monkeypatch.setattr(encoder_module, "_measure_precision", lambda directory: pytest.fail("measured twice"))
    assert resolve_precision(EncoderSource(config), "cpu") == first
    assert resolve_precision(EncoderSource(config), "cuda") == "bfloat16"
    assert resolve_precision(EncoderSource(config.model_copy(update={"precision": "float32"})), "cuda") == "float32"


def test_unknown_share_counts_tokens_outside_the_vocabulary(encoder_path: Path) -> None:
    tokenizer = encoder_tokenizer(encoder_path)
    assert unknown_share(tokenizer, list(COUNTRIES)) == 0.0
    assert unknown_share(tokenizer, ["铜矿", "copper"]) > 0.5
    assert unknown_share(tokenizer, ["铜矿"]) == 1.0
    assert unknown_share(tokenizer, []) == 0.0


def test_embedded_minilm_is_found_without_import_and_finds_the_meaning() -> None:
    config = EncoderConfig(precision="float32")
    directory = encoder_directory(config)
    assert encoder_max_tokens(directory) == 256
    assert len(encoder_digest(config)) == 64
    assert unknown_share(encoder_tokenizer(directory), ["黑豹队的防守只丢了三百分"]) > 0.4
    encoder = load_encoder(EncoderSource(config), device="cpu")
    passages = encoder.encode_passages(["The cat sleeps on the sofa.", "Copper exports rose by a third."])
    query = encoder.encode_queries(["Which metal is sold abroad?"])[0]
    assert np.argmax(passages @ query) == 1


def test_encoder_directory_unknown_or_foreign_models_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^encoder\.model: there is no embedded:nothing; embedded encoders: all-MiniLM"
    ):
        encoder_directory(EncoderConfig(model="embedded:nothing"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^encoder\.model: .* has no modules\.json"):
        encoder_directory(EncoderConfig(model=str(tmp_path)))
    with pytest.raises(UserError, match=r"^encoder\.model: "):
        encoder_directory(EncoderConfig(model="./missing"))
