"""A tokenizer of sixty words, and small Flamingos on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tiny import BATCH, FAMILIES, TOWER, WORDS, open_gates, ragged
from tokenizers import Tokenizer, models, pre_tokenizers

from hpc_mm.config import Flamingo, Language, Vision
from hpc_mm.models.flamingo import FlamingoModel, build, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, **{f"w{i}": i for i in range(1, WORDS)}}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return str(file)


@pytest.fixture
def make(tokenizer_file: str) -> Callable[..., FlamingoModel]:
    """Builds a small Flamingo on one family; gates are opened, unless told not to, so that images matter."""

    def make(
        family: str = "llama",
        seed: int = 0,
        tokens: str = "before_ln_post",
        opened: bool = True,
        precision: str = "fp32",
        **config: Any,
    ) -> FlamingoModel:
        extra = config.pop("architecture", {})
        language = Language(
            tokenizer=config.pop("tokenizer", tokenizer_file), architecture={**FAMILIES[family], **extra}
        )
        vision = Vision(architecture=TOWER, tokens=tokens)
        sizes = {"cross_attn_every_n_layers": 2, "resampler_depth": 2, "resampler_latents": 4, **config}
        model = build(Flamingo(vision=vision, language=language, **sizes), load_tokenizer(language), seed, precision)
        if opened:
            open_gates(model)
        return model

    return make


@pytest.fixture
def batch() -> BATCH:
    """Rows with two images, with one that comes late, with none, and with padding on the right."""
    return ragged(left=False)
