"""What a model's loss is in units of its mean loss, for models that use the number of items in a step or ignore it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gcfreeze.huggingface.loss_shares import Shares, without_count
from tests.huggingface.tiny import Collator, bert, gpt2, llama, samples, texts


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return model(**batch).loss


def share_of(model: nn.Module, rows: Any, count: int | None, shares: Shares | None = None) -> float:
    """The share of a batch in a step with `count` targets."""
    shares = shares or Shares(model, loss_of)
    inputs = Collator()(rows) | ({} if count is None else {"num_items_in_batch": torch.tensor(count)})
    shares.begin(inputs)
    return float(shares.of(loss_of(model, inputs), inputs))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_model_that_divides_by_the_count_has_the_share_of_its_predicted_targets(dropout):
    """Of eight labels a sequence, the first is not predicted; sample i ignores i more. Dropout draws the same again."""
    model = gpt2(dropout).train()
    rows = texts(3)
    targets = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    assert targets == 3 * 7 - (0 + 1 + 2)
    assert share_of(model, rows, 100) == pytest.approx(targets / 100)


def test_share_times_mean_is_the_loss():
    """The definition, in float64."""
    model, rows = llama().double().train(), texts(4)
    mean, loss = (loss_of(model, Collator()(rows) | more) for more in ({}, {"num_items_in_batch": 50}))
    torch.testing.assert_close(loss, share_of(model, rows, 50) * mean, rtol=1e-6, atol=0)


def test_model_that_ignores_the_count_has_the_share_one():
    """BERT takes any keyword, so the Trainer passes the count."""
    assert share_of(bert().train(), samples(4), 12) == 1.0


@pytest.mark.parametrize("make", [bert, llama])
def test_model_without_the_count_has_the_share_one(make):
    """The Trainer of a model with ``accepts_loss_kwargs = False`` divides the loss itself."""
    assert share_of(make().train(), samples(4) if make is bert else texts(4), None) == 1.0


def test_batch_in_which_all_rules_agree_decides_nothing():
    """One micro-batch a step; the next step tells the rules apart."""
    model, rows = llama().train(), texts(2)
    for row in rows:
        row["labels"][0] = -100
    count = sum(int((row["labels"] != -100).sum()) for row in rows)
    shares = Shares(model, loss_of)
    assert share_of(model, rows, count, shares) == 1.0
    assert share_of(model, rows, 2 * count, shares) == pytest.approx(0.5)


def test_labels_that_are_all_ignored_decide_nothing():
    """The mean of no losses is NaN."""
    model, rows = llama().train(), texts(2)
    ignored = [row | {"labels": torch.full_like(row["labels"], -100)} for row in rows]
    shares = Shares(model, loss_of)
    share_of(model, ignored, 20, shares)
    assert share_of(model, rows, 28, shares) == pytest.approx(0.5 * 13 / 14)


def test_once_decided_the_mean_is_not_computed_again():
    """Neither are random states kept."""
    calls = []

    def counted(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        calls.append(sorted(batch))
        return loss_of(model, batch)

    model = gpt2().train()
    shares = Shares(model, counted)
    for _ in range(3):
        share_of(model, texts(3), 100, shares)
    assert calls == [["attention_mask", "input_ids", "labels"]]


def test_random_numbers_and_gradients_are_as_without_the_second_pass():
    """The random stream stands where the forward pass left it."""
    model, inputs = gpt2(0.3).train(), Collator()(texts(3)) | {"num_items_in_batch": torch.tensor(100)}
    torch.manual_seed(5)
    loss_of(model, inputs)
    expected = torch.rand(3)
    torch.manual_seed(5)
    share_of(model, texts(3), 100)
    assert torch.equal(torch.rand(3), expected)
    assert all(p.grad is None for p in model.parameters())


def test_loss_that_no_rule_explains_is_refused():
    """Here a tenth of the mean."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bert(0.0)

        def forward(self, **inputs: Any) -> Any:
            output = self.inner(**without_count(inputs))
            output["loss"] = output["loss"] * (0.1 if "num_items_in_batch" in inputs else 1.0)
            return output

    with pytest.raises(
        ValueError, match=r"0.1 times its loss without `num_items_in_batch`.*accepts_loss_kwargs = False"
    ):
        share_of(Odd(), samples(4), 12)
