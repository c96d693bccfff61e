"""`GradientSkipper` computes no gradient of what is fully frozen; live elements have that of plain autograd."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_gcfreeze import _torch
from lightning_gcfreeze.freezing import Compact, GradientSkipper, WeightUses, blocks, blocks_worth_it


@pytest.fixture(autouse=True)
def _every_block_is_worth_it(monkeypatch):
    monkeypatch.setattr(blocks, "MIN_SAVED_MACS", 1)
    monkeypatch.setattr(blocks, "MIN_SAVED_ELEMENTS", 1)
    monkeypatch.setattr(blocks, "MAX_BLOCK_FRACTION", 1.0)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear on sequences": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "linear on one sample": (lambda: nn.Linear(6, 5), (6,)),
    "embedding": (lambda: nn.Embedding(5, 6), (4, 3)),
    "embedding with padding": (lambda: nn.Embedding(5, 6, padding_idx=2), (9,)),
    "conv1d": (lambda: nn.Conv1d(6, 5, 3, stride=2), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 5, (3, 2), padding=(1, 0), dilation=(2, 1)), (2, 6, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(6, 5, 2), (2, 6, 4, 4, 4)),
    "conv2d on one sample": (lambda: nn.Conv2d(6, 5, 3), (6, 7, 8)),
}


def masks(weight):
    """Return masks of rows, of columns, of both, and of both with holes inside; each leaves live elements."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = torch.zeros_like(weight, dtype=torch.bool), torch.zeros_like(weight, dtype=torch.bool)
    rows[[0, 3]] = True
    columns[:, [1, 2, 5]] = True
    holes = torch.rand(weight.shape, generator=generator) < 0.3
    return {"rows": rows, "columns": columns, "both": rows | columns, "holes": rows | columns | holes}


def uses_of(module, parameters, run):
    """Return the uses of each weight in a step."""
    uses = WeightUses(module, parameters)
    uses.listen()
    run()
    uses.stop()
    return uses.uses_per_step


def whole(frozen):
    """Return the names of what is fully frozen."""
    return [name for name, mask in frozen.items() if mask.all()]


def skipped(module, frozen, x, compact=True):
    """Skip gradients of a module after a counted step; return the holder that receives them, and the skipper."""
    parameters = dict(module.named_parameters())
    uses = uses_of(module, parameters, lambda: module(x).sum().backward())
    module.zero_grad()
    blocks = blocks_worth_it(parameters, frozen, uses)
    assert blocks
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    holder = Compact(optimizer, parameters, frozen, unbundled=blocks) if compact else None
    return holder, GradientSkipper(module, parameters, whole(frozen), blocks, holder.leaf if holder else None)


def plain_gradients(module, x, loss):
    return dict(
        zip(
            (name for name, _ in module.named_parameters()),
            torch.autograd.grad(loss(module(x)), list(module.parameters())),
            strict=True,
        )
    )


