"""CLIP-FlanT5 (arXiv 2404.01291): projected image patches among the input embeddings of a T5 encoder-decoder.

Parameter names, which checkpoints are made of:

- ``vision.*``: the open_clip tower, which never learns
- ``projector.{0,2}.{weight,bias}``
- ``language.*``: the T5 under transformers' own names; with LoRA its matrices are ``*.base_layer.weight``, and the
  updates, which learn in their place, ``*.lora_A.default.weight`` and ``*.lora_B.default.weight``
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput

from hpc_mm.config import ClipFlanT5
from hpc_mm.models.clip_flant5_weights import load_weights
from hpc_mm.models.cross_attention import own_precision
from hpc_mm.models.flops import clip_flant5_work
from hpc_mm.models.lora import UPDATE, with_updates
from hpc_mm.models.packing import sees, starts
from hpc_mm.models.parts import projector, seeded, splice
from hpc_mm.models.t5 import load_t5, load_tokenizer
from hpc_mm.models.vision_tower import image_spec, load_vision

__all__ = ["ClipFlanT5Model", "build", "load_tokenizer"]

IGNORED = -100  # the label of a token that is no target


def build(
    config: ClipFlanT5, tokenizer: Any, seed: int, precision: Literal["bf16", "fp32"] = "fp32"
) -> ClipFlanT5Model:
    """The model of ``config`` on the CPU in fp32, with ``tokenizer`` from ``load_tokenizer``.

    What is random depends on ``seed`` alone, each part on its own stream; the global generator is left as it was.
    ``config.weights`` is copied over it; then, with ``precision`` bf16, what is frozen is rounded to bf16.
    """
    with seeded(seed, 0):
        vision = load_vision(config.vision)
    with seeded(seed, 1):
        language = load_t5(config.language, tokenizer, config.dropout)
    with seeded(seed, 2):
        model = ClipFlanT5Model(config, tokenizer, vision, language)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.learns(name))
    if config.weights:
        load_weights(model, config.weights)
    if precision == "bf16":
        model.halve_frozen()
    if config.compile:
        model.compile_parts()
    return model.train()


class ClipFlanT5Model(nn.Module):
    """A T5 that reads images as tokens of its encoder. Made by ``build``."""

    def __init__(self, config: ClipFlanT5, tokenizer: Any, vision: Any, language: Any) -> None:
        super().__init__()
        self.config = config
        patches = vision.grid_size[0] * vision.grid_size[1]
        self.image_spec = replace(image_spec(vision), square=config.square, tokens=patches)
        self.vocabulary = len(tokenizer)
        self.end_id: int = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.pad_token_id
        self.vision = vision
        self.projector = projector(vision.conv1.out_channels, language.config.d_model)
        if config.lora.rank:
            language = with_updates(language, config.lora)
        if config.gradient_checkpointing:
            for block in (*language.encoder.block, *language.decoder.block):
                block.gradient_checkpointing = True
                block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        self.language = language
        self._tables = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Embedding)}
        self._work = clip_flant5_work(self)

    # ------------------------------------------------------------ running

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        images: Tensor,
        image_counts: Tensor,
        labels: Tensor,
        segments: Tensor | None = None,
        answer_segments: Tensor | None = None,
    ) -> Tensor:
        """The sum of the cross-entropy of all labels but those that are -100, in fp32.

        ``input_ids`` (B, T), padded on the right, with IMAGE_PLACE for each of the ``images`` (N, 3, S, S), which come
        in the order of their places, ``image_counts`` (B,) of them per row; ``labels`` (B, L) are the decoder's. Rows
        of several samples have ``segments`` (B, T) as in ``packing``, and their like (B, L) for the decoder. Every
        part runs in every call, with a black image where N = 0, so that all ranks of a sharded run issue the same
        collectives and every trainable parameter gets a gradient, zero where it had no part.
        """
        features = self.encode(images)
        read, of = self._read(input_ids, attention_mask, features, image_counts, segments=segments)
        hidden = self._decoded(read, of, labels, answer_segments)
        positions = labels != IGNORED
        return self.language.lm_head(hidden[positions], labels[positions])  # type: ignore[no-any-return]

    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        features: Tensor,
        image_counts: Tensor,
        labels: Tensor,
        length: int = 0,
    ) -> Tensor:
        """Logits of every label, (B, L, vocabulary) in fp32; ``features`` (N, P, D) are what ``encode`` makes.

        ``length``: places of the encoder, images' too; 0 = as many as the longest row has.
        """
        read, of = self._read(input_ids, attention_mask, features, image_counts, length)
        return self.language.lm_head(self._decoded(read, of, labels))  # type: ignore[no-any-return]

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, S, S) -> features (N, P, D); a black image's where N = 0."""
        if not len(images):
            images = images.new_zeros(1, *images.shape[1:])
        with torch.no_grad(), own_precision(self.vision, images.device):
            _, patches = self.vision(images.to(next(self.vision.parameters()).dtype))
        return self.projector(patches.to(next(self.projector.parameters()).dtype))  # type: ignore[no-any-return]

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, features: Tensor, image_counts: Tensor, **how: Any
    ) -> Tensor:
        """Answers, (B, at most max_new_tokens) padded on the right; ``how`` is for transformers' ``generate``."""
        read, of = self._read(input_ids, attention_mask, features, image_counts)
        how = {"decoder_start_token_id": self.pad_id, "eos_token_id": self.end_id, "pad_token_id": self.pad_id, **how}
        found = self.language.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=read), attention_mask=of >= 0, **how
        )
        return found[:, 1:]  # type: ignore[no-any-return]

    def _read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        features: Tensor,
        image_counts: Tensor,
        length: int = 0,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the encoder makes of each row, (B, T', D), and the sample of each place, (B, T'), -1 = padding."""
        embedded = self.language.shared(input_ids.clamp(min=0))
        inputs, token = splice(embedded, input_ids, features, image_counts, attention_mask, length)
        samples = attention_mask - 1 if segments is None else segments
        of = nn.functional.pad(samples, (0, 1), value=-1).gather(1, token)
        mask = (of >= 0)[:, None] if segments is None else of[:, :, None] == of[:, None]
        return self.language.encoder(inputs_embeds=inputs, attention_mask=mask[:, None]).last_hidden_state, of

    def _decoded(self, read: Tensor, of: Tensor, labels: Tensor, segments: Tensor | None = None) -> Tensor:
        """What the head reads at every label, (B, L, D), from what ``_read`` gave.

        transformers takes masks of four dimensions as they are, without a look at their values, which would wait.
        """
        before = nn.functional.pad(labels[:, :-1].clamp(min=self.pad_id), (1, 0), value=self.pad_id)
        own, across = None, (of >= 0)[:, None]
        if segments is not None:
            before = before.masked_fill(starts(segments), self.pad_id)
            own = sees(segments)[:, None]
            across = segments.clamp(min=0)[:, :, None] == of[:, None]  # padding looks at something, else it were nan
        hidden: Tensor = self.language.decoder(
            input_ids=before,
            attention_mask=own,
            encoder_hidden_states=read,
            encoder_attention_mask=across[:, None],
            use_cache=False,
        ).last_hidden_state
        config = self.language.config
        return hidden * config.d_model**-0.5 if config.scale_decoder_outputs else hidden

    def halve_frozen(self) -> None:
        """Keep frozen weights in bf16, so that autocast need not cast them in every step, nor keep two copies."""
        for parameter in self.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)

    def train(self, mode: bool = True) -> ClipFlanT5Model:
        """As torch's, but the tower stays in evaluation mode; a frozen T5 has its dropout in training (as upstream)."""
        super().train(mode)
        self.vision.eval()
        return self

    def compile_parts(self, backend: str = "inductor") -> None:
        """torch.compile the tower and the layers in place; names do not change."""
        self.vision.compile(backend=backend)
        for block in (*self.language.encoder.block, *self.language.decoder.block):
            block.compile(backend=backend)

    # ------------------------------------------------------------ what training asks

    @staticmethod
    def part_of(name: str) -> Literal["vision", "projector", "language"]:
        """The part that a parameter belongs to, by its name."""
        if name.startswith("vision."):
            return "vision"
        return "projector" if name.startswith("projector.") else "language"

    def learns(self, name: str) -> bool:
        """Whether a parameter is trained: those of trainable parts; with LoRA, of the language model its updates."""
        part = self.part_of(name)
        updated = part != "language" or not self.config.lora.rank or UPDATE in name
        return part in self.config.trainable and updated

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies: to matrices, not to tables of tokens and places."""
        return parameter.ndim >= 2 and name not in self._tables

    def training_flops(self, tokens: int, pairs: int, images: int, targets: int) -> float:
        """Floating-point operations that training on a batch needs (the formula stands in ``flops``).

        ``tokens`` without padding, of encoder (an image's places too) and decoder together; the sum of the squared
        encoder lengths as ``pairs``; ``images``; the decoder's tokens as ``targets``.
        """
        source = tokens - targets
        crossed = targets * pairs / max(source, 1)  # a target looks at its row's encoder tokens, here at their mean
        counts = {"image": max(images, 1), "source": source, "pair": pairs, "target": targets, "crossed": crossed}
        return sum(counts[work.per] * work.forward * (1 + work.backward) for work in self._work)
