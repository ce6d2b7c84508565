"""OpenFlamingo's architecture (arXiv 2308.01390) over any transformers language model and any open_clip tower.

Parameter names, which checkpoints are made of:

- ``vision.*``: the open_clip tower
- ``resampler.{latents,layers.I.{0,1}.*,norm}``
- ``language.LAYERS.I.gated_cross_attn_layer.{attn.{norm,to_q,to_kv,to_out},attn_gate,ff.{0,1,3},ff_gate}``
- ``language.LAYERS.I.decoder_layer.*`` and everything else of the language model, under its own names
- ``language.EMBEDDING.new_rows`` and, where the head is not tied, ``language.HEAD.new_rows``; the tables they extend
  are ``language.EMBEDDING.base.weight`` and ``language.HEAD.base.weight``
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hpc_mm.config import ENDOFCHUNK_TOKEN, IMAGE_TOKEN, ConfigError, Flamingo, TrainablePart
from hpc_mm.models.cross_attention import (
    ConditionedLayer,
    Conditioning,
    GatedCrossAttention,
    Images,
    PerceiverResampler,
    image_of_token,
    own_precision,
)
from hpc_mm.models.flops import flamingo_work
from hpc_mm.models.language_model import (
    add_token_rows,
    decoder_layers,
    load_language,
    load_tokenizer,
)
from hpc_mm.models.openflamingo_weights import LEARNT, load_openflamingo
from hpc_mm.models.packing import packed_arguments
from hpc_mm.models.parts import seeded
from hpc_mm.models.vision_tower import image_spec, load_vision
from hpc_mm.models.weight_files import exported_files, load_exported

__all__ = ["FlamingoModel", "build", "load_tokenizer"]


def build(config: Flamingo, tokenizer: Any, seed: int, precision: Literal["bf16", "fp32"] = "fp32") -> FlamingoModel:
    """The model of ``config`` on the CPU in fp32, with ``tokenizer`` from ``load_tokenizer``.

    What is random depends on ``seed`` alone, each part on its own stream; the global generator is left as it was.
    ``config.weights`` is copied over it; then, with ``precision`` bf16, frozen towers are rounded to bf16.
    """
    with seeded(seed, 0):
        vision = load_vision(config.vision)
    with seeded(seed, 1):
        language = load_language(config.language, tokenizer)
    with seeded(seed, 2):
        model = FlamingoModel(config, tokenizer, vision, language)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.part_of(name) in config.trainable)
    if config.weights:
        if exported := exported_files(Path(config.weights).expanduser()):
            load_exported(model, dict(model.named_parameters()), exported, LEARNT)
        else:
            load_openflamingo(model, config.weights)
    if precision == "bf16":
        model.halve_frozen()
    if config.compile:
        model.compile_parts()
    return model.train()


class FlamingoModel(nn.Module):
    """A causal language model that sees images through gated cross-attention. Made by ``build``."""

    def __init__(self, config: Flamingo, tokenizer: Any, vision: Any, language: Any) -> None:
        super().__init__()
        self.config = config
        self.image_spec = image_spec(vision)
        self.vocabulary = len(tokenizer)
        self.image_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.end_id: int = tokenizer.convert_tokens_to_ids(ENDOFCHUNK_TOKEN)
        self.pad_id: int = tokenizer.pad_token_id
        self.given = Conditioning()
        width = vision.conv1.out_channels
        self.vision = vision
        self.resampler = PerceiverResampler(
            width, config.resampler_depth, config.resampler_latents, config.gradient_checkpointing
        )
        self.layers_name = self._wrap_layers(language, width)
        add_token_rows(language, tokenizer, self.given)
        self.language = language
        if config.gradient_checkpointing and "vision" in config.trainable:
            vision.set_grad_checkpointing(True)
        self._tables = {
            f"{name}.{key}"
            for name, module in self.named_modules()
            if isinstance(module, nn.Embedding)
            for key, _ in module.named_parameters()
        }
        self._work = flamingo_work(self)

    def _wrap_layers(self, language: Any, vision_width: int) -> str:
        name, layers = decoder_layers(language)
        width = language.config.hidden_size
        every = self.config.cross_attn_every_n_layers
        for number, layer in enumerate(layers):
            gated = GatedCrossAttention(width, vision_width) if (number + 1) % every == 0 else None
            layers[number] = ConditionedLayer(gated, layer, self.given, self.config.gradient_checkpointing)
        return name

    # ------------------------------------------------------------ running

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        images: Tensor,
        image_counts: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token, (B, T, V); with ``positions``, a (B, T) mask, at those alone: (selected, V).

        With ``targets`` (selected,) too, the tokens that follow there: the sum of their cross-entropy in fp32, for
        which the logits never all exist at once. Rows are padded on the right, so that no token sees padding.
        ``images`` (N, 3, S, S) are the rows' images in the order of their image tokens, ``image_counts`` (B,) of them
        per row; ``segments`` as in ``packing``. Every part runs in every call, with a black image where N = 0, so that
        all ranks of a sharded run issue the same collectives and every trainable parameter gets a gradient, zero where
        it had no part.
        """
        torch._assert_async(attention_mask[:, 0].all(), "rows must be padded on the right")
        how = {} if segments is None else packed_arguments(self.language, segments)
        with self._conditioned(input_ids, images, image_counts, segments, keep=False):
            self.given.positions, self.given.targets = positions, targets
            found: Tensor = self.language(input_ids=input_ids, use_cache=False, **how).logits
            assert self.given.found is not None  # the head ran
            if targets is not None and found.data_ptr() != self.given.found.data_ptr():
                raise ConfigError(f"{type(self.language).__name__} changes its head's logits, which is not supported")
        return found

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, images: Tensor, image_counts: Tensor, **how: Any
    ) -> Tensor:
        """Prompts padded on the left -> prompts and what was generated, as transformers' ``generate`` gives them.

        ``how`` is for transformers: max_new_tokens, num_beams, ... It ends at ``<|endofchunk|>`` unless told otherwise.
        ``images`` may be what ``encode`` made of them. Whatever the number of beams, each image is encoded once, and
        each prompt is read once where keys and values are kept.
        """
        # use_cache: MPT's config.json turns it off, which was meant for training
        how = {"eos_token_id": self.end_id, "pad_token_id": self.pad_id, "use_cache": True, **how}
        copies = max(how.get("num_beams", 1), how.get("num_return_sequences", 1))
        with self._conditioned(input_ids, images, image_counts, None, keep=True):
            if how["use_cache"] and copies > 1 and input_ids.shape[1] > 1:
                kept, _ = self._read(input_ids[:, :-1], attention_mask[:, :-1], last=False)
                kept.batch_repeat_interleave(copies)
                how["past_key_values"] = kept
            return self.language.generate(input_ids=input_ids, attention_mask=attention_mask, **how)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def after(self, input_ids: Tensor, images: Tensor) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
        """Read one prompt, (1, T), once, with all of its ``images``, which may be what ``encode`` made of them.

        Gives the logits of the next token, (V,), and a function from continuations (R, L) to the logits after each of
        their tokens, (R, L, V).
        """
        count = (input_ids == self.image_id).sum(dim=1)
        with torch.no_grad(), self._conditioned(input_ids, images, count, None, keep=True):
            kept, last = self._read(input_ids, torch.ones_like(input_ids), last=True)

            def logits(continuations: Tensor) -> Tensor:
                rows, tokens = continuations.shape
                own = copy.copy(kept)
                own.layers = [copy.copy(layer) for layer in kept.layers]
                own.batch_repeat_interleave(rows)
                mask = continuations.new_ones(rows, input_ids.shape[1] + tokens)
                how = self._positions(mask, continuations)
                found: Tensor = self.language(
                    input_ids=continuations, attention_mask=mask, past_key_values=own, use_cache=True, **how
                ).logits
                return found

            yield last[0], logits

    def _read(self, input_ids: Tensor, attention_mask: Tensor, last: bool) -> tuple[Any, Tensor]:
        """Keys and values of the first tokens of the prompts that are ``given``, and the last one's logits if ``last``.

        What follows looks at each prompt's last image.
        """
        images = self.given.images
        assert images is not None
        self.given.images = Images(images.latents, images.image[:, : input_ids.shape[1]], keep=False)
        self.given.positions = torch.zeros_like(input_ids, dtype=torch.bool)
        self.given.positions[:, -1] = last
        how = self._positions(attention_mask, input_ids)
        found = self.language(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **how)
        self.given.positions = None
        self.given.images = Images(images.latents, images.image[:, -1:], keep=True)
        return found.past_key_values, found.logits

    def _positions(self, attention_mask: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        """The last tokens' places, counted without padding, where the language model takes them; else its own way."""
        if "position_ids" not in inspect.signature(self.language.forward).parameters:
            return {}
        return {"position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]}

    @contextlib.contextmanager
    def _conditioned(
        self, input_ids: Tensor, images: Tensor, image_counts: Tensor, segments: Tensor | None, keep: bool
    ) -> Iterator[None]:
        image = image_of_token(input_ids == self.image_id, image_counts, segments)
        self.given.images = Images(images if images.ndim == 3 else self.encode(images), image, keep)
        try:
            yield
        finally:
            self.given.images = self.given.positions = self.given.targets = self.given.found = None

    def encode(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, latents, vision width); a black image's where N = 0."""
        if not len(images):
            images = images.new_zeros(1, *images.shape[1:])
        learns = torch.is_grad_enabled() and "vision" in self.config.trainable
        with torch.set_grad_enabled(learns), own_precision(self.vision, images.device):
            _, patches = self.vision(images.to(next(self.vision.parameters()).dtype))
        return self.resampler(patches)  # type: ignore[no-any-return]

    def halve_frozen(self) -> None:
        """Keep frozen towers in bf16, so that autocast need not cast them in every step, nor keep two copies."""
        for name, parameter in self.named_parameters():
            if self.part_of(name) in ("vision", "language") and not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)

    def train(self, mode: bool = True) -> FlamingoModel:
        """As torch's, but what is frozen stays in evaluation mode, without dropout."""
        super().train(mode)
        for part in ("vision", "language"):
            if part not in self.config.trainable:
                getattr(self, part).eval()
        return self

    def compile_parts(self, backend: str = "inductor") -> None:
        """torch.compile the tower, the decoder layers and cross-attention in place; names do not change."""
        self.vision.compile(backend=backend)
        for layer in self.language.get_submodule(self.layers_name):
            layer.decoder_layer.compile(backend=backend)
            if layer.gated_cross_attn_layer is not None:
                layer.gated_cross_attn_layer.compile(backend=backend)

    # ------------------------------------------------------------ what training asks

    @staticmethod
    def part_of(name: str) -> TrainablePart:
        """The part that a parameter belongs to, by its name."""
        if name.startswith("vision."):
            return "vision"
        if name.startswith("resampler."):
            return "resampler"
        if ".gated_cross_attn_layer." in name:
            return "cross_attention"
        return "new_tokens" if name.endswith(".new_rows") else "language"

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies: to matrices of cross-attention and of the towers; not to embeddings."""
        if self.part_of(name) in ("resampler", "new_tokens") or name in self._tables:
            return False
        return parameter.ndim >= 2 and not name.endswith("embedding")

    def training_flops(self, tokens: int, pairs: int, images: int, targets: int) -> float:
        """Floating-point operations that training on a batch needs (the formula stands in ``flops``): ``tokens``
        without padding, the sum of the squared row lengths as ``pairs``, ``images``, and ``targets`` with logits."""
        counts = {"image": max(images, 1), "token": tokens, "pair": pairs, "target": targets}
        return sum(counts[work.per] * work.forward * (1 + work.backward) for work in self._work)
