"""Cross-entropy in parts equals that of all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import BATCH, WORDS
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

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


def test_without_a_gradient_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = head(bias=False, new=True, frozen=False)
    model.given.positions, model.given.targets = torch.ones(1, 5, dtype=torch.bool), torch.arange(5)
    calls, made = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *given: calls.append(given) or made(*given))
    hidden = torch.randn(1, 5, 16, requires_grad=True)
    with torch.no_grad():
        loss = model(hidden)
    assert not loss.requires_grad and loss > 0 and not calls
    assert torch.equal(model(hidden), loss) and calls


def test_bf16_gradients_are_those_of_the_loss_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = head(bias=False, new=True, frozen=False).bfloat16()
    full = head(bias=False, new=True, frozen=False)
    full.load_state_dict(model.state_dict())
    model.given.positions = full.given.positions = torch.ones(10, 50, dtype=torch.bool)
    monkeypatch.setattr(token_head, "LOGITS", 41 * 130)
    scale = 0.3  # bf16 has 0.3008
    hidden, targets = torch.randn(10, 50, 16, dtype=torch.bfloat16, requires_grad=True), torch.randint(0, 40, (500,))
    model.given.targets = targets
    found = torch.autograd.grad(model(hidden) * scale, [hidden, *model.parameters()])
    exact = hidden.detach().float().requires_grad_()
    loss = functional.cross_entropy(full(exact), targets, reduction="sum")
    for one, other in zip(found, torch.autograd.grad(loss * scale, [exact, *full.parameters()]), strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() < 0.01 * other.norm()
        ratio = (one * other).sum() / other.square().sum()
        assert abs(ratio - 1) < 1e-3  # roundings of elements cancel


class Copies(TorchDispatchMode):
    """Counts casts of tensors of a shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operation is torch.ops.aten._to_copy.default and tuple(args[0].shape) == self.shape
        return operation(*args, **(kwargs or {}))


def test_a_trained_head_is_cast_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast keeps what it casts until it ends: not a copy of the head for each part."""
    model = head(bias=False, new=True, frozen=False)
    monkeypatch.setattr(token_head, "LOGITS", 400)
    model.given.positions, model.given.targets = torch.ones(2, 30, dtype=torch.bool), torch.arange(60) % 40
    casts = Copies((40, 16))
    with torch.autocast("cpu", torch.bfloat16), casts:
        model(torch.randn(2, 30, 16)).detach()
    backward = 60 // (400 // 38)  # the gradient of each part, which is fp32 again
    assert casts.count == 1 + backward


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
