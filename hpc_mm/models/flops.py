"""Floating-point operations that training on a batch needs, for model-FLOPs utilisation.

A matrix of P weights costs 2 P per token forward, 2 P backward for its input's gradient where something before it
learns, and 2 P for its own gradient where it learns. Attention of a query over k keys costs 4 k w forward (w: width of
all heads; causality subtracts nothing) and twice that backward where gradients pass. Element-wise work counts nothing,
and recomputation under gradient checkpointing neither (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import nn

from hpc_mm.models.cross_attention import INNER
from hpc_mm.models.lora import UPDATE

if TYPE_CHECKING:
    from hpc_mm.models.clip_flant5 import ClipFlanT5Model
    from hpc_mm.models.flamingo import FlamingoModel


class Work(NamedTuple):
    """``forward`` operations per ``per``, and ``backward`` times as many again; a pair is two tokens of one row.

    Of an encoder-decoder, ``source`` is a token of the encoder, ``target`` one of the decoder, ``crossed`` one of each.
    """

    per: Literal["image", "token", "source", "pair", "target", "crossed"]
    forward: float
    backward: int


def flamingo_work(model: FlamingoModel) -> list[Work]:
    """Every matrix and every attention of a Flamingo; made once, since sharding empties the parameters."""
    learns = set(model.config.trainable)
    media = bool(learns & {"vision", "resampler"})
    return [
        *_vision(model.vision, "vision" in learns),
        *_resampler(model, "resampler" in learns),
        *_language(model, media),
    ]


def _vision(tower: Any, learns: bool) -> list[Work]:
    grid, width = tower.grid_size, tower.conv1.out_channels
    tokens = grid[0] * grid[1] + 1
    blocks = weights(tower.transformer)
    scores = 4 * tokens * width * len(tower.transformer.resblocks)
    pixels = 2 * tower.conv1.weight.numel() * (tokens - 1)  # its input, the image, needs no gradient
    return [
        Work("image", pixels, int(learns)),
        Work("image", tokens * 2 * blocks, 2 * learns),
        Work("image", tokens * scores, 2 * learns),
    ]


def _resampler(model: FlamingoModel, learns: bool) -> list[Work]:
    grid = model.vision.grid_size
    latents = model.config.resampler_latents
    keys = grid[0] * grid[1] + latents
    passes = learns or "vision" in model.config.trainable
    work = []
    for attention, mlp in model.resampler.pairs():
        kv = attention.to_kv.weight.numel()
        on_latents = weights(attention) - kv + weights(mlp)
        work.append(Work("image", 2 * (keys * kv + latents * on_latents), passes + learns))
        work.append(Work("image", 4 * latents * keys * INNER, 2 * passes))
    return work


def _language(model: FlamingoModel, media: bool) -> list[Work]:
    learns, crosses = "language" in model.config.trainable, "cross_attention" in model.config.trainable
    passes = learns or "new_tokens" in model.config.trainable  # gradients reach the embeddings
    width = model.language.config.hidden_size
    work = []
    for layer in model.language.get_submodule(model.layers_name):
        gated = layer.gated_cross_attn_layer
        if gated is not None:
            kv = gated.attn.to_kv.weight.numel()
            latents = model.config.resampler_latents
            work.append(Work("image", 2 * latents * kv, media + crosses))
            work.append(Work("token", 2 * (weights(gated) - kv), passes + crosses))
            passes = passes or media or crosses
            work.append(Work("token", 4 * latents * INNER, 2 * passes))
        work.append(Work("token", 2 * weights(layer.decoder_layer), passes + learns))
        work.append(Work("pair", 4 * width, 2 * passes))
    return [*work, Work("target", 2 * width * model.vocabulary, passes + learns)]


def clip_flant5_work(model: ClipFlanT5Model) -> list[Work]:
    """Every matrix and every attention of a CLIP-FlanT5, but the decoder's attention to itself: answers are short."""
    projects, language, lora = "projector" in model.config.trainable, model.language, model.config.lora.rank
    learns = "language" in model.config.trainable
    first, _, second = model.projector
    work = [
        *_vision(model.vision, learns=False),
        Work("image", 2 * model.image_spec.tokens * weights(first), int(projects)),
        Work("image", 2 * model.image_spec.tokens * weights(second), 2 * projects),
        Work("target", 2 * language.config.d_model * model.vocabulary, 1 + (learns and not lora)),
    ]
    inner = language.config.num_heads * language.config.d_kv
    for block in language.encoder.block:
        work += [*_matrices("source", block, learns), Work("pair", 4 * inner, 2)]
    for block in language.decoder.block:
        itself, across, rest = block.layer
        keys = nn.ModuleList([across.EncDecAttention.k, across.EncDecAttention.v])
        queries = nn.ModuleList([itself, rest, across.EncDecAttention.q, across.EncDecAttention.o])
        work += [*_matrices("source", keys, learns), *_matrices("target", queries, learns)]
        work.append(Work("crossed", 4 * inner, 2))
    return work


def _matrices(per: Literal["source", "target"], module: nn.Module, learns: bool) -> list[Work]:
    """With LoRA, what learns are its updates alone."""
    updates = sum(value.numel() for name, value in module.named_parameters() if UPDATE in name)
    tables = sum(weights(part) for part in module.modules() if isinstance(part, nn.Embedding))
    own = weights(module) - updates - tables
    return [Work(per, 2 * own, 1 + (learns and not updates)), Work(per, 2 * updates, 2)]


def weights(module: nn.Module) -> int:
    """Number of weights in the module's matrices."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim >= 2)
