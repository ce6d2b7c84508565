"""MosaicGPT against its formulas, as transformers loads and runs it, and at the size of MPT-1B."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TOWER, WORDS, ragged
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional

from hpc_mm.config import ConfigError, Flamingo, Language, Vision
from hpc_mm.models.flamingo import build
from hpc_mm.models.language_model import load_language, load_tokenizer
from hpc_mm.models.mosaic_gpt import MosaicGPT, MosaicGPTConfig, attention_bias

# What the hub's config.json of MPT-1B holds beside the sizes, with code of its own that must not run.
HUB = {
    "alibi": True,
    "alibi_bias_max": 8,
    "architectures": ["MosaicGPT"],
    "attn_clip_qkv": None,
    "attn_impl": "torch",
    "attn_pdrop": 0,
    "attn_qk_ln": True,
    "attn_uses_sequence_id": False,
    "auto_map": {
        "AutoConfig": "configuration_mosaic_gpt.MosaicGPTConfig",
        "AutoModelForCausalLM": "mosaic_gpt.MosaicGPT",
    },
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "init_device": "cpu",
    "init_std": 0.02,
    "logit_scale": None,
    "low_precision_layernorm": True,
    "max_seq_len": 2048,
    "mlp_ratio": 4,
    "model_type": "mosaic_gpt",
    "no_bias": True,
    "param_init_fn": "kaiming_normal_",
    "prefix_lm": False,
    "resid_pdrop": 0,
    "softmax_scale": None,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.27.4",
    "use_cache": False,
    "verbose": 0,
}
LAYER = {
    "ln_1.weight": (32,),
    "attn.Wqkv.weight": (96, 32),
    "attn.q_ln.weight": (32,),
    "attn.k_ln.weight": (32,),
    "attn.out_proj.weight": (32, 32),
    "ln_2.weight": (32,),
    "mlp.mlp_up.weight": (128, 32),
    "mlp.mlp_down.weight": (32, 128),
}
HEADS, LAYERS, ROWS = 4, 4, 72


def weights() -> dict[str, Tensor]:
    """Weights under the names of the hub's pytorch_model.bin: no head, which is the embedding."""
    shapes = {f"blocks.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in LAYER.items()}
    shapes |= {"wte.weight": (ROWS, 32), "ln_f.weight": (32,)}
    generator = torch.Generator().manual_seed(0)
    return {
        f"transformer.{name}": torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def plain(state: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits (T, V) of one row (T,), as the formulas say: ALiBi by key, 0 at the row's last token."""
    length = len(ids)
    x = state["transformer.wte.weight"][ids]
    slopes = torch.tensor([2.0 ** (-8 * (head + 1) / HEADS) for head in range(HEADS)])
    bias = slopes[:, None, None] * torch.arange(1 - length, 1)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"transformer.{name}.weight"]

    def heads(x: Tensor) -> Tensor:
        return x.view(length, HEADS, -1).transpose(0, 1)

    for layer in range(LAYERS):
        name = f"blocks.{layer}"
        mixed = norm(x, f"{name}.ln_1") @ state[f"transformer.{name}.attn.Wqkv.weight"].T
        q, k, v = mixed[:, :32], mixed[:, 32:64], mixed[:, 64:]
        q, k, v = heads(norm(q, f"{name}.attn.q_ln")), heads(norm(k, f"{name}.attn.k_ln")), heads(v)
        scores = (q @ k.transpose(1, 2)) / math.sqrt(32 / HEADS) + bias
        seen = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        x = x + seen.transpose(0, 1).reshape(length, 32) @ state[f"transformer.{name}.attn.out_proj.weight"].T
        up = norm(x, f"{name}.ln_2") @ state[f"transformer.{name}.mlp.mlp_up.weight"].T
        gelu = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
        x = x + gelu @ state[f"transformer.{name}.mlp.mlp_down.weight"].T
    return norm(x, "ln_f") @ state["transformer.wte.weight"].T


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A small model as the hub's repository lays it out; running the code in it fails."""
    config = {**HUB, "d_model": 32, "n_heads": HEADS, "n_layers": LAYERS, "vocab_size": ROWS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for module in ("configuration_mosaic_gpt.py", "mosaic_gpt.py"):
        (tmp_path / module).write_text("raise RuntimeError('code of the model was run')\n")
    torch.save(weights(), tmp_path / "pytorch_model.bin")
    return tmp_path


@pytest.fixture
def model(hub_folder: Path, tokenizer_file: str) -> Any:
    language = Language(name=str(hub_folder), tokenizer=tokenizer_file)
    return load_language(language, load_tokenizer(language)).eval()


@pytest.mark.parametrize("trust", [False, True])
def test_the_hubs_folder_loads_without_its_code(hub_folder: Path, tokenizer_file: str, trust: bool) -> None:
    language = Language(name=str(hub_folder), tokenizer=tokenizer_file, trust_remote_code=trust)
    model = load_language(language, load_tokenizer(language))
    assert type(model) is MosaicGPT
    state = model.state_dict()
    for name, value in weights().items():
        assert torch.equal(state.pop(name), value), name
    assert list(state) == ["lm_head.weight"]
    assert model.lm_head.weight is model.transformer["wte"].weight


def test_the_folder_may_hold_the_tokenizer_too(hub_folder: Path, tokenizer_file: str) -> None:
    load_tokenizer(Language(tokenizer=tokenizer_file)).save_pretrained(hub_folder)
    assert len(load_tokenizer(Language(name=str(hub_folder)))) == WORDS + 3


def test_missing_weights_are_told(hub_folder: Path, tokenizer_file: str) -> None:
    state = weights()
    del state["transformer.blocks.2.attn.k_ln.weight"]
    torch.save(state, hub_folder / "pytorch_model.bin")
    language = Language(name=str(hub_folder), tokenizer=tokenizer_file)
    with pytest.raises(ConfigError, match=r"1 weights are missing, such as transformer.blocks.2.attn.k_ln.weight"):
        load_language(language, load_tokenizer(language))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("length", [8, 13])  # a multiple of the alignment, and another
def test_logits_are_those_of_the_formulas(model: Any, left: bool, length: int) -> None:
    ids = torch.randint(0, ROWS, (3, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    real = [slice(None)] * 3
    for row, padding in ((1, 1), (2, 5)):
        mask[row, slice(0, padding) if left else slice(length - padding, length)] = 0
        real[row] = slice(padding, None) if left else slice(0, length - padding)
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row, part in enumerate(real):
        torch.testing.assert_close(logits[row, part], plain(weights(), ids[row, part]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(ids[:1]).logits, logits[:1])
    assert torch.equal(model(ids, attention_mask=mask, logits_to_keep=2).logits, logits[:, -2:])


def test_tokens_after_a_cache_continue_the_row(model: Any) -> None:
    ids = torch.randint(0, ROWS, (2, 11))
    first = model(ids[:, :6], use_cache=True)
    second = model(ids[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, model(ids).logits[:, 6:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation_with_a_cache_is_what_the_formulas_say(model: Any, how: dict[str, int]) -> None:
    ids, mask = torch.randint(0, ROWS, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **how}
    found = model.generate(ids, attention_mask=mask, **how)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, use_cache=False, **how))
    if how.get("num_beams", 1) == 1:
        for row, padding in enumerate((0, 3)):
            best = plain(weights(), found[row, padding:]).argmax(-1)
            assert torch.equal(found[row, 7:], best[6 - padding : -1])


@pytest.mark.parametrize("autocast", [False, True])
def test_the_bias_is_of_the_type_and_layout_that_attention_wants(autocast: bool) -> None:
    """Another type or layout would be copied in every layer, and the lowest fp32 value has no finite bf16 one."""
    hidden = torch.zeros(2, 13, 32, dtype=torch.float32 if autocast else torch.bfloat16)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        bias = attention_bias(MosaicGPTConfig(d_model=32, n_heads=4), hidden, 0, mask)
    assert (bias.dtype, tuple(bias.shape)) == (torch.bfloat16, (2, 4, 13, 13))
    assert bias.isfinite().all()
    assert bias.stride()[-1] == 1 and all(stride % 8 == 0 for stride in bias.stride()[:-1])


@pytest.mark.parametrize("autocast", [False, True])
def test_padding_in_bf16(model: Any, autocast: bool) -> None:
    """Tokens that see padding alone must not make NaN."""
    ids, mask = torch.randint(0, ROWS, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    full = model(ids, attention_mask=mask).logits
    half = model if autocast else model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = half(ids, attention_mask=mask).logits.float()
    assert logits.isfinite().all()
    closeness = functional.cosine_similarity(logits[mask.bool()], full[mask.bool()], dim=-1)
    assert closeness.min() > 0.99


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alibi": False}, "alibi=False is not supported, only True"),
        ({"attn_pdrop": 0.1}, "attn_pdrop=0.1"),
        ({"softmax_scale": 0.5}, "softmax_scale=0.5"),
        ({"n_heads": 6}, "n_heads=6"),
        ({"d_model": 34}, "d_model=34 must be divisible by n_heads=4"),
        ({"d_model": "32"}, "'d_model' expected int, got str"),
    ],
)
def test_models_of_another_shape_are_refused(
    hub_folder: Path, tokenizer_file: str, values: dict[str, Any], message: str
) -> None:
    file = hub_folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    language = Language(name=str(hub_folder), tokenizer=tokenizer_file)
    with pytest.raises(ConfigError, match=message) as error:
        load_language(language, load_tokenizer(language))
    assert "\n" not in str(error.value)


def test_parameters_of_openflamingo_3b(tmp_path: Path) -> None:
    """OpenFlamingo-3B's published shapes: 1,046,992,944 learn when the whole embedding of 50,280 rows does."""
    words = {"</s>": 0, **{f"w{number}": number for number in range(1, 50277)}}  # GPT-NeoX's tokenizer's length
    tokenizer_file = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer_file.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer_file.save(str(tmp_path / "tokenizer.json"))
    language = Language(tokenizer=str(tmp_path / "tokenizer.json"), architecture=MosaicGPTConfig().to_diff_dict())
    tower = {"image_size": 224, "patch_size": 14, "layers": 24, "width": 1024, "head_width": 64}
    with torch.device("meta"):
        model = build(Flamingo(vision=Vision(architecture=tower), language=language), load_tokenizer(language), 0)
    count = dict.fromkeys(("vision", "language", "resampler", "cross_attention", "new_tokens"), 0)
    for name, parameter in model.named_parameters():
        count[model.part_of(name)] += parameter.numel()
    assert count["cross_attention"] == 24 * 36_708_354
    assert round(count["resampler"] / 1e6, 1) == 63.0
    assert count["new_tokens"] == 3 * 2048
    assert count["resampler"] + count["cross_attention"] + 50_280 * 2048 == 1_046_992_944
    assert count["language"] == 50_432 * 2048 + 24 * (12 * 2048**2 + 4 * 2048) + 2048


def test_a_flamingo_over_the_folder_generates_with_a_cache(hub_folder: Path, tokenizer_file: str) -> None:
    language = Language(name=str(hub_folder), tokenizer=tokenizer_file)
    model = build(Flamingo(vision=Vision(architecture=TOWER), language=language), load_tokenizer(language), 0).eval()
    assert model.language.generation_config.use_cache is False  # so says the file, which was written for training
    seen: list[int] = []
    table = model.language.get_input_embeddings()
    table.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[1]))
    ids, mask, images, counts = ragged(left=True)
    found = model.generate(ids, mask, images, counts, max_new_tokens=4, min_new_tokens=4)
    assert found.shape == (4, 16)
    assert seen == [12, 1, 1, 1]
