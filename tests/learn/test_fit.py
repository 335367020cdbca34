"""How a model is computed (precision, memory, kernels, padding) never changes what it computes, beyond rounding."""

import copy
import gc
import json
import weakref
from functools import partial

import pytest
import torch

from streamlearn.contract.config import ModelConfig
from streamlearn.contract.errors import ConfigError
from streamlearn.learn.backbones import build
from streamlearn.learn.backbones.forms import LIBRARY, Conv2d, as_products, convolve, forms_of
from streamlearn.learn.backbones.regnet import RegNetY, Stages, padded, plain
from streamlearn.learn.backbones.remade import Again, bottleneck
from streamlearn.learn.fit import CACHE, compiled, fit, whole_again
from streamlearn.learn.model import Model
from streamlearn.learn.state import fresh_state
from streamlearn.learn.trainer import train
from streamlearn.learn.tuning import shapes, tune
from tests.learn.world import batches, same, small_config

LAYERS = [  # in, out, kernel, stride, groups: RegNetY's kinds
    (24, 56, 1, 1, 1), (24, 56, 1, 2, 1), (3, 32, 3, 2, 1), (56, 56, 3, 1, 7), (48, 48, 3, 2, 6), (30, 30, 3, 1, 2)
]  # fmt: skip


def layer(c, out, kernel, stride, groups, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, c, 10, 9, generator=g, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(out, c // groups, kernel, kernel, generator=g, dtype=dtype).requires_grad_()
    return x, weight, stride, groups


def through(x, weight, stride, groups, form):
    y = convolve(x, weight, stride, groups, form)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(y.dtype)
    return y, *torch.autograd.grad(y, (x, weight), pull)


@pytest.mark.parametrize("kind", LAYERS, ids=str)
def test_every_form_of_a_convolution_is_the_librarys_forward_and_backward_in_float64(kind):
    given = layer(*kind)
    expected = through(*given, LIBRARY)
    forms = forms_of(given[1], kind[-1])
    assert forms[0] == LIBRARY and len(forms) > 1
    for form in forms:
        for found, wanted in zip(through(*given, form), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12, msg=lambda m, form=form: f"{form}: {m}")


def test_grouped_layers_are_offered_merged_groups_and_split_ones():
    assert set(forms_of(torch.empty(48, 8, 3, 3), 6)) == {LIBRARY, "nchw", "merge-2", "merge-3", "merge-6", "split"}
    assert "merge-2" in forms_of(torch.empty(1232, 112, 3, 3), 11 * 2) and "split" not in forms_of(torch.empty(368, 8, 3, 3), 46)


def grads(trunk, x):
    trunk.zero_grad()
    y = trunk(x)
    y.square().mean().backward()
    return y.detach(), {n: p.grad.clone() for n, p in trunk.named_parameters()}, {n: b.clone() for n, b in trunk.named_buffers()}


def small(dtype=torch.float32, group=8):
    torch.manual_seed(1)
    trunk = RegNetY(Stages((1, 2), (3 * group, 5 * group), (group, group)), "imagenet").to(dtype)
    x = torch.randn(4, 3, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return trunk, x


@pytest.mark.parametrize("run", [bottleneck, whole_again])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_made_again_gives_the_same_bits_and_moves_running_statistics_once(run, dtype):
    trunk, x = small(dtype)
    other = copy.deepcopy(trunk)
    other.run = run
    assert same(grads(trunk, x), grads(other, x)) == set()


def kept_bytes(trunk, x):
    """What a forward pass leaves allocated for the backward pass."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = trunk(x)
    assert y.requires_grad  # and is still there: so is all that its gradient needs
    return sum(event.self_device_memory_usage + event.self_cpu_memory_usage for event in profiler.key_averages())


def test_norms_made_again_keep_four_tensors_of_a_block_where_seven_were_kept_and_whole_blocks_one():
    trunk, x = small()
    kept = {}
    for name, run in (("none", plain), ("selective", bottleneck), ("full", whole_again)):
        trunk.run = run
        kept[name] = kept_bytes(trunk, x)
    assert kept["selective"] < 0.75 * kept["none"] and kept["full"] < 0.7 * kept["selective"], kept


@pytest.mark.parametrize("end", ["backward", "dropped"])
def test_what_is_to_be_made_again_is_given_back_without_waiting_for_the_garbage_collector(end):
    trunk, x = small()
    trunk.run = bottleneck
    before = weakref.WeakSet(o for o in gc.get_objects() if type(o) is Again)  # what other tests left
    gc.disable()
    try:
        y = trunk(x)
        made = weakref.WeakSet(o for o in gc.get_objects() if type(o) is Again and o not in before)
        assert made
        if end == "backward":
            y.sum().backward()
        else:  # a forward pass whose gradient nobody asks for
            del y
        assert len(made) == 0
    finally:
        gc.enable()


def test_a_block_of_another_class_is_called_for_its_call_may_gather_its_weights():
    trunk, x = small()
    trunk.run = bottleneck
    calls = []

    class Gathering(type(trunk.s1.b1)):  # as FSDP2's fully_shard does it
        def __call__(self, *args):
            calls.append(args)
            return super().__call__(*args)

    trunk.s1.b1.__class__ = Gathering
    trunk(x)
    assert len(calls) == 1


def test_a_forward_pass_without_gradient_leaves_nothing_to_be_made_again():
    trunk, x = small()
    trunk.run = bottleneck
    before = sum(type(o) is Again for o in gc.get_objects())
    with torch.no_grad():
        y = trunk(x)
    assert sum(type(o) is Again for o in gc.get_objects()) == before and not y.requires_grad


def test_evaluation_and_calibration_with_kept_norms_are_the_plain_ones():
    trunk, x = small()
    other = copy.deepcopy(trunk)
    other.run = bottleneck
    for each in (trunk, other):
        with torch.no_grad():
            each(x)
        each.eval()
    assert torch.equal(trunk(x), other(x)) and same(trunk.state_dict(), other.state_dict()) == set()


def test_on_a_cpu_every_1_x_1_convolution_is_a_product_and_the_trunk_computes_what_it_did_in_float64():
    trunk, x = small(torch.float64)
    other = copy.deepcopy(trunk)
    as_products(other)
    products = {n for n, m in other.named_modules() if isinstance(m, Conv2d) and m.usual == "matmul"}
    assert products == {n for n, m in trunk.named_modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1)}
    assert any(".se." in n for n in products) and [n for n, _ in other.named_parameters()] == [n for n, _ in trunk.named_parameters()]
    for one, two in zip(grads(trunk, x), grads(other, x), strict=True):
        torch.testing.assert_close(two, one, atol=1e-11, rtol=1e-11)
    before = grads(other, x)
    other.run = bottleneck
    for buffer, kept in zip(other.buffers(), before[2].values(), strict=True):
        buffer.copy_(kept)
    assert same(before[1], grads(other, x)[1]) == set()  # made again to the same bits, as products too


def test_padded_channels_change_nothing_and_weights_keep_their_shapes():
    trunk, x = small(torch.float64, group=7)
    other = copy.deepcopy(trunk)
    padded(other, 8)
    wide = []
    other.s2.b1.f.b.register_forward_pre_hook(lambda _, inputs: wide.append(inputs[0].shape[1]))
    assert {n: p.shape for n, p in other.state_dict().items()} == {n: p.shape for n, p in trunk.state_dict().items()}
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in trunk.named_parameters()]
    for one, two in zip(grads(trunk, x), grads(other, x), strict=True):
        torch.testing.assert_close(two, one, atol=1e-11, rtol=1e-11)
    assert wide == [5 * 8]
    for each in (trunk, other):
        each.eval()
    torch.testing.assert_close(other(x), trunk(x), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("multiple", [8, 16])  # groups of 8 need no padding for 8: the convolutions would lose their standardisation unseen
def test_norms_that_cannot_be_padded_are_refused_with_a_remedy_and_nothing_is_changed(multiple):
    model = Model(ModelConfig(backbone="regnety-tiny", head=(8,), norm="gn_ws"))
    with pytest.raises(ConfigError, match=rf"train.pad_groups = {multiple}: GroupNorm cannot be padded: .*set it to 0"):
        fit(model, small_config(pad_groups=multiple))
    assert not any(isinstance(m, Conv2d) for m in model.modules())


def test_256gfs_groups_of_373_are_computed_376_wide():
    with torch.device("meta"):
        trunk = build("regnety-256gf")
    padded(trunk, 8)
    found = {name: shape[1] for name, shape in shapes(trunk, [(1, 64)])}
    assert {found[f"s{i}.b1.f.b"] for i in (1, 2, 3, 4)} == {752, 1504, 4136, 10528}
    assert trunk(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 10444)


def test_forms_are_measured_once_and_then_read_from_the_file(tmp_path):
    (trunk, _), bare = small(), small()[0].to("meta")
    cache = tmp_path / CACHE
    chosen = tune(trunk, bare, [(4, 32)], cache, torch.float32)
    known = json.loads(cache.read_bytes())
    assert known and set(known.values()) >= set(chosen.values()) and all("torch " + torch.__version__ in key for key in known)
    planted = {key: "split" if " g3 " in key else LIBRARY for key in known}
    cache.write_text(json.dumps(planted))
    before = cache.stat().st_mtime_ns
    again = tune(trunk, bare, [(4, 32)], cache, torch.float32)
    assert set(again.values()) == {"split", LIBRARY} and cache.stat().st_mtime_ns == before
    assert isinstance(trunk.s1.b1.f.b, Conv2d) and set(trunk.s1.b1.f.b.forms.values()) == {"split"}


@pytest.mark.parametrize("spoilt", [b"", b"[1]", b'{"x": 1', b'{"x": 5}'])
def test_a_file_of_kernels_that_nobody_can_read_is_measured_anew(tmp_path, spoilt):
    cache = tmp_path / CACHE
    cache.write_bytes(spoilt)
    trunk, _ = small()
    bare = small()[0].to("meta")
    assert tune(trunk, bare, [(2, 32)], cache, torch.float32) and json.loads(cache.read_bytes())


def learnt(tmp_path, steps=3, **how):
    state = fresh_state(small_config(**how).model_copy(update={"home": str(tmp_path)}))
    losses = []
    train(state, batches(0, steps), [lambda _, step: losses.append(step.loss)])
    return losses, state


HOW = [
    {"recompute": "selective"},
    {"recompute": "full"},
    {"kernels": "measured"},
    {"pad_groups": 16},
    {"kernels": "measured", "pad_groups": 16},
]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_a_learner_learns_the_same_however_it_is_computed(tmp_path, how):
    expected, whole = learnt(tmp_path)
    found, state = learnt(tmp_path, **how)
    assert found == pytest.approx(expected, rel=1e-4)
    assert state.state_dict()["model"].keys() == whole.state_dict()["model"].keys()
    whole.load_state_dict(state.state_dict())  # a checkpoint of one is a checkpoint of the other
    if how.keys() == {"recompute"}:
        assert found == expected


def test_in_bfloat16_weights_loss_and_statistics_stay_float32(tmp_path):
    expected, _ = learnt(tmp_path, steps=1)
    found, state = learnt(tmp_path, steps=1, precision="bfloat16")
    assert found == pytest.approx(expected, rel=0.02) and found != expected
    assert {t.dtype for t in state.state_dict()["model"].values()} == {torch.float32, torch.int64}
    z = state.model([next(batches(0, 1)).crops[0]])
    assert z.dtype == torch.float32
    seen = []
    state.model.trunk.s1.b1.f.a.register_forward_hook(lambda _m, _i, y: seen.append(y.dtype))
    state.model([next(batches(0, 1)).crops[0]])
    assert seen == [torch.bfloat16]


def test_the_average_and_its_calibration_are_computed_the_same_way(tmp_path):
    _, state = learnt(tmp_path, recompute="selective", pad_groups=16)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        trunk = build("regnety-tiny").eval()
        trunk.load_state_dict(state.ema.model.trunk.state_dict())
        torch.testing.assert_close(state.ema.model.trunk.eval()(x), trunk(x), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiled_blocks_learn_the_same_in_whatever_form_and_however_little_they_keep(tmp_path):
    trunk, x = small()
    expected = grads(copy.deepcopy(trunk), x)
    tune(trunk, small()[0].to("meta"), [(4, 32)], tmp_path / CACHE, torch.float32)
    trunk.s2.b1.f.b.forms = dict.fromkeys(trunk.s2.b1.f.b.forms, "merge-5")
    fast = compiled(plain, backend="aot_eager")  # inductor takes minutes here
    for run in (fast, partial(whole_again, run=fast)):
        other = copy.deepcopy(trunk)
        other.run = run
        for one, two in zip(expected, grads(other, x), strict=True):
            torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-3)
