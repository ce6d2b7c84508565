"""VQAScore (arXiv 2404.01291): how likely a model says "Yes" when it is asked whether an image shows a text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_mm.answerer import Running, Weights, trained
from hpc_mm.config import IMAGE_TOKEN, ConfigError
from hpc_mm.data.batch import special_text, without_special
from hpc_mm.data.chat import PAD, ended_ids, padded, spliced_ids
from hpc_mm.data.templates import QUESTION, Turn, t5_v1_question
from hpc_mm.features import Features, slices
from hpc_mm.judging import ANSWER, Template
from hpc_mm.metrics import vqascore
from hpc_mm.models.clip_flant5 import ClipFlanT5Model

MAX_TOKENS = 2048  # of a question, its image as one; what CLIP-FlanT5 was trained with
STEP = 8  # places of the encoder: a prompt and its image are padded to a multiple of it
PLACES_OF_GPU, PLACES_OF_CPU = 2**14, 2**10  # of the encoder, that are read at once in fp32
Ids = NDArray[np.int64]


class VqaScorer:
    """Scores of ``model`` on ``device``; ``keep_bytes`` of image features are kept there.

    With ``precision`` bf16 the model runs under autocast, ``batch`` pairs at a time; in fp32 it is as many as their
    length has room for, whatever ``batch`` is. A prompt is padded by its own length, and batches are filled up, so that
    a pair decides the shape of the arithmetic that it is part of: its score is the same bits whatever is scored beside
    it or before, in any order; in bf16 with the same ``batch``.
    """

    def __init__(
        self,
        model: ClipFlanT5Model,
        tokenizer: Any,
        device: torch.device | str,
        batch: int = 32,
        keep_bytes: int = 2**30,
        precision: Literal["bf16", "fp32"] = "fp32",
        template: Template = "t5_v1",
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        self.model = model.eval().to(device)
        self.tokenizer, self.special = tokenizer, special_text(tokenizer)
        self.device, self.half = torch.device(device), precision == "bf16"
        self.batch = batch
        self.features = Features(keep_bytes)
        self.template, self.max_tokens = template, max_tokens
        self.answer = torch.from_numpy(ended_ids(ANSWER, tokenizer))  # (L,), its end with it

    def score(
        self,
        images: Sequence[bytes],
        texts: Sequence[str],
        pairs: Sequence[tuple[int, int]],
        mode: Literal["vqascore", "p_yes"] = "vqascore",
    ) -> NDArray[np.float64]:
        """Of each pair (place of an encoded image, place of a text): (pairs,), from 0 to 1. Errors as below."""
        return vqascore(self.log_probabilities(images, texts, pairs), mode)

    @torch.no_grad()
    def log_probabilities(
        self,
        images: Sequence[bytes],
        texts: Sequence[str],
        pairs: Sequence[tuple[int, int]],
        names: Sequence[str] = (),
    ) -> NDArray[np.float64]:
        """Of the answer's tokens, its end the last: (pairs, tokens). ``names``: of the images, for errors.

        Features of all images are on the device together. ConfigError where an image cannot be read, and where a text
        is empty or too long.
        """
        prompts = [self.prompt(text, f"text {place}") for place, text in enumerate(texts)]
        digests = [hashlib.sha256(image).digest() for image in images]
        owners = names or [f"image {place}" for place in range(len(images))]
        wanted = {digests[image]: (images[image], owners[image]) for image, _ in pairs}
        found = np.empty((len(pairs), len(self.answer)))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            features = self.features.of(wanted, self.model.encode, self.model.image_spec, self.device)
            for length, places in self._by_length(prompts, pairs).items():
                rows_at_once = self.rows(length)
                for some in slices(places, rows_at_once):
                    filled = [*some, *[some[-1]] * (rows_at_once - len(some))]
                    rows = [prompts[pairs[place][1]] for place in filled]
                    seen = torch.stack([features[digests[pairs[place][0]]] for place in filled])
                    found[some] = self._answered(rows, length, seen)[: len(some)]
        return found

    def prompt(self, text: str, name: str) -> Ids:
        """The encoder's ids of a question about one image. ConfigError where the text is empty or too long."""
        cleaned = without_special(text, self.special)
        if not cleaned.strip():
            raise ConfigError(f"{name} is empty")
        question = QUESTION.format(cleaned)
        plain = self.template == "t5_plain"
        ids = spliced_ids(
            IMAGE_TOKEN + question if plain else t5_v1_question([Turn("user", question, 1)]), self.tokenizer
        )
        if len(ids) > self.max_tokens:
            raise ConfigError(
                f"{name}: its question has {len(ids):,} tokens, the model was trained on at most {self.max_tokens:,}: "
                "shorten it"
            )
        return ids

    def check(self, texts: Mapping[str, str]) -> int:
        """How many texts hold what would be taken for a special token, which is removed before they are scored.

        ``texts``: by name. ConfigError as ``prompt``.
        """
        for name, text in texts.items():
            self.prompt(text, name)
        return sum(without_special(text, self.special) != text for text in texts.values())

    def rows(self, length: int) -> int:
        """Pairs of so many places that are scored at once."""
        places = PLACES_OF_CPU if self.device.type == "cpu" else PLACES_OF_GPU
        return self.batch if self.half else max(1, places // length)

    def _by_length(self, prompts: Sequence[Ids], pairs: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
        """Places of pairs by how many places of the encoder they take, with padding."""
        found: dict[int, list[int]] = {}
        for place, (_, text) in enumerate(pairs):
            length = len(prompts[text]) - 1 + self.model.image_spec.tokens
            found.setdefault(-(-length // STEP) * STEP, []).append(place)
        return found

    def _answered(self, rows: Sequence[Ids], length: int, features: Tensor) -> NDArray[np.float64]:
        """Log-probabilities of the answer's tokens after prompts, which take ``length`` places: (rows, tokens)."""
        ids = padded(rows, PAD)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]).long()
        labels = self.answer.expand(len(rows), -1).to(self.device)
        counts = torch.ones(len(rows), dtype=torch.int64, device=self.device)
        logits = self.model.logits(ids.to(self.device), mask.to(self.device), features, counts, labels, length)
        chances = logits.float().log_softmax(dim=-1).gather(-1, labels[..., None])[..., 0]
        found: NDArray[np.float64] = chances.double().cpu().numpy()
        return found


def load(weights: Weights, running: Running, template: Template, max_tokens: int) -> VqaScorer:
    """The scorer of a checkpoint. ConfigError where its weights are of another model."""
    model, tokenizer = trained(weights, running.precision)
    how = (running.device, running.batch, running.keep_bytes, running.precision)
    return VqaScorer(model, tokenizer, *how, template, max_tokens)
