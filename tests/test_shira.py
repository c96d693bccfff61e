"""A SHiRA adapter made from a delta gives the trained model, or the error says what SHiRA cannot express."""

import copy
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_gcfreeze import delta
from lightning_gcfreeze.shira import from_shira, to_shira
from tests import cases


def test_without_peft_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"peft: `pip install lightning-gcfreeze\[peft\]`"):
        to_shira(delta.of(nn.Linear(3, 2), {}), nn.Linear(3, 2))


def tune(start, live):
    """A trained copy and its masks: of the weights in `live` so many elements moved, of other parameters none."""
    trained = copy.deepcopy(start)
    frozen = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in start.named_parameters()}
    for name, count in live.items():
        frozen[name].view(-1)[torch.randperm(frozen[name].numel())[:count]] = False
        with torch.no_grad():
            p = trained.get_parameter(name)
            p.add_(~frozen[name] * torch.randn_like(p))
    return trained, frozen


def network(dtype=torch.float32):
    """Twelve layers, so that the name "1" is also the end of another, and its Linear layers differ in shape."""
    sizes = [8, 20, 30, 20, 10, 10, 10]
    layers = [layer for m, n in pairwise(sizes) for layer in (nn.Tanh(), nn.Linear(m, n))]
    return nn.Sequential(*layers).to(dtype)


