"""Cross-entropy in parts equals that of all logits at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import BATCH, WORDS
from torch import nn
from torch.nn import functional

from hpc_mm.config import ConfigError
from hpc_mm.models import token_head
from hpc_mm.models.cross_attention import Conditioning
from hpc_mm.models.flamingo import FlamingoModel
from hpc_mm.models.token_head import TokenHead

Make = Callable[..., FlamingoModel]


def head(bias: bool, new: bool, frozen: bool) -> TokenHead:
    torch.manual_seed(0)
    base = nn.Linear(16, 40, bias=bias).requires_grad_(not frozen)
    return TokenHead(base, nn.Parameter(torch.randn(3, 16)) if new else None, 37 if new else 40, Conditioning())


@pytest.mark.parametrize("parts", [1, 3, 50])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("bias", "new"), [(False, True), (True, True), (False, False)])
def test_equals_the_loss_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, parts: int, frozen: bool, bias: bool, new: bool
) -> None:
    model = head(bias, new, frozen)
    positions = torch.rand(4, 25) < 0.5
    count = int(positions.sum())
    monkeypatch.setattr(token_head, "LOGITS", 41 * -(-count // parts))
    targets = torch.randint(0, 40, (count,))
    hidden = torch.randn(4, 25, 16, requires_grad=True)

    def of(in_parts: bool) -> tuple[torch.Tensor, ...]:
        model.given.positions, model.given.targets = positions, targets if in_parts else None
        found = model(hidden)
        loss = found if in_parts else functional.cross_entropy(found, targets, reduction="sum")
        learning = [hidden, *(p for p in model.parameters() if p.requires_grad)]
        return loss, *torch.autograd.grad(loss * 0.3, learning)

    for one, other in zip(of(True), of(False), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_never_more_logits_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = head(bias=False, new=True, frozen=True)
    monkeypatch.setattr(token_head, "LOGITS", 400)
    seen = []
    made = functional.cross_entropy
    monkeypatch.setattr(
        functional, "cross_entropy", lambda logits, *a, **k: seen.append(logits.numel()) or made(logits, *a, **k)
    )
    model.given.positions = torch.ones(2, 30, dtype=torch.bool)
    model.given.targets = torch.zeros(60, dtype=torch.int64)
    model(torch.randn(2, 30, 16)).backward()
    assert sum(seen) == 60 * 40 and max(seen) <= 400


def test_without_a_gradient_none_is_made() -> None:
    model = head(bias=False, new=True, frozen=False)
    model.given.positions, model.given.targets = torch.ones(1, 5, dtype=torch.bool), torch.arange(5)
    with torch.no_grad():
        loss = model(torch.randn(1, 5, 16))
    assert not loss.requires_grad and loss > 0


@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_the_models_loss(make: Make, batch: BATCH, family: str) -> None:
    model = make(family)
    ids = batch[0]
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[:, 2:8] = True
    targets = ids.roll(-1, dims=1)[positions]
    loss = model(*batch, positions=positions, targets=targets)
    expected = functional.cross_entropy(model(*batch, positions=positions), targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for one, other in zip(torch.autograd.grad(loss, learning), torch.autograd.grad(expected, learning), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_no_targets_give_zero_gradients_not_none(make: Make, batch: BATCH) -> None:
    model = make(trainable=("vision", "language", "resampler", "cross_attention", "new_tokens"))
    nowhere = torch.zeros_like(batch[0], dtype=torch.bool)
    loss = model(*batch, positions=nowhere, targets=batch[0][nowhere])
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_model_that_changes_its_logits_is_refused(make: Make, batch: BATCH) -> None:
    model = make()
    run = model.language.forward

    def capped(**given):
        output = run(**given)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    model.language.forward = capped
    positions = torch.ones_like(batch[0], dtype=torch.bool)
    with pytest.raises(ConfigError, match="LlamaForCausalLM changes its head's logits"):
        model(*batch, positions=positions, targets=batch[0][positions] % WORDS)


def test_bf16_loss_is_close(make: Make, batch: BATCH) -> None:
    full, half = make(opened=False), make(opened=False, precision="bf16")
    positions = batch[1].bool()
    targets = batch[0][positions]
    expected = full(*batch, positions=positions, targets=targets)
    with torch.autocast("cpu", torch.bfloat16):
        found = half(*batch, positions=positions, targets=targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)
