"""Flamingo's own layers: the perceiver resampler, gated cross-attention, and the decoder layer that carries it.

Letters of shapes: R rows, T tokens, D text width, N images, M images that are looked at, n latents per image,
W vision width, H heads, L longest group of tokens that look at one image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hpc_mm.models.packing import starts

HEADS = 8  # of the resampler and of cross-attention, whatever the language model has
HEAD_WIDTH = 64
INNER = HEADS * HEAD_WIDTH


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width, bias=False),
        nn.GELU(),
        nn.Linear(4 * width, width, bias=False),
    )


def split_heads(x: Tensor) -> Tensor:
    """(rows, length, H * width) -> (rows, H, length, width)."""
    return x.view(*x.shape[:2], HEADS, HEAD_WIDTH).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(rows, H, length, width) -> (rows, length, H * width)."""
    return x.transpose(1, 2).flatten(2)


# ---------------------------------------------------------------- resampler


class PerceiverAttention(nn.Module):
    """Latents look at an image's patches and at themselves (Flamingo, arXiv 2204.14198, appendix A.1.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, INNER, bias=False)
        self.to_kv = nn.Linear(width, 2 * INNER, bias=False)
        self.to_out = nn.Linear(INNER, width, bias=False)

    def forward(self, patches: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm_latents(latents)
        keys, values = self.to_kv(torch.cat([self.norm_media(patches), latents], dim=1)).chunk(2, dim=-1)
        seen = functional.scaled_dot_product_attention(
            split_heads(self.to_q(latents)), split_heads(keys), split_heads(values)
        )
        return self.to_out(join_heads(seen))  # type: ignore[no-any-return]


class PerceiverResampler(nn.Module):
    """Any number of patches (N, patches, W) -> (N, n, W)."""

    def __init__(self, width: int, depth: int, latents: int, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width), feed_forward(width)]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, patches: Tensor) -> Tensor:
        latents = self.latents.to(patches.dtype).expand(len(patches), -1, -1)
        for attention, mlp in self.pairs():
            if self.checkpointing and torch.is_grad_enabled():
                latents = checkpoint(_resample, attention, mlp, patches, latents, use_reentrant=False)
            else:
                latents = _resample(attention, mlp, patches, latents)
        return self.norm(latents)  # type: ignore[no-any-return]

    def pairs(self) -> Iterator[tuple[PerceiverAttention, nn.Sequential]]:
        """Attention and feed-forward of each layer."""
        for layer in self.layers:
            yield layer[0], layer[1]  # type: ignore[index]


def _resample(attention: nn.Module, mlp: nn.Module, patches: Tensor, latents: Tensor) -> Tensor:
    latents = attention(patches, latents) + latents
    return mlp(latents) + latents  # type: ignore[no-any-return]


# ---------------------------------------------------------------- which text looks at which image


class Media(NamedTuple):
    """Images for a forward pass of (R, T) tokens, with the tokens of each image as one group.

    ``slots`` (R * T,) says where each token lies in the groups (M, L), laid flat; M * L means that it looks at nothing.
    ``cache``, where there is one, keeps each layer's keys and values over the steps of a generation.
    """

    latents: Tensor  # (M, n, W)
    slots: Tensor
    length: int
    cache: dict[int, Tensor] | None


def image_of_token(is_image: Tensor, image_counts: Tensor, segments: Tensor | None = None) -> Tensor:
    """The number of the image that each token looks at, (B, T), counted over the batch; -1 = none yet.

    Text looks at the last image before it and an image token at its own (Flamingo, section 3.1.3). Image tokens
    beyond a row's images keep looking at its last one. Where rows hold several samples (``segments``), text looks at
    images of its own sample alone.
    """
    seen = torch.minimum(is_image.cumsum(dim=1), image_counts[:, None])
    before: Tensor | int = 0  # images of the row's earlier samples
    if segments is not None:
        before = torch.where(starts(segments), functional.pad(seen[:, :-1], (1, 0)), 0).cummax(dim=1).values
    first = image_counts.cumsum(dim=0) - image_counts
    return torch.where(seen > before, first[:, None] + seen - 1, -1)


def group_by_image(latents: Tensor, image: Tensor, cache: dict[int, Tensor] | None) -> Media:
    """Media for tokens that look at ``image`` (R, T). Latents that nobody looks at are left out.

    Where nobody looks at anything, the first image stays, unseen: its parameters then get zero gradients, not none.
    """
    flat = image.flatten()
    order = flat.argsort(stable=True)
    ordered = flat[order]
    place = torch.arange(len(flat), device=flat.device) - torch.searchsorted(ordered, ordered)
    rank = torch.empty_like(place).scatter(0, order, place)  # of a token among those of its image
    sees = flat >= 0
    looked_at = torch.unique(flat[sees])
    if not len(looked_at):
        return Media(latents[:1], torch.ones_like(flat), 1, cache)
    length = int(rank[sees].max()) + 1
    slots = torch.where(sees, torch.searchsorted(looked_at, flat) * length + rank, len(looked_at) * length)
    return Media(latents.index_select(0, looked_at), slots, length, cache)


class Images:
    """A batch's images as the layers ask for them, in training and at every step of a generation.

    A generation may run R = B * k rows (beams, or several samples per prompt): row r belongs to prompt r // k. What
    comes after the prompt looks at the prompt's last image, generated image tokens too.
    """

    def __init__(self, latents: Tensor, image: Tensor, keep: bool) -> None:
        self.latents = latents  # (N, n, W)
        self.image = image  # (B, T) of the prompt
        self.keep = keep  # keys and values over the steps of a generation
        self.shape = (0, 0)
        self.current: Media | None = None

    def media(self, rows: int, tokens: int) -> Media:
        if self.current is None or self.shape != (rows, tokens):
            self.shape = (rows, tokens)
            self.current = group_by_image(self.latents, self._image(rows, tokens), {} if self.keep else None)
        return self.current

    def _image(self, rows: int, tokens: int) -> Tensor:
        prompt = self.image.shape[1]
        image, last = self.image, self.image.amax(dim=1, keepdim=True)
        after = tokens - prompt if tokens >= prompt else tokens  # with a key-value cache only the new tokens come
        image = torch.cat([image[:, : tokens - after], last.expand(-1, after)], dim=1)
        return image.repeat_interleave(rows // len(image), dim=0)


class Conditioning:
    """What the wrapped language model looks at while it runs; set by the model around each call."""

    def __init__(self) -> None:
        self.images: Images | None = None
        self.positions: Tensor | None = None  # (B, T) where logits are wanted; None = everywhere
        self.targets: Tensor | None = None  # (selected,) the tokens there, where their cross-entropy is wanted
        self.found: Tensor | None = None  # what the head made


def own_precision(module: nn.Module, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Without autocast where the weights are in bf16: they need no cast, and norms no fp32."""
    weight = next(module.parameters())
    return contextlib.nullcontext() if weight.dtype == torch.float32 else torch.autocast(device.type, enabled=False)