@pytest.mark.parametrize("compact", [True, False], ids=["live elements", "in place"])
@pytest.mark.parametrize("kind", ["rows", "columns", "both", "holes"])
@pytest.mark.parametrize("name", LAYERS)
def test_live_elements_have_the_gradient_of_plain_autograd(name, kind, compact):
    """Two backward passes add up; the output can be changed in place; the input's gradient is right, too."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().double()
    looks_up = isinstance(layer, nn.Embedding)
    if looks_up:
        nn.init.normal_(layer.weight)  # also of the padding, whose zeros would have no gradient behind a ReLU
    module = nn.Sequential(nn.Identity() if looks_up else nn.Tanh(), layer, nn.ReLU(inplace=True))
    x = (
        (torch.arange(12)[: math.prod(shape)] % 5).view(shape)
        if looks_up
        else torch.randn(shape, dtype=torch.float64, requires_grad=True)
    )
    frozen = {"1.weight": masks(layer.weight)[kind]}
    loss = lambda y: (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum()  # noqa: E731
    expected = plain_gradients(module, x, loss)
    by_x = None if looks_up else torch.autograd.grad(loss(module(x)), x)[0]
    holder, _ = skipped(module, frozen, x.detach(), compact)
    for _ in range(2):
        loss(module(x)).backward()
    live = ~frozen["1.weight"]
    if compact:
        holder.gather_gradients_()
        (found,) = [
            p.grad
            for p in holder._optimizer.param_groups[0]["params"]
            if p.dim() == 1 and p is not getattr(layer, "bias", None)
        ]
        assert layer.weight.grad is None
    else:
        found = layer.weight.grad[live]
    torch.testing.assert_close(found, 2 * expected["1.weight"][live], rtol=1e-10, atol=1e-12)
    assert found.any()
    if by_x is not None:
        torch.testing.assert_close(x.grad, 2 * by_x, rtol=1e-10, atol=1e-12)
    if getattr(layer, "bias", None) is not None:
        torch.testing.assert_close(layer.bias.grad, 2 * expected["1.bias"], rtol=1e-10, atol=1e-12)
    assert layer._parameters["weight"] is dict(module.named_parameters())["1.weight"]


def flops(module, x):
    with FlopCounterMode(display=False) as counter:
        module(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "outside"), [("linear", 12 / 30), ("conv2d", 12 / 30)])
def test_flops_shrink_by_the_frozen_rows_until_release(name, outside):
    """Counted by torch: 2 of 5 rows are not computed."""
    make, shape = LAYERS[name]
    module, x = make(), torch.randn(shape)
    before = flops(module, x)
    module.zero_grad()
    forward = flops(module.requires_grad_(False), x.requires_grad_()) - before / 2  # the input's gradient
    assert forward == pytest.approx(before / 2)
    module.requires_grad_(True)
    frozen = {"weight": masks(module.weight)["rows"]}
    _, skipper = skipped(module, frozen, x.detach())
    assert flops(module, x.detach()) == pytest.approx(before / 2 * (1 + 1 - outside))
    skipper.release()
    assert flops(module, x.detach()) == before


def test_fully_frozen_first_layers_have_no_backward_pass():
    """Their parameters require no gradient, and neither do activations before the first live parameter."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    x, parameters = torch.randn(3, 4), dict(module.named_parameters())
    total = flops(module, x)
    frozen = {n: torch.full_like(p, n[0] in "02", dtype=torch.bool) for n, p in parameters.items()}
    skipper = GradientSkipper(module, parameters, whole(frozen), {})
    assert not module[3](module[:3](x)).requires_grad
    assert flops(module, x) == total - 2 * 3 * (
        2 * 16 + 16 + 8
    )  # of two weights, of the activations before them and behind
    assert set(skipper.without_gradient) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    skipper.release()
    assert all(p.requires_grad for p in parameters.values())


def test_parameters_that_the_user_does_not_train_are_left_alone():
    """`release` lets exactly those parameters require a gradient that `GradientSkipper` has changed."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    module[1:].requires_grad_(True)
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    frozen = {n: torch.full_like(p, n.startswith("1"), dtype=torch.bool) for n, p in parameters.items()}
    skipper = GradientSkipper(module, parameters, whole(frozen), {})
    assert [p.requires_grad for p in module.parameters()] == [False] * 4 + [True] * 2
    skipper.release()
    assert [p.requires_grad for p in module.parameters()] == [False] * 2 + [True] * 4


def test_loss_of_frozen_parameters_only_has_a_backward_pass():
    """Everything is frozen, or the live parameters take no part in this step."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    parameters = dict(module.named_parameters())
    frozen = {n: torch.ones_like(p, dtype=torch.bool) for n, p in parameters.items()}
    holder = Compact(torch.optim.SGD(module.parameters(), 0.1), parameters, frozen)
    skipper = GradientSkipper(module, parameters, whole(frozen), {}, holder.leaf)
    loss = module(torch.ones(3, 2)).sum()
    assert not loss.requires_grad
    skipper.begin_backward(loss)
    loss.backward()
    assert all(p.grad is None for p in parameters.values())


