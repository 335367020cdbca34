"""A trunk without BatchNorm: standardised weights, groups, and images that know nothing of each other."""

import copy
import math

import pytest
import torch
from torch import nn

from streamlearn.contract.config import ModelConfig, ObjectiveConfig
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.export import WarmStart
from streamlearn.learn.accumulate import backward
from streamlearn.learn.backbones import build
from streamlearn.learn.backbones.norms import StandardisedConv2d, group_width, standardised
from streamlearn.learn.backbones.regnet import REGNETY
from streamlearn.learn.model import Model
from streamlearn.learn.objectives import SwAV, parameters_of
from streamlearn.learn.optim import build_optimizer
from streamlearn.learn.state import fresh_state
from streamlearn.learn.warm import warm_start
from streamlearn.probes.features import untrained
from tests.learn.test_run import Shelf, learn
from tests.learn.world import same, small_config


def trunk(norm="gn_ws", name="regnety-tiny", stem="cifar"):
    torch.manual_seed(0)
    return build(name, stem, norm)


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(**train):
    small = small_config(checkpoint_steps=2, snapshot_steps=4, bn_images=8, **train)
    return small.model_copy(update={"model": small.model.model_copy(update={"norm": "gn_ws", "head_norm": "none"})})


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (16, 64, 1, 1), (24, 8, 3, 3)])
def test_each_filter_has_mean_zero_and_variance_one_over_its_fan_in_whatever_its_scale(shape):
    weight = images(*shape).double() * torch.logspace(-3, 3, shape[0], dtype=torch.float64).view(-1, 1, 1, 1) + 5e-4
    found = standardised(weight).flatten(1)
    fan_in = math.prod(shape[1:])
    assert found.mean(1).abs().max() < 1e-12
    torch.testing.assert_close(found.var(1, correction=0), torch.full((shape[0],), 1 / fan_in, dtype=torch.float64), rtol=1e-3, atol=0)
    torch.testing.assert_close(standardised(images(*shape) * 7 + 3), standardised(images(*shape)), rtol=1e-4, atol=1e-5)


def test_a_filter_that_is_constant_becomes_zero_and_its_gradient_is_finite():
    weight = torch.full((2, 3, 3, 3), 0.1, requires_grad=True)
    found = standardised(weight)
    found.pow(2).sum().backward()
    assert found.abs().max() < 1e-2 and torch.isfinite(weight.grad).all()


def test_the_gradient_is_the_one_derived_by_hand_in_float64():
    """dL/dw = (g - mean(g) - n v mean(g v)) / sqrt(n var), where v is the standardised filter and n its fan-in."""
    weight, g = images(6, 4, 3, 3).requires_grad_(), images(6, 4, 3, 3, seed=1)
    standardised(weight).backward(g)
    w, g = weight.detach().double().flatten(1), g.double().flatten(1)
    n, centred = w.shape[1], w - w.mean(1, keepdim=True)
    scale = 1 / (n * centred.pow(2).mean(1, keepdim=True)).sqrt()
    v = centred * scale
    by_hand = scale * (g - g.mean(1, keepdim=True) - n * v * (g * v).mean(1, keepdim=True))
    torch.testing.assert_close(weight.grad.double().flatten(1), by_hand, rtol=1e-4, atol=1e-6)


def test_the_whole_trunk_has_the_loss_and_gradient_of_float64():
    single = trunk()
    double = copy.deepcopy(single).double()
    x, direction = images(2, 3, 32, 32), images(2, 368, seed=1)
    for net, to in ((single, torch.float32), (double, torch.float64)):
        (net(x.to(to)) * direction.to(to)).sum().backward()
    for (name, a), b in zip(single.named_parameters(), double.parameters(), strict=True):
        assert float((a.grad.double() - b.grad).norm() / b.grad.norm()) < 1e-4, name


