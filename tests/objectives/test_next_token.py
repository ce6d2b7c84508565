import torch
from torch.nn import functional

from hpc_mm.config import ImageSpec
from hpc_mm.data.batch import Batch
from hpc_mm.objectives.next_token import next_token


class Uniform(torch.nn.Module):
    """A language model of one table: the logits after token a are row a."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(vocabulary, vocabulary, generator=generator))

    def forward(self, input_ids, attention_mask, images, image_counts, positions, segments, targets):
        return functional.cross_entropy(self.table[input_ids][positions], targets, reduction="sum")


def batch(ids: list[list[int]], labels: list[list[int]]) -> Batch:
    tokens = torch.tensor(ids)
    return Batch(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        labels=torch.tensor(labels),
        images=torch.zeros(0, 4, 4, 3, dtype=torch.uint8),
        spec=ImageSpec(4, (0.5,) * 3, (0.5,) * 3),
        image_counts=torch.zeros(len(ids), dtype=torch.int64),
        ids=[str(row) for row in range(len(ids))],
        unreadable=[],
        left_out=[],
    )


def test_equals_the_shifted_cross_entropy_over_all_positions():
    model = Uniform(7)
    ids = [[1, 2, 3, 4], [5, 6, 0, 1]]
    labels = [[-100, 2, -100, 4], [5, 6, 0, -100]]
    found = next_token(model, batch(ids, labels))
    logits = model.table[torch.tensor(ids)][:, :-1].reshape(-1, 7)
    expected = functional.cross_entropy(
        logits, torch.tensor(labels)[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(found, expected)
    assert batch(ids, labels).targets == 4  # the label of a first token is never a target


def test_without_targets_is_zero_and_still_reaches_every_parameter():
    model = Uniform(7)
    loss = next_token(model, batch([[1, 2]], [[-100, -100]]))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(model.table.grad, torch.zeros(7, 7))