def test_weights_with_hooks_and_patched_layers_have_no_block():
    """A hook on the weight reads the whole gradient; a patched forward method may compute anything."""
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 5))
    module[1].weight.register_hook(lambda gradient: 2 * gradient)
    module[2].forward = lambda x: 3 * torch.nn.functional.linear(x, module[2].weight)
    parameters, x = dict(module.named_parameters()), torch.randn(4, 6)
    frozen = {n: torch.arange(5)[:, None].expand(p.shape) < 2 for n, p in parameters.items() if p.dim() == 2}
    uses = uses_of(module, parameters, lambda: module(x).sum().backward())
    assert set(blocks_worth_it(parameters, frozen, uses)) == {"0.weight"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_layers_whose_weight_is_no_parameter_are_ignored():
    """Old-style normalisations and pruning compute the weight from other parameters."""
    layer = torch.nn.utils.weight_norm(nn.Linear(3, 2))
    parameters = dict(layer.named_parameters())
    assert uses_of(layer, parameters, lambda: layer(torch.ones(1, 3)).sum().backward()) == {}
    GradientSkipper(layer, parameters, [], {})


def test_layer_called_twice_and_weight_shared_by_two_layers_add_up_gradients():
    """A third use is a plain product outside of any layer."""
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4, bias=False).double(), nn.Linear(4, 4, bias=False).double()
    second.weight = first.weight

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            return self.second(torch.tanh(self.first(torch.tanh(self.first(x))))) @ self.first.weight

    module, x = Shared(), torch.randn(3, 4, dtype=torch.float64)
    expected = plain_gradients(module, x, torch.sum)["first.weight"]
    frozen = {"first.weight": torch.tensor([[True] * 4, [False] * 4, [True] * 4, [False, True, False, False]])}
    holder, _ = skipped(module, frozen, x)
    module(x).sum().backward()
    holder.gather_gradients_()
    (vector,) = holder._optimizer.param_groups[0]["params"]
    torch.testing.assert_close(vector.grad, expected[~frozen["first.weight"]], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("around", ["autocast", "checkpoint"])
def test_gradients_are_right_under_autocast_and_activation_checkpointing(around):
    """Computed in bfloat16, or in a second forward pass, they are those of the same module without skipping."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    x = torch.randn(16, 6)

    def run():
        if around == "checkpoint":
            return checkpoint(module, x, use_reentrant=False)
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    expected = torch.autograd.grad(run().float().square().sum(), list(module.parameters()))[0]
    frozen = {"0.weight": torch.zeros(8, 6, dtype=torch.bool)}
    frozen["0.weight"][[1, 2]] = True
    holder, _ = skipped(module, frozen, x)
    run().float().square().sum().backward()
    holder.gather_gradients_()
    (found,) = [p for p in holder._optimizer.param_groups[0]["params"] if p.numel() == 36]
    tolerance = 1e-6 if around == "checkpoint" else 0.02
    live = expected[~frozen["0.weight"]]
    torch.testing.assert_close(found.grad, live, rtol=tolerance, atol=tolerance * float(live.abs().max()))


def rows_frozen():
    """Return a linear layer with two frozen rows, its holder, its skipper and an input."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    frozen = {"weight": masks(layer.weight)["rows"]}
    return layer, *skipped(layer, frozen, x), x


def test_autograd_grad_of_the_input_keeps_no_gradient_of_the_weight():
    """`torch.autograd.grad` inside a training step computes and keeps nothing of the weight."""
    layer, holder, _, x = rows_frozen()
    torch.autograd.grad(layer(x.requires_grad_()).sum(), x)
    assert holder.leaf("weight").grad is None
    layer(x).sum().backward()
    holder.gather_gradients_()
    assert [p.grad is None for p in holder._optimizer.param_groups[0]["params"]] == [False, False]


def test_gradients_of_gradients_prevent_blocks_or_raise():
    """In the counted step they prevent blocks; after it they raise an error that names the way out."""
    layer, x = nn.Linear(6, 5), torch.randn(4, 6, requires_grad=True)

    def penalised():
        (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()

    assert uses_of(layer, dict(layer.named_parameters()), penalised) == {}
    layer, _, _, x = rows_frozen()
    with pytest.raises(RuntimeError, match="skip_frozen_gradients=False"):
        torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x, create_graph=True)


def test_uses_are_counted_per_sample_token_and_pixel():
    """Not in passes without a graph, passes of copies, or passes after `stop`."""
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(2), nn.Linear(36, 4), nn.BatchNorm1d(3), nn.Linear(4, 4))
    uses = WeightUses(module, {n: p for n, p in module.named_parameters() if n != "4.weight"})

    def run():
        return module(torch.randn(5, 2, 8, 8)).sum()

    uses.listen()
    losses = [run(), run()]
    with torch.no_grad():
        run()
    copy.deepcopy(module)(torch.randn(5, 2, 8, 8))
    uses.stop()
    sum(losses).backward()
    run().backward()
    assert uses.uses_per_step == {"0.weight": 2 * 5 * 36, "2.weight": 2 * 5 * 3}
    uses.clear()
    assert uses.uses_per_step == {}


