"""open_flamingo 2.0.1 and ours on the same weights and documents: what training_step.py and gpu.py share.

The package's own training script needs its own data, so its step is written out here with its maths
(open_flamingo/train/train_utils.py): images padded to six with zeros, text padded to its maximum, logits and loss over
the whole vocabulary everywhere, the mask on the embedding's gradient, the gradient clipped, AdamW. Its labels are ours;
its own loop makes them token by token in Python.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_flamingo.src.flamingo import Flamingo as Reference
from open_flamingo.src.flamingo_lm import FlamingoLMMixin
from open_flamingo.src.utils import extend_instance
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from hpc_mm.config import Flamingo, ImageSpec, Language, Train, Vision
from hpc_mm.data.batch import IGNORED, Batch, Row, collate, interleaved_labels, normalised, vocabulary
from hpc_mm.models.flamingo import FlamingoModel, load_tokenizer
from hpc_mm.objectives.next_token import next_token
from hpc_mm.optimizer import parameter_groups

MAX_TOKENS, MAX_IMAGES = 256, 6  # of a document, as open_flamingo's recipe has them
LAYERS = {"llama": "model.layers", "mpt": "transformer.blocks"}
TRAIN = Train(steps=1)  # our defaults, which are the published values


def flamingo(tower: dict[str, int], language: dict[str, Any], words: int, every: int, **sizes: int) -> Flamingo:
    """A Flamingo of random weights whose tokenizer knows ``words`` words."""
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, **{f"w{i}": i for i in range(1, words)}}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    file = Path(tempfile.mkdtemp(prefix="hpc_mm-")) / "tokenizer.json"
    tokenizer.save(str(file))
    return Flamingo(
        vision=Vision(architecture=tower, tokens="after_ln_post"),  # today's open_clip gives the reference these
        language=Language(tokenizer=str(file), architecture=language),
        cross_attn_every_n_layers=every,
        **sizes,
    )


def reference(config: Flamingo) -> Reference:
    """open_flamingo's model as its factory makes it, with what it freezes frozen; gates are open: images matter."""
    tokenizer = load_tokenizer(config.language)
    values = {"vocab_size": len(tokenizer), **config.language.architecture}
    kind = values.pop("model_type")
    language = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    extend_instance(language, FlamingoLMMixin)
    language.set_decoder_layers_attr_name(LAYERS[kind])
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=8, width=8, heads=1, layers=1)
    clip = open_clip.CLIP(16, open_clip.CLIPVisionCfg(**config.vision.architecture, output_tokens=True), text)
    end, image = tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<image>"])
    model = Reference(
        clip,
        language,
        end,
        image,
        vis_dim=config.vision.architecture["width"],
        cross_attn_every_n_layers=config.cross_attn_every_n_layers,
    )
    model.requires_grad_(False)
    for part in (model.perceiver, language.gated_cross_attn_layers, language.get_input_embeddings()):
        part.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(0.5)
    return model.train()


def documents(count: int, tokenizer: Any, size: int, seed: int, median: float = 90, images: int = 2) -> list[Row]:
    """Documents of ``images`` images and log-normal lengths (sigma 0.6), cut at MAX_TOKENS.

    With a median of 90 tokens the mean is about 105.
    """
    draw = np.random.default_rng(seed)
    words = vocabulary(tokenizer)
    rows = []
    for number in range(count):
        length = int(np.clip(draw.lognormal(np.log(median), 0.6), 4 * images, MAX_TOKENS))
        ids = draw.integers(1, tokenizer.base_size, length)
        ids[np.linspace(0, length // 2, images, dtype=int)] = words.image
        pixels = [draw.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(images)]
        rows.append(Row(f"d{number}", ids, interleaved_labels(ids, words), pixels, []))
    return rows


class Ours:
    """Our model and a step of it."""

    name = "hpc_mm"

    def __init__(self, model: FlamingoModel, precision: str = "fp32") -> None:
        self.model, self.half = model, precision == "bf16"
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(parameter_groups(model, TRAIN), lr=TRAIN.learning_rate, fused=True)

    def batch(self, rows: list[list[Row]]) -> Batch:
        return collate(rows, self.model.pad_id, self.model.image_spec)

    def step(self, batch: Batch) -> Tensor:
        """The mean loss before the step."""
        targets = batch.targets
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            loss = next_token(self.model, batch.to(self.device)) / targets
        loss.backward()
        return update(self.model, self.optimizer, loss)


class Theirs:
    """open_flamingo's model and a step of its training loop."""

    name = "open_flamingo"

    def __init__(self, model: Reference, tokenizer: Any, spec: ImageSpec, precision: str = "fp32") -> None:
        self.model, self.half = model, precision == "bf16"
        self.pad, self.spec = vocabulary(tokenizer).pad, spec
        self.device = next(model.parameters()).device
        gated = [p for name, p in model.named_parameters() if "gated_cross_attn" in name]
        others = [p for name, p in model.named_parameters() if p.requires_grad and "gated_cross_attn" not in name]
        groups = [{"params": gated, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=TRAIN.learning_rate)
        self.mask = torch.zeros(len(tokenizer), 1, device=self.device)
        self.mask[tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<image>"])] = 1.0

    def batch(self, rows: list[list[Row]]) -> tuple[Tensor, ...]:
        """(B, 6, 1, 3, S, S) images, and ids, mask and labels (B, 256)."""
        ids, labels = torch.full((len(rows), MAX_TOKENS), self.pad), torch.full((len(rows), MAX_TOKENS), IGNORED)
        mask = torch.zeros_like(ids)
        images = torch.zeros(len(rows), MAX_IMAGES, 1, 3, self.spec.size, self.spec.size)
        for place, (row,) in enumerate(rows):
            length = len(row.input_ids)
            ids[place, :length], labels[place, :length] = map(torch.from_numpy, (row.input_ids, row.labels))
            mask[place, :length] = 1
            images[place, : len(row.images), 0] = normalised(row.images, self.spec)
        return images, ids, mask, labels

    def step(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The mean loss before the step."""
        images, ids, mask, labels = (part.to(self.device, non_blocking=True) for part in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            loss = self.model(images, ids, mask, labels=labels)[0]
        loss.backward()
        self.model.lang_encoder.get_input_embeddings().weight.grad.mul_(self.mask)
        return update(self.model, self.optimizer, loss)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN.clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()