def test_every_batchnorm_is_gone_and_every_convolution_but_squeeze_and_excitation_s_is_standardised():
    bn, gn = trunk("bn"), trunk()
    norms = [n for n, m in bn.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and norms == [n for n, m in gn.named_modules() if isinstance(m, nn.GroupNorm)]
    plain = {n for n, m in gn.named_modules() if type(m) is nn.Conv2d}
    assert plain and all(".se." in n for n in plain)
    convs = {n for n, m in gn.named_modules() if isinstance(m, nn.Conv2d)}
    assert convs == {n for n, m in bn.named_modules() if isinstance(m, nn.Conv2d)}
    for name in convs:
        a, b = gn.get_submodule(name), bn.get_submodule(name)
        assert (a.stride, a.padding, a.groups) == (b.stride, b.padding, b.groups)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    kept = {n: t for n, t in bn.state_dict().items() if not n.endswith(statistics)}
    assert same(kept, gn.state_dict()) == set()  # the same seed, the same names, the same beginning
    with pytest.raises(ConfigError, match=r"model\.norm = 'gn': unknown; one of bn, gn_ws"):
        build("regnety-tiny", norm="gn")


def test_what_a_convolution_computes_is_the_plain_one_with_standardised_weights():
    conv = trunk().s2.b1.f.b
    assert isinstance(conv, StandardisedConv2d) and conv.groups > 1
    x = images(2, conv.in_channels, 8, 8)
    want = nn.functional.conv2d(x, standardised(conv.weight), None, conv.stride, conv.padding, groups=conv.groups)
    torch.testing.assert_close(conv(x), want, rtol=0, atol=0)


def test_groups_have_about_sixteen_channels_in_every_published_size():
    assert [group_width(w) for w in (24, 32, 56, 152, 368, 232, 440, 746)] == [12, 16, 14, 19, 16, 29, 20, 373]
    for name, stages in REGNETY.items():
        for width in (stages.stem_width, *stages.widths):
            assert width % group_width(width) == 0 and group_width(width) >= 8, (name, width)


def test_an_image_has_the_same_features_whatever_its_batch_and_so_has_not_with_batchnorm():
    x = images(6, 3, 32, 32)
    x[3:] = x[3:] * 0.1 + 2  # another source
    differences = {}
    with torch.no_grad():
        for norm in ("gn_ws", "bn"):
            net = trunk(norm).train()
            together, alone = net(x)[:3], net(x[:3])
            differences[norm] = float((together - alone).abs().max() / alone.abs().max())
    assert differences["gn_ws"] < 1e-5 and differences["bn"] > 1e-2


def test_a_batch_of_one_image_is_learnt_and_training_and_evaluation_compute_the_same():
    net, x = trunk(), images(1, 3, 16, 16)
    net(x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    with torch.no_grad():
        assert torch.equal(net.train()(x), net.eval()(x))
    assert list(net.buffers()) == []


def test_parts_of_a_batch_have_the_gradient_of_the_whole_one_and_so_have_not_with_batchnorm():
    crops, differences = [images(2, 6, 3, 16, 16), images(2, 6, 3, 8, 8, seed=1)], {}
    for norm in ("gn_ws", "bn"):
        torch.manual_seed(0)
        model = Model(ModelConfig(backbone="regnety-tiny", stem="cifar", head=(8, 5), head_norm="none", norm=norm))
        objective, found = SwAV(ObjectiveConfig(prototypes=7, epsilon=0.03, freeze_prototypes=0), 5), []
        for part in (0, 1, 3):
            for p in parameters_of(model, objective):
                p.grad = None
            backward(model, objective, crops, 0, part=part)
            found.append(torch.cat([p.grad.flatten() for p in parameters_of(model, objective)]))
        differences[norm] = max(float((parts - found[0]).norm() / found[0].norm()) for parts in found[1 if norm == "gn_ws" else 2 :])
    assert differences["gn_ws"] < 1e-3 and differences["bn"] > 0.1, differences


def test_its_norms_are_left_out_of_weight_decay_where_norms_are():
    state = fresh_state(config())
    optim = config().train.optim.model_copy(update={"exclude": ("norm",)})
    spared = {id(p) for p in build_optimizer(optim, state.model, state.objective).param_groups[1]["params"]}
    norms = [m for m in state.model.modules() if isinstance(m, nn.GroupNorm)]
    assert norms and spared == {id(p) for m in norms for p in m.parameters()}


def test_the_learner_publishes_it_without_an_image_to_calibrate_on_and_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    whole, parts = Shelf(), Shelf()
    a = learn(tmp_path / "a", 8, whole, config(max_steps=8))
    monkeypatch.setattr("tests.learn.world.PlainStream.sample", lambda *_: [])  # nothing is kept for replay
    learn(tmp_path / "b", 5, parts, config(max_steps=5))
    b = learn(tmp_path / "b", 8, parts, config(max_steps=8))
    assert same(a.state_dict(), b.state_dict()) == set() and sorted(parts.exports) == [4, 8]
    digest, export = parts.exports[8]
    assert digest == whole.exports[8][0] and export.norm == "gn_ws"
    assert same(dict(export.weights), b.ema.model.trunk.state_dict()) == set()


def test_weights_of_the_other_norm_are_refused_with_the_remedy():
    for here, there in (("gn_ws", "bn"), ("bn", "gn_ws")):
        settings = config()
        settings = settings.model_copy(update={"model": settings.model.model_copy(update={"norm": here})})
        other = trunk(there, stem="imagenet").state_dict()
        with pytest.raises(ConfigError, match=rf"set model\.norm = '{there}', as the file has it \(here: '{here}'\)"):
            warm_start(fresh_state(settings), settings, WarmStart(source="x.pth", digest="", layout="pycls", trunk=other))


def test_an_untrained_one_needs_no_image():
    found = untrained("regnety-tiny", "cifar", torch.empty(0, 3, 32, 32), 0, norm="gn_ws")
    assert same(found.state_dict(), trunk().state_dict()) == set() and not found.training
