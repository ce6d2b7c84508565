"""The output head with its few new token rows: logits where they are wanted, or their cross-entropy in parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from hpc_mm.models.cross_attention import Conditioning

LOGITS = 2**26  # that exist at a time: 256 MiB of fp32, and twice that for what backward makes of them


class TokenHead(nn.Module):
    """The language model's output head up to the first new id, and the new rows from there on.

    Where ``given.positions`` is set, logits are made at those positions alone: (B, T, width) -> (selected, vocabulary).
    Where ``given.targets`` is set too, the sum of their cross-entropy is: (B, T, width) -> ().
    Tied weights: ``new_rows`` is the embedding's own parameter.
    """

    def __init__(self, head: nn.Linear, new_rows: nn.Parameter | None, first_new: int, given: Conditioning) -> None:
        super().__init__()
        self.base = OutputTable(head)
        self.new_rows = new_rows
        self.first_new = first_new
        self.given = given

    def forward(self, hidden: Tensor) -> Tensor:
        if self.given.positions is not None:
            hidden = hidden[self.given.positions]
        found: Tensor = self.base(hidden, self.new_rows, self.first_new, self.given.targets)
        self.given.found = found
        return found


class OutputTable(nn.Module):
    """The matrix of the language model's own head.

    A sharded run gathers its weights once per call, so all parts of a batch go through one call.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias

    def forward(self, hidden: Tensor, new_rows: Tensor | None, first_new: int, targets: Tensor | None) -> Tensor:
        """Logits (..., vocabulary), or the sum of the cross-entropy of ``targets`` (selected,), in fp32."""
        return head_output(hidden, self.weight, self.bias, new_rows, first_new, targets)


def head_output(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, new_rows: Tensor | None, first_new: int, targets: Tensor | None
) -> Tensor:
    """Logits of ``hidden`` (..., width): (..., vocabulary), or the sum of the cross-entropy of ``targets`` in fp32.

    ``targets`` are (selected,), for ``hidden`` (selected, width). Rows of ``weight`` from ``first_new`` on are unused.
    """
    if targets is None:
        return _logits(first_new, hidden, weight, bias, new_rows)
    learns = torch.is_grad_enabled()  # inside of a Function it never is
    return _CrossEntropy.apply(learns, first_new, targets, hidden, weight, bias, new_rows)  # type: ignore[no-any-return]


def _logits(first_new: int, hidden: Tensor, weight: Tensor, bias: Tensor | None, new_rows: Tensor | None) -> Tensor:
    logits = functional.linear(hidden, weight, bias)[..., :first_new]
    return logits if new_rows is None else torch.cat([logits, functional.linear(hidden, new_rows)], dim=-1)


class _CrossEntropy(torch.autograd.Function):
    """Forward makes the gradients as well, part by part, so that no part's logits are kept or made twice."""

    @staticmethod
    def forward(
        ctx: Any, learns: bool, first_new: int, targets: Tensor, hidden: Tensor, *parameters: Tensor | None
    ) -> Tensor:
        needed = [learns and need for need in ctx.needs_input_grad[3:]]
        inputs = (hidden, *parameters)
        sums = [
            torch.zeros(value.shape, device=value.device) if need and value is not None else None
            for value, need in zip(parameters, needed[1:], strict=True)
        ]
        # One for all parts: autocast keeps its copy of each leaf until it ends.
        shared = [_leaf(value, need) for value, need in zip(parameters, needed[1:], strict=True)]
        total, of_hidden = hidden.new_zeros((), dtype=torch.float32), []
        rows = max(1, LOGITS // (first_new + 1))
        for part, wanted in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            leaves = [_leaf(part, needed[0]), *shared]
            with torch.enable_grad():
                loss = functional.cross_entropy(_logits(first_new, *leaves).float(), wanted, reduction="sum")  # type: ignore[arg-type]
            total += loss.detach()
            learning = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            found = iter(torch.autograd.grad(loss, learning) if learning else ())
            if needed[0]:
                of_hidden.append(next(found))
            for one in sums:
                if one is not None:
                    one += next(found)
        gradients = [torch.cat(of_hidden) if needed[0] else None, *sums]
        ctx.save_for_backward(
            *(None if g is None else g.to(value.dtype) for g, value in zip(gradients, inputs, strict=True))  # type: ignore[union-attr]
        )
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if one is None else (one.float() * scale).to(one.dtype) for one in ctx.saved_tensors)
        return None, None, None, *scaled


def _leaf(value: Tensor | None, learns: bool) -> Tensor | None:
    return None if value is None else value.detach().requires_grad_(learns)