@pytest.mark.parametrize("adapter_name", ["default", "tuned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_peft_loads_the_adapter_and_gives_the_trained_outputs(dtype, adapter_name, tmp_path):
    """At once, after ``save_pretrained`` and ``from_pretrained``, and merged; without the adapter those of t0."""
    from peft import PeftModel
    from peft.tuners.shira import ShiraLayer

    start = network(dtype)
    trained, frozen = tune(start, {"1.weight": 29, "3.weight": 1, "7.weight": 60})
    found = delta.of(trained, frozen)
    x = torch.randn(16, 8, dtype=dtype)
    converted = to_shira(found, copy.deepcopy(start), adapter_name)
    converted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(start), tmp_path / ("" if adapter_name == "default" else "tuned"))
    with torch.no_grad():
        for model in (converted, loaded):
            assert_close(model(x), trained(x))
            with model.disable_adapter():
                assert torch.equal(model(x), start(x))
        assert not torch.allclose(trained(x), start(x), atol=0.1)
        layers = {name: m for name, m in loaded.get_base_model().named_modules() if isinstance(m, ShiraLayer)}
        assert layers.keys() == {"1", "3", "7"}  # and not "11"; r(in + out) is enough for 60 of (20, 10) with r = 2
        assert [len(m.shira_weight["default"]) for m in layers.values()] == [2 * 28, 2 * 50, 2 * 30]
        for name, layer in layers.items():
            row, column = layer.shira_indices["default"].numpy()
            assert len(set(zip(row, column, strict=True))) == len(row)
            values = np.zeros(layer.base_layer.weight.shape)
            for i, j, value in zip(row, column, layer.shira_weight["default"].tolist(), strict=True):
                values[i, j] = value
            assert not values[frozen[f"{name}.weight"].numpy()].any()
        for name, p in loaded.merge_and_unload().named_parameters():
            tolerance = {"rtol": 0, "atol": 0} if dtype == torch.bfloat16 else {}  # a sum in float32, rounded once
            assert_close(p, trained.get_parameter(name), **tolerance)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by transformers, read by PEFT
def test_a_transformer_of_the_hub_takes_the_adapter(tmp_path):
    """A LLaMA whose norms trained on as well: those go into the base, by the delta's own means, the rest to PEFT."""
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    start = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
    live = {name: p.numel() // 10 + 1 for name, p in start.named_parameters() if "proj" in name or "norm" in name}
    trained, frozen = tune(start, live)
    found = delta.of(trained, frozen)
    tokens = torch.arange(12).view(2, 6)
    with pytest.raises(ValueError, match=r"also changes .*input_layernorm.weight.*norm.weight\. Use `apply_delta`"):
        to_shira(found, copy.deepcopy(start))
    norms = {key: tensor for key, tensor in found.items() if key == "format" or "norm" in key}
    base = copy.deepcopy(start)
    delta.apply_delta(base, norms)
    to_shira(found, copy.deepcopy(base)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert_close(loaded(tokens).logits, trained(tokens).logits)
        assert not torch.allclose(loaded(tokens).logits, start(tokens).logits, atol=0.1)


class Attention(nn.Module):
    """Its out_proj is a Linear layer that is never called."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)


def tied():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("start", "live", "text"),
    [
        (network, {"1.weight": 5, "3.bias": 1}, r"the delta also changes 3\.bias\. .*`requires_grad_\(False\)`"),
        (cases.convnet, {"1.weight": 5, "2.weight": 1}, r"also changes 1\.weight, 2\.weight\. Use `apply_delta`"),
        (Attention, {"attention.out_proj.weight": 2}, r"also changes attention\.out_proj\.weight"),
        (tied, {"0.weight": 3}, r"used once; the delta also changes 0\.weight"),
        (lambda: nn.Linear(8, 8), {"weight": 3}, "also changes weight"),
        (network, {"1.weight": 5, "3.weight": 551}, r"with r=12: more than 1 \(20, 8\) has"),
        (
            lambda: nn.Sequential(nn.Linear(8, 1)),
            {"0.weight": 1},
            r"r=1: more than 0 \(1, 8\) has\..* freeze more by `k`",
        ),
        (network, {}, "changes nothing in `base`"),
    ],
    ids=["bias", "conv", "uncalled", "tied", "root", "too many", "too narrow", "nothing"],
)
def test_what_shira_cannot_express_is_refused(start, live, text):
    """And the base keeps its layers."""
    base = start()
    found = delta.of(*tune(base, live))
    layers = [type(m) for m in base.modules()]
    with pytest.raises(ValueError, match=text):
        to_shira(found, base)
    assert [type(m) for m in base.modules()] == layers


def test_a_buffer_that_moved_is_refused_and_one_that_did_not_is_no_hindrance():
    """BatchNorm's statistics, of a run and of no run."""
    start = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    trained, frozen = tune(start, {"0.weight": 9})
    to_shira(delta.of(trained, frozen), copy.deepcopy(start))
    trained[1].running_mean += 1
    with pytest.raises(ValueError, match=r"also changes 1\.running_mean\."):
        to_shira(delta.of(trained, frozen), start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_that_peft_trained_becomes_a_delta(dtype, tmp_path):
    """Applied to the base it gives what PEFT merges, to the bit, and taken back the base; the adapter is as it was."""
    from peft import PeftModel, ShiraConfig, get_peft_model

    start = network(dtype)
    model = get_peft_model(copy.deepcopy(start), ShiraConfig(r=2, target_modules=["1", "3"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.randn(16, 8, dtype=dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(start), tmp_path)
    found = from_shira(loaded)
    n_adapted = 2 * (8 + 20) + 2 * (20 + 30)
    assert 0 < sum(found[key].numel() for key in found if key.endswith(":values")) <= n_adapted
    base, merged = copy.deepcopy(start), copy.deepcopy(loaded).merge_and_unload()
    undo = delta.apply(base, delta.pack(found))
    assert not torch.equal(base[1].weight, start[1].weight)
    for name, p in merged.named_parameters():
        assert torch.equal(base.get_parameter(name), p), name
    delta.revert(base, undo)
    assert delta.fingerprint(base) == delta.fingerprint(start)
    x = torch.randn(16, 8, dtype=dtype)
    assert torch.equal(loaded(x), model(x))


def test_what_is_no_shira_adapter_is_refused():
    """No adapter of that name, one that is merged, and modules that were trained beside it."""
    from peft import ShiraConfig, get_peft_model

    model = get_peft_model(network(), ShiraConfig(r=2, target_modules=["1"]))
    with pytest.raises(ValueError, match="no SHiRA adapter 'other' that is not merged"):
        from_shira(model, "other")
    model.merge_adapter()
    with pytest.raises(ValueError, match="no SHiRA adapter 'default' that is not merged: load it, or `unmerge`"):
        from_shira(model)
    with_head = get_peft_model(network(), ShiraConfig(r=2, target_modules=["1"], modules_to_save=["11"]))
    with pytest.raises(ValueError, match=r"Other modules were trained as well, 11\..*merge the model, and use `diff`"):
        from_shira(with_head)