def test_small_blocks_and_unknown_layers_are_not_used(monkeypatch):
    """A block must save more than its hooks cost; grouped, reflected and subclassed layers compute something else."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module = nn.Sequential(
        nn.Conv1d(4, 4, 3, groups=2, padding=1), nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(4, 4, 3, padding="same"), Doubled(8, 8), nn.Linear(8, 8),
    )  # fmt: skip
    x, parameters = torch.randn(2, 4, 8), dict(module.named_parameters())
    frozen = {}
    for n, p in parameters.items():
        frozen[n] = torch.zeros_like(p, dtype=torch.bool)
        frozen[n][0] = True
    uses = uses_of(module, parameters, lambda: module(x).sum().backward())
    assert uses == {"4.weight": 8}
    monkeypatch.setattr(blocks, "MIN_SAVED_MACS", 8 * 8)
    assert blocks_worth_it(parameters, frozen, uses).keys() == {"4.weight"}
    monkeypatch.setattr(blocks, "MAX_BLOCK_FRACTION", 7 / 8)
    assert blocks_worth_it(parameters, frozen, uses).keys() == {"4.weight"}
    monkeypatch.setattr(blocks, "MAX_BLOCK_FRACTION", 7 / 8 - 0.01)
    assert not blocks_worth_it(parameters, frozen, uses)
    monkeypatch.setattr(blocks, "MAX_BLOCK_FRACTION", 1.0)
    monkeypatch.setattr(blocks, "MIN_SAVED_MACS", 8 * 8 + 1)
    assert not blocks_worth_it(parameters, frozen, uses)


def test_copies_with_other_weights_are_ordinary_modules():
    """A deep copy, a pickle and a functional call train weights of their own; the original is not affected."""
    layer, holder, _, x = rows_frozen()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.zero_grad()
        other(x).sum().backward()
        torch.testing.assert_close(other.weight.grad, x.sum(0).expand(5, 6))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    given = {"weight": torch.ones(5, 6, requires_grad=True), "bias": torch.zeros(5)}
    torch.func.functional_call(layer, given, (x,)).sum().backward()
    torch.testing.assert_close(given["weight"].grad, x.sum(0).expand(5, 6))
    plain = dict(layer.named_parameters())
    for _ in range(2):  # with the weights themselves, too
        doubled = torch.func.vmap(lambda row: torch.func.functional_call(layer, plain, (row,)))(x)
        torch.testing.assert_close(doubled, layer(x))
    slopes = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sum())(given)
    torch.testing.assert_close(slopes["weight"], x.sum(0).expand(5, 6))
    assert holder.leaf("weight").grad is None
    layer(x).sum().backward()
    assert layer.weight.grad is None


def test_error_in_the_layer_leaves_its_weight_in_place():
    """The next call works."""
    layer, holder, _, x = rows_frozen()
    weight = layer.weight
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(4, 7))
    assert layer._parameters["weight"] is weight
    layer(input=x).sum().backward()
    holder.gather_gradients_()
    assert weight.grad is None
    assert holder._optimizer.param_groups[0]["params"][-1].grad is not None


def test_release_puts_the_weight_back_after_an_interrupt_in_the_layer():
    """Forward hooks do not run after a KeyboardInterrupt."""

    class Interrupting(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *args, **kwargs):
            raise KeyboardInterrupt

    layer, _, skipper, x = rows_frozen()
    weight = layer.weight
    with pytest.raises(KeyboardInterrupt):
        layer(x.as_subclass(Interrupting))
    assert layer.weight is not weight
    skipper.release()
    assert layer.weight is weight


@pytest.mark.parametrize("first", [True, False])
def test_other_forward_hooks_run_after_ours(first):
    """One that replaces the output, registered before or after ours: the gradient is right."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)

    def threefold(layer, inputs, output):
        return 3 * output

    if first:
        layer.register_forward_hook(threefold)
    holder, _ = skipped(layer, {"weight": masks(layer.weight)["rows"]}, x)
    if not first:
        layer.register_forward_hook(threefold)
    layer(x).sum().backward()
    holder.gather_gradients_()
    torch.testing.assert_close(holder._optimizer.param_groups[0]["params"][-1].grad, 3 * x.sum(0).repeat(3))


def test_compiled_code_is_compiled_again_after_requires_grad_changes(monkeypatch):
    """Some versions reuse the old graph (pytorch#139476); compiled layers get no hooks."""
    resets = []
    reset = torch.compiler.reset
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(reset()))
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    compiled = torch.compile(module, backend="aot_eager")
    x, parameters = torch.randn(3, 4), dict(module.named_parameters())
    assert uses_of(compiled, parameters, lambda: compiled(x).sum().backward()) == {}
    expected = compiled(x)
    expected.sum().backward()
    frozen = {n: torch.full_like(p, n[0] == "0", dtype=torch.bool) for n, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    skipper = GradientSkipper(compiled, parameters, whole(frozen), {})
    assert len(resets) == 1
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert [p.grad is None for p in parameters.values()] == [True, True, False, False]
    skipper.release()
    torch.compiler.reset()
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in parameters.values())


@pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
def test_embeddings_whose_gradient_is_something_else_are_not_used(options):
    module = nn.Embedding(5, 6, **options)
    assert not uses_of(module, dict(module.named_parameters()), lambda: module(torch.arange(5)).sum().backward())