# ---------------------------------------------------------------- gated cross-attention


class CrossAttention(nn.Module):
    """Each token looks at its own image alone: attention without a mask, one group of tokens per image."""

    def __init__(self, width: int, vision_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, INNER, bias=False)
        self.to_kv = nn.Linear(vision_width, 2 * INNER, bias=False)
        self.to_out = nn.Linear(INNER, width, bias=False)

    def forward(self, x: Tensor, media: Media) -> Tensor:
        """(R, T, D) -> (R, T, D); zero for tokens that look at nothing."""
        queries = self.to_q(self.norm(x))
        keys, values = self._keys_values(media).chunk(2, dim=-1)
        size = len(keys) * media.length
        # One slot more than the groups have: tokens that look at nothing go there and find zeros there.
        groups = queries.new_zeros(size + 1, INNER).index_copy(0, media.slots, queries.flatten(0, 1))
        groups = groups[:size].view(len(keys), media.length, INNER)
        seen = functional.scaled_dot_product_attention(split_heads(groups), split_heads(keys), split_heads(values))
        seen = functional.pad(join_heads(seen).flatten(0, 1), (0, 0, 0, 1))
        return self.to_out(seen.index_select(0, media.slots).view_as(queries))  # type: ignore[no-any-return]

    def _keys_values(self, media: Media) -> Tensor:
        if media.cache is None:
            return self.to_kv(media.latents)  # type: ignore[no-any-return]
        if id(self) not in media.cache:
            media.cache[id(self)] = self.to_kv(media.latents)
        return media.cache[id(self)]


class GatedCrossAttention(nn.Module):
    """x + tanh(a) XAttn(x), then x + tanh(f) FF(x); a = f = 0 at the start (Flamingo, section 3.1.2)."""

    def __init__(self, width: int, vision_width: int) -> None:
        super().__init__()
        self.attn = CrossAttention(width, vision_width)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(width)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, media: Media) -> Tensor:
        x = x + self.attn_gate.tanh().to(x.dtype) * self.attn(x, media)  # what runs in bf16 stays in it
        return x + self.ff_gate.tanh().to(x.dtype) * self.ff(x)  # type: ignore[no-any-return]


class ConditionedLayer(nn.Module):
    """A decoder layer with (perhaps) gated cross-attention before it. Its other attributes are the decoder layer's."""

    def __init__(
        self, gated: GatedCrossAttention | None, decoder_layer: nn.Module, given: Conditioning, checkpointing: bool
    ) -> None:
        super().__init__()
        self.gated_cross_attn_layer = gated
        self.decoder_layer = decoder_layer
        self.given = given
        self.checkpointing = checkpointing

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("decoder_layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.given.images is not None, "the language model was called past FlamingoModel"
        media = self.given.images.media(*hidden_states.shape[:2])
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run, hidden_states, media, *args, use_reentrant=False, **kwargs)
        return self._run(hidden_states, media, *args, **kwargs)

    def _run(self, hidden_states: Tensor, media: Media, *args: Any, **kwargs: Any) -> Any:
        if self.gated_cross_attn_layer is not None:
            hidden_states = self.gated_cross_attn_layer(hidden_states, media)
        with own_precision(self.decoder_layer, hidden_states.device):
            return self.decoder_layer(hidden_states, *args, **kwargs)
