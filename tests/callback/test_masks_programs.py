"""Given masks in programs of all kinds: several optimizers, tied, normalised, growing and sparse weights, averages."""

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_gcfreeze import GradCovFreezeCallback, masks
from tests import cases, insides
from tests.callback.masked import assert_trained_as_plainly, drawn, fit, module, network, weights
from tests.callback.players import TwoPlayers
from tests.oracles.freezing import PlainFreeze


class Direct(TwoPlayers):
    """Calls ``loss.backward()`` itself."""

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()


@pytest.mark.parametrize("make", [TwoPlayers, Direct])
@pytest.mark.parametrize("hold", ["auto", "restore"])
def test_each_of_two_optimizers_has_masks_of_its_own(make, hold, monkeypatch):
    """A generator and a critic that steps twice a batch; live elements end where torch's own hooks end."""
    insides.skip_blocks_of_any_size(monkeypatch)
    given = {
        "generator": {"generator.0.weight": drawn("row", lambda: nn.Sequential(make().generator, nn.Linear(1, 1)))},
        "critic": {"critic.0.weight": torch.rand(6, 5) < 0.5, "critic.2.weight": torch.ones(1, 6) > 0},
    }
    given["generator"] = {"generator.0.weight": True, "generator.2.weight": (torch.arange(5) < 3)[:, None].expand(5, 6)}

    class ByHand(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            for of_player, optimizer in zip(given.values(), trainer.optimizers, strict=True):
                self.attach(of_player, pl_module, optimizer)

        @torch.no_grad()
        def attach(self, of_player: Any, pl_module: pl.LightningModule, optimizer: Any) -> None:
            values = {name: pl_module.get_parameter(name).clone() for name in of_player}

            @torch.no_grad()
            def after(*_: Any) -> None:
                for name, mask in of_player.items():
                    p = pl_module.get_parameter(name)
                    p.copy_(torch.where(torch.as_tensor(mask).expand(p.shape), values[name], p))

            @torch.no_grad()
            def before(*_: Any) -> None:
                for name, mask in of_player.items():
                    if (g := pl_module.get_parameter(name).grad) is not None:
                        g.mul_(~torch.as_tensor(mask))

            optimizer.register_step_pre_hook(before)
            optimizer.register_step_post_hook(after)

    def trained(*callbacks: pl.Callback) -> pl.LightningModule:
        players = make()
        cases.trainer(callbacks=[*callbacks], max_epochs=1).fit(players, cases.loader())
        return players

    ours = trained(
        GradCovFreezeCallback(masks=given["generator"], optimizer=0, hold=hold),
        GradCovFreezeCallback(masks=given["critic"], optimizer=1, hold=hold),
    )
    plain, start = trained(ByHand()), make()
    for (name, p), q, s in zip(ours.named_parameters(), plain.parameters(), start.parameters(), strict=True):
        mask = torch.as_tensor((given["generator"] | given["critic"]).get(name, False)).expand(p.shape)
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        assert torch.equal(p[mask], s[mask])
        assert mask.all() or not torch.equal(p, s)
    with pytest.raises(ValueError, match=r"'critic.0.weight', which is not eligible"):
        trained(GradCovFreezeCallback(masks=given["critic"], optimizer=0))


def test_two_callbacks_for_one_optimizer_are_refused():
    """They would hold elements against each other."""
    given = drawn()
    with pytest.raises(MisconfigurationException, match="optimizer"):
        fit(module(), GradCovFreezeCallback(masks=given), GradCovFreezeCallback(masks=given))


class Words(pl.LightningModule):
    """A language model of some tokens, whose head is its embedding, or an own one."""

    def __init__(self, tokens: int = 7, tied: bool = True, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(tokens, 4, sparse=sparse)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, tokens, bias=False)
        self.sparse = sparse
        if tied:
            self.head.weight = self.embed.weight

    def grow(self, tokens: int) -> None:
        """Add rows, as `resize_token_embeddings` does."""
        old = self.embed.weight.detach()
        self.embed = nn.Embedding(tokens, 4)
        self.head = nn.Linear(4, tokens, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            self.embed.weight[: len(old)] = old

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens = (batch[0] * 10).long().remainder(self.embed.num_embeddings)
        logits = self.head(self.mix(self.embed(tokens[:, :-1])))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        if self.sparse:
            return torch.optim.SparseAdam([self.embed.weight], 0.05)
        return torch.optim.AdamW(self.parameters(), 0.05, weight_decay=0.1)


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("hold", ["auto", "restore"])
def test_new_tokens_of_a_tied_embedding_train_alone(name, hold):
    """After the vocabulary has grown by two; masks of the smaller one do not fit any more."""
    words = Words()
    smaller = GradCovFreezeCallback(masks=masks.everything() - masks.rows("embed.weight", [5]), hold=hold)
    fit(words, smaller)
    words.grow(9)
    start = weights(words)
    with pytest.raises(ValueError, match=r"shape, \(9, 4\), got \(7, 4\)"):
        fit(words, GradCovFreezeCallback(masks=smaller.frozen))
    with pytest.raises(ValueError, match=r"shape, \(9, 4\), got \(7, 4\)"):
        fit(words, GradCovFreezeCallback(masks={name: torch.zeros(7, 4) > 0}))
    fit(words, GradCovFreezeCallback(masks=masks.everything() - masks.rows(name, range(7, 9)), hold=hold))
    for n, now in weights(words).items():
        assert torch.equal(now[:7], start[n][:7])
        assert n != "embed.weight" or (now[7:] != start[n][7:]).all()


def test_rows_of_a_sparse_embedding_are_frozen():
    """SparseAdam moves rows that occur; the masked ones stay."""
    words, start = Words(tied=False, sparse=True), weights(Words(tied=False))
    fit(words, GradCovFreezeCallback(masks=masks.rows("embed.weight", [0, 3])))
    moved = (words.embed.weight.detach() != start["embed.weight"]).any(1).tolist()
    assert moved == [False, True, True, False, True, True, True]


@pytest.mark.parametrize("kind", ["weight_norm", "parametrized weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weights_that_are_computed_from_others_train_as_the_plain_way_of_freezing(kind, monkeypatch):
    """What is frozen is what the optimizer has: magnitudes, directions."""
    insides.skip_blocks_of_any_size(monkeypatch)

    def make() -> nn.Sequential:
        made = cases.mlp()
        normalise = {
            "weight_norm": nn.utils.weight_norm,
            "parametrized weight_norm": nn.utils.parametrizations.weight_norm,
            "spectral_norm": nn.utils.parametrizations.spectral_norm,
        }[kind]
        normalise(made[0])
        return made

    given, start = drawn("row", make), weights(module(make=make))
    trained, plain = module(make=make), module(make=make)
    torch.manual_seed(0)
    fit(trained, GradCovFreezeCallback(masks=given))
    torch.manual_seed(0)
    fit(plain, PlainFreeze(0, given))
    assert_trained_as_plainly(trained, plain, start, given, rtol=1e-3, atol=1e-5)


def test_batch_norm_and_validation_work_with_masks():
    """Running statistics go on; the masks are not those of a copy that is validated."""

    class Validated(cases.Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            copy.deepcopy(self.network)(batch[0])
            self.log("val_loss", nn.functional.mse_loss(self.network(batch[0]), batch[1]))

    given = drawn("row", cases.convnet)
    trained, plain = Validated(cases.convnet()), Validated(cases.convnet())
    for one, callback in ((trained, GradCovFreezeCallback(masks=given)), (plain, PlainFreeze(0, given))):
        torch.manual_seed(0)
        trainer = cases.trainer(callbacks=[callback], num_sanity_val_steps=1)
        trainer.fit(one, cases.loader(), cases.loader(samples=16))
    torch.testing.assert_close(trained.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)
    assert trained.network[2].num_batches_tracked == 16
    for name, mask in given.items():
        assert torch.equal(
            trained.get_parameter(name)[mask], cases.Regression(cases.convnet()).get_parameter(name)[mask]
        )


@pytest.mark.parametrize(
    "average", [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1)]
)
@pytest.mark.parametrize("hold", ["auto", "restore"])
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_averages_of_weights_keep_frozen_elements_from_the_first_step_on(average, hold):
    """A mean of equal values is that value; with masks there is no time before the freeze to be averaged."""
    given, start, trained = drawn(), weights(module()), module()
    callback = GradCovFreezeCallback(masks=given, hold=hold)
    fit(trained, average(), callback, max_epochs=3)
    assert callback.delta()
    moved = 0
    for name, mask in given.items():
        assert torch.equal(trained.get_parameter(name)[mask], start[name][mask])
        moved += int((trained.get_parameter(name) != start[name])[~mask].sum())
    assert moved > 1000


@pytest.mark.parametrize("hold", ["auto", "compact", "restore"])
@pytest.mark.filterwarnings("ignore:.*began to train late")
def test_layers_that_are_unfrozen_later_are_not_eligible_and_train(hold):
    """Lightning's BackboneFinetuning adds them to the optimizer in the second epoch."""

    class Tuned(cases.Regression):
        def __init__(self) -> None:
            super().__init__(network(), lambda p: torch.optim.AdamW([q for q in p if q.requires_grad], 0.01))
            self.backbone = self.network[0]

    trained, start = Tuned(), weights(Tuned())
    given = drawn()["network.4.weight"]
    callback = GradCovFreezeCallback(masks={"network.4.weight": given}, hold=hold)
    fit(trained, BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False), callback, max_epochs=3)
    assert torch.equal(trained.network[4].weight[given], start["network.4.weight"][given])
    assert not torch.equal(trained.network[0].weight, start["network.0.weight"])
    assert (trained.network[4].weight != start["network.4.weight"])[~given].all()


@pytest.mark.slow
@pytest.mark.parametrize("compile_all", [True, False], ids=["module", "layer"])
@pytest.mark.filterwarnings("ignore")
def test_compiled_modules_train_with_masks_as_the_plain_way_of_freezing(compile_all):
    """Compiled once for all steps or again after the first."""
    given, start = drawn("row"), weights(module())
    plain, trained = module(), module()
    fit(plain, PlainFreeze(0, given))
    if compile_all:
        fit(torch.compile(trained, backend="aot_eager"), GradCovFreezeCallback(masks=given))
    else:
        trained.network[2].compile(backend="aot_eager")
        fit(trained, GradCovFreezeCallback(masks=given))
    assert_trained_as_plainly(trained, plain, start, given)


def test_frozen_elements_may_have_gradients_that_are_not_finite(monkeypatch):
    """A NaN does not come to the live ones, by the norm that gradients are clipped by."""
    given = {"network.0.weight": torch.zeros(8, 5, dtype=torch.bool).index_fill_(1, torch.tensor([0]), True)}

    class Broken(cases.Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            first = self.network[0].weight[:, 0]
            return loss + 0.0 * (first - first.detach()).sqrt().sum()

    for hold in ("compact", "restore"):
        trained = Broken(cases.mlp(), cases.OPTIMIZERS["AdamW"])
        fit(trained, GradCovFreezeCallback(masks=given, hold=hold), gradient_clip_val=1.0)
        assert all(p.isfinite().all() for p in trained.parameters())
        assert (trained.network[0].weight != cases.mlp()[0].weight).any(0).tolist() == [False, True, True, True, True]
