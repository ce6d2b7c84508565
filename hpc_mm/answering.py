"""A Flamingo model's answers to prompts: the text that it writes, or the log-probabilities of given candidates.

A prompt is a Sample. Its Image parts are the only images; ``<|endofchunk|>`` within a Text part is that token, with or
without an image before it; what else in a Text part would be taken for a special token is removed. Nothing is put
between parts, and nothing is stripped. The last Text is open: what is written, or scored, follows it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_mm.benchmark import Decoding
from hpc_mm.config import ENDOFCHUNK_TOKEN, IMAGE_TOKEN, ConfigError
from hpc_mm.data.batch import encode, vocabulary, without_special
from hpc_mm.data.schema import Sample, Text
from hpc_mm.features import Features, slices
from hpc_mm.models.flamingo import FlamingoModel

CACHED = 2**14  # tokens whose keys and values exist at once while candidates are scored
LOGITS = 2**26  # that exist at once while candidates are scored: 256 MiB in fp32


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for a batch."""

    id: str
    input_ids: NDArray[np.int64]  # (T,)
    images: list[tuple[bytes, bytes]]  # digest and encoded bytes, in the order of the image tokens


class FlamingoAnswers:
    """Answers of ``model`` on ``device``, ``batch`` prompts at a time; ``keep_bytes`` of image features are kept there.

    With ``precision`` bf16 the model runs under autocast. Features of images, and scores, are the same bits whatever is
    asked together, before, or in which order. So are texts with the same ``batch`` of the same prompts; among others
    logits differ by rounding, and texts where two are as likely as that.
    """

    def __init__(
        self,
        model: FlamingoModel,
        tokenizer: Any,
        device: torch.device | str,
        batch: int = 32,
        keep_bytes: int = 2**30,
        precision: Literal["bf16", "fp32"] = "fp32",
    ) -> None:
        self.model = model.eval().to(device)
        self.tokenizer, self.words = tokenizer, vocabulary(tokenizer)
        self.device, self.batch, self.half = torch.device(device), batch, precision == "bf16"
        self.features = Features(keep_bytes)

    def check(self, prompts: Sequence[Sample], answers: Decoding | Sequence[str]) -> None:
        """ConfigError where a prompt leaves no room for an answer, or for the longest of the candidates."""
        following = (
            answers.max_new_tokens
            if isinstance(answers, Decoding)
            else max(len(self._candidate(text)) for text in answers)
        )
        for prompt in prompts:
            self._tokens(prompt, following)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sample], decoding: Decoding) -> list[str]:
        """What the model writes after each prompt, without special tokens and else uncut.

        Prompts of like length share a batch, the longest first. ConfigError where one has no room for an answer.
        """
        ready = [self._prompt(prompt, decoding.max_new_tokens) for prompt in prompts]
        features = self._encoded(ready)
        order = sorted(range(len(ready)), key=lambda place: len(ready[place].input_ids), reverse=True)
        texts = [""] * len(ready)
        for places in slices(order, self.batch):
            written = self._write([ready[place] for place in places], features, decoding)
            for place, text in zip(places, written, strict=True):
                texts[place] = text
        return texts

    @torch.no_grad()
    def score(self, prompts: Sequence[Sample], candidates: Sequence[str]) -> NDArray[np.float64]:
        """Mean log-probability of each candidate's tokens after each prompt, (prompts, candidates).

        Each prompt is read once, alone, so that its scores are the same bits whatever else is asked.
        """
        tree = Candidates([self._candidate(text) for text in candidates])
        ready = [self._prompt(prompt, tree.longest) for prompt in prompts]
        features = self._encoded(ready)
        found = np.empty((len(ready), len(candidates)))
        with self._precision():
            for row, prompt in enumerate(ready):
                scores = self._score(prompt, self._latents([prompt], features), tree)
                found[row] = scores.double().cpu().numpy()
        return found

    # ------------------------------------------------------------ text

    def _prompt(self, sample: Sample, following: int) -> Prompt:
        images = []
        for number, part in enumerate(sample.parts):
            if isinstance(part, Text):
                continue
            if part.data is None:
                raise ConfigError(f"question {sample.id}: part {number} is an image without its bytes")
            images.append((hashlib.sha256(part.data).digest(), part.data))
        return Prompt(sample.id, self._tokens(sample, following), images)

    def _tokens(self, sample: Sample, following: int) -> NDArray[np.int64]:
        """(T,) of a prompt's text and images, after which so many more have room."""
        texts = [""]
        for part in sample.parts:
            if isinstance(part, Text):
                texts[-1] += part.text
            else:
                texts.append("")
        ids = encode(self.tokenizer, IMAGE_TOKEN.join(self._cleaned(text) for text in texts))
        room = context(self.model)
        if len(ids) + following > room:
            raise ConfigError(
                f"question {sample.id}: its prompt of {len(ids):,} tokens and {following} of an answer are more than "
                f"the model's context of {room:,}; take fewer shots, or shorter demonstrations"
            )
        if not len(ids):
            raise ConfigError(f"question {sample.id}: its prompt is empty")
        return ids

    def _cleaned(self, text: str) -> str:
        return ENDOFCHUNK_TOKEN.join(
            without_special(piece, self.words.special) for piece in text.split(ENDOFCHUNK_TOKEN)
        )

    def _candidate(self, text: str) -> tuple[int, ...]:
        ids = tuple(self.tokenizer(without_special(text, self.words.special), add_special_tokens=False)["input_ids"])
        if not ids:
            raise ConfigError(f"candidate {text!r} has no token")
        return ids

    # ------------------------------------------------------------ images

    def _encoded(self, prompts: Sequence[Prompt]) -> dict[bytes, Tensor]:
        """Features of the prompts' images by digest, (latents, width) : 256 KiB each as OpenFlamingo has them."""
        named = {digest: (data, f"question {prompt.id}") for prompt in prompts for digest, data in prompt.images}
        with self._precision():
            return self.features.of(named, self.model.encode, self.model.image_spec, self.device)

    def _latents(self, prompts: Sequence[Prompt], features: Mapping[bytes, Tensor]) -> Tensor:
        """(N, latents, width) of the prompts' images in order; where there are none, one that nobody looks at."""
        found = [features[digest] for prompt in prompts for digest, _ in prompt.images]
        return torch.stack(found or [torch.zeros_like(self.model.resampler.latents)])

    # ------------------------------------------------------------ the model

    def _write(self, prompts: Sequence[Prompt], features: Mapping[bytes, Tensor], decoding: Decoding) -> list[str]:
        length = max(len(prompt.input_ids) for prompt in prompts)
        ids = torch.full((len(prompts), length), self.model.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            own = len(prompt.input_ids)
            ids[row, length - own :], mask[row, length - own :] = torch.from_numpy(prompt.input_ids), 1
        counts = torch.tensor([len(prompt.images) for prompt in prompts])
        penalty = {"length_penalty": decoding.length_penalty} if decoding.beams > 1 else {}
        with self._precision():
            written = self.model.generate(
                ids.to(self.device),
                mask.to(self.device),
                self._latents(prompts, features),
                counts.to(self.device),
                max_new_tokens=decoding.max_new_tokens,
                num_beams=decoding.beams,
                do_sample=False,
                **penalty,
            )
        texts: list[str] = self.tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
        return texts

    def _score(self, prompt: Prompt, latents: Tensor, tree: Candidates) -> Tensor:
        """Of one prompt: (candidates,)."""
        ids = torch.from_numpy(prompt.input_ids)[None].to(self.device)
        with self.model.after(ids, latents) as (first, logits):
            tokens, places = tree.tokens.to(self.device), tree.places.to(self.device)
            scores = torch.zeros(tokens.shape, device=self.device)
            scores[:, 0] = first.float().log_softmax(dim=-1)[tokens[:, 0]]
            width = tree.rows.shape[1]
            if width:
                at_once = max(1, min(CACHED // (ids.shape[1] + width), LOGITS // (width * len(first))))
                for start in range(0, len(tree.rows), at_once):
                    rows = tree.rows[start : start + at_once].to(self.device)
                    inside = (places >= start) & (places < start + at_once)
                    chances = logits(rows).float().log_softmax(dim=-1)
                    at = (places[inside] - start)[:, None], torch.arange(width, device=self.device)
                    scores[inside, 1:] = chances[(*at, tokens[inside, 1:])]
        lengths = tree.lengths.to(self.device)
        padding = torch.arange(tokens.shape[1], device=self.device) >= lengths[:, None]
        return scores.masked_fill(padding, 0).sum(dim=1) / lengths

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)


class Candidates:
    """Candidates as rows of tokens that the model reads after a prompt: beginnings that several share are one row.

    A candidate of one token needs no row: the prompt alone foretells it.
    """

    def __init__(self, candidates: Sequence[tuple[int, ...]]) -> None:
        if not candidates:
            raise ConfigError("there are no candidates to score")
        self.longest = max(map(len, candidates))
        self.lengths = torch.tensor([len(one) for one in candidates])
        self.tokens = _padded(candidates, self.longest)  # (C, longest)
        rows: list[tuple[int, ...]] = []
        row_of: dict[tuple[int, ...], int] = {}
        for start in sorted({one[:-1] for one in candidates}, reverse=True):  # what begins another comes after it
            if not rows or rows[-1][: len(start)] != start:
                rows.append(start)
            row_of[start] = len(rows) - 1
        self.rows = _padded(rows, self.longest - 1)  # (R, longest - 1)
        self.places = torch.tensor([row_of[one[:-1]] for one in candidates])  # (C,) a candidate's row


def _padded(rows: Sequence[tuple[int, ...]], length: int) -> Tensor:
    """On the right, with a token that no real one sees."""
    return torch.tensor([row + (0,) * (length - len(row)) for row in rows]).view(len(rows), length)


def context(model: FlamingoModel) -> int:
    """Tokens that the language model can take, as its config has it."""
    config = model.language.config.get_text_config()
    return int(config.max_seq_len if config.model_type == "mpt" else config.max_position_embeddings)