def test_an_embedding_has_a_block_where_that_saves_enough_elements(monkeypatch):
    """It multiplies nothing, so elements count; a layer that was not called has none."""
    module = nn.ModuleList([nn.Embedding(5, 6), nn.Embedding(5, 6)])
    parameters = dict(module.named_parameters())
    uses = uses_of(module, parameters, lambda: module[0](torch.arange(5)).sum().backward())
    assert uses == {"0.weight": 0}
    frozen = {name: masks(p)["rows"] for name, p in parameters.items()}
    monkeypatch.setattr(blocks, "MIN_SAVED_ELEMENTS", 12)
    assert blocks_worth_it(parameters, frozen, uses).keys() == {"0.weight"}
    monkeypatch.setattr(blocks, "MIN_SAVED_ELEMENTS", 13)
    assert not blocks_worth_it(parameters, frozen, uses)


def kept_bytes(run):
    """Run, and return the bytes of tensors that were kept for the backward pass, and the gradients."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("name", ["linear", "linear on sequences"])
def test_of_a_layer_s_input_only_the_live_columns_are_kept(name, monkeypatch):
    """To the bit the gradients are those with the whole input kept; of six columns, two are live."""
    make, shape = LAYERS[name]
    found = {}
    for largest in (0.5, 0.0):
        monkeypatch.setattr(blocks, "MAX_COPIED_COLUMNS", largest)
        torch.manual_seed(0)
        module, x = make(), torch.randn(shape)
        frozen = torch.zeros_like(module.weight, dtype=torch.bool)
        frozen[:, [1, 2, 4, 5]] = True
        holder, skipper = skipped(module, {"weight": frozen}, x)
        scaled = (x * 1.0).requires_grad_()
        kept = kept_bytes(lambda module=module, scaled=scaled: module(scaled * 1.0).square().sum())
        holder.gather_gradients_()
        (vector,) = (p for p in holder._optimizer.param_groups[0]["params"] if p.dim() == 1 and p is not module.bias)
        found[largest] = kept, vector.grad.clone(), scaled.grad
        skipper.release()
    few, whole_input = found[0.5], found[0.0]
    assert whole_input[0] - few[0] == math.prod(shape) * 4 * 4 // 6
    assert torch.equal(few[1], whole_input[1])
    assert torch.equal(few[2], whole_input[2])
    assert few[1].any()


def test_an_input_that_stays_in_memory_anyway_is_not_copied():
    """ReLU keeps its output itself, and a view is no copy; what GELU made is kept by nobody else."""
    kept = {}
    for activation, view in (
        (nn.ReLU(), nn.Identity()),
        (nn.ReLU(), nn.Unflatten(0, (4, 10))),
        (nn.GELU(), nn.Identity()),
    ):
        torch.manual_seed(0)
        module, x = nn.Sequential(activation, view, nn.Linear(60, 5)), torch.randn(40, 60, requires_grad=True)
        frozen = torch.ones_like(module[2].weight, dtype=torch.bool)
        frozen[:, :10] = False
        _, skipper = skipped(module, {"2.weight": frozen}, x)
        kept[activation] = kept_bytes(lambda module=module, x=x: module(x * 1.0).square().sum())
        skipper.release()
    relu, of_view, gelu = kept.values()
    output, inputs, weight = 40 * 5 * 4, 40 * 60 * 4, 60 * 5 * 4
    assert relu == of_view == inputs + weight + output
    assert gelu == inputs + inputs // 6 + weight + output


def test_the_result_of_an_attention_is_not_copied_by_the_layer_after_it():
    """Its heads side by side are a view of what it keeps itself."""
    heads = torch.randn(4, 4, 10, 15, requires_grad=True)
    result = nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2)
    joined = result.reshape(4, 10, 60)
    if joined._base is not None:  # on this device and version
        assert _torch.keeps_own_result(joined)
    assert not _torch.keeps_own_result(heads * 1)


def test_under_autocast_the_copy_is_in_the_dtype_of_the_layer():
    torch.manual_seed(0)
    module, x = nn.Linear(60, 5), torch.randn(40, 60)
    frozen = torch.ones_like(module.weight, dtype=torch.bool)
    frozen[:, :10] = False
    _, skipper = skipped(module, {"weight": frozen}, x)
    kept = {}
    for dtype in (torch.float32, torch.bfloat16):

        def pack(tensor, dtype=dtype):
            if tensor.shape == (40, 10):
                kept[dtype] = tensor.dtype
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            module((x * 1).requires_grad_() * 1).float().square().sum().backward()
    assert kept == {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16}
    skipper.release()
