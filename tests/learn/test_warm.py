"""A run that begins as something else: once, whole or not at all, and it says so for ever after."""

import functools

import pytest
import torch
import torch.nn.functional as F

from streamlearn.contract.config import Config
from streamlearn.contract.durable import read_lines
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.registry import OciLayout
from streamlearn.learn.backbones import build
from streamlearn.learn.run import resume
from streamlearn.learn.state import fresh_state
from streamlearn.learn.warm import warm_start
from streamlearn.snapshots.publish import publish
from streamlearn.snapshots.warm import from_file
from tests.learn.test_run import Shelf, learn
from tests.learn.world import same, small_config
from tests.snapshots.others import Vissl, VisslHead, seeded, vissl_checkpoint


def config(init_parts="trunk", head_norm="bn", **model):
    small = small_config(checkpoint_steps=2, snapshot_steps=4, bn_images=8, init_parts=init_parts)
    return small.model_copy(update={"model": small.model.model_copy(update={"backbone": "regnety-200mf", "head_norm": head_norm, **model})})


def checkpoint(tmp_path, use_bn=True, dims=(368, 16, 8), prototypes=6, spoil=None):
    """VISSL's, from its own structure; (file, trunk, head)."""
    trunk, head = seeded(Vissl("regnety-200mf")), seeded(VisslHead(list(dims), prototypes, use_bn), seed=1)
    content = vissl_checkpoint(trunk, head)
    if spoil:
        spoil(content["classy_state_dict"]["base_model"]["model"])
    torch.save(content, tmp_path / "seer.torch")
    return tmp_path / "seer.torch", trunk, head


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(memory_format=torch.channels_last)


def test_the_trunk_is_taken_and_everything_else_begins_as_ever(tmp_path):
    file, trunk, _ = checkpoint(tmp_path)
    state, fresh = fresh_state(config()), fresh_state(config())
    told = warm_start(state, config(), from_file(file))
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        for model in (state.model, state.ema.model):
            plain = build(
                "regnety-200mf", "imagenet"
            )  # the learner's own is computed otherwise (learn/fit.py), to the same but for rounding
            plain.load_state_dict(model.trunk.state_dict())
            assert torch.equal(plain.to(memory_format=torch.channels_last).eval()(x), trunk(x))
            torch.testing.assert_close(model.trunk.eval()(x), trunk(x))
            model.train()
    assert same(state.model.head.state_dict(), fresh.model.head.state_dict()) == set()
    assert same(state.objective.state_dict(), fresh.objective.state_dict()) == set() and state.step == 0
    assert told["parts"] == ["trunk"] and told["not_taken"] == ["head", "prototypes"] and told["layout"] == "vissl"


@pytest.mark.parametrize("use_bn", [True, False])
def test_head_and_prototypes_come_too_when_asked_and_score_as_vissl_s_do(tmp_path, use_bn):
    """VISSL's linear layers have a bias in front of BatchNorm, ours have none: it must not be lost."""
    file, trunk, head = checkpoint(tmp_path, use_bn)
    wanted = config("all", "bn" if use_bn else "none")
    state = fresh_state(wanted)
    told = warm_start(state, wanted, from_file(file))
    assert told["parts"] == ["trunk", "head", "prototypes"] and told["not_taken"] == []
    x = images(4, 3, 64, 64)
    with torch.inference_mode():
        for model in (state.model, state.ema.model):
            z, want = F.normalize(model.eval().head(model.trunk(x)), dim=1), head(trunk(x))
            torch.testing.assert_close(z, want, atol=2e-6, rtol=0)
            scores = state.objective.prototypes(z)
            torch.testing.assert_close(scores, want @ F.normalize(head.prototypes0.weight, dim=1).T, atol=5e-6, rtol=0)
    assert want.std() > 0.01


CHANGED = {
    "another size": (lambda: {}, {"backbone": "regnety-400mf"}, r"trunk\.s1\.b1(.|\n)*set model\.backbone = 'regnety-200mf', whose trunk it is \(here: 'regnety-400mf'\)"),
    "a missing tensor": (lambda: {"spoil": lambda m: m["trunk"].pop("_feature_blocks.res2.block1-0.f.b.0.weight")}, {}, r"trunk: missing in the file: s1\.b1\.f\.b\.weight"),
    "a block too many": (lambda: {"spoil": lambda m: m["trunk"].update({"_feature_blocks.res2.block1-1.f.b.0.weight": torch.zeros(1)})}, {}, r"trunk: only in the file: s1\.b2\.f\.b\.weight"),
    "another shape": (lambda: {"spoil": lambda m: m["trunk"].update({"_feature_blocks.conv1.stem.0.weight": torch.zeros(8, 3, 3, 3)})}, {}, r"trunk\.stem\.conv\.weight: \(8, 3, 3, 3\) in the file, \(32, 3, 3, 3\) here"),
    "not finite": (lambda: {"spoil": lambda m: m["trunk"]["_feature_blocks.res3.block2-0.f.c.weight"].fill_(float("nan"))}, {}, r"s2\.b1\.f\.c\.weight holds values that are not finite"),
    "another head": (lambda: {"dims": (368, 32, 8)}, {}, r"head\.0\.weight: \(32, 368\) in the file, \(16, 368\) here(.|\n)*set model\.head and model\.head_norm .* or set train\.init_parts = 'trunk'"),
    "a head without BatchNorm": (lambda: {"use_bn": False}, {}, r"head: missing in the file: (.|\n)*set model\.head and model\.head_norm"),
    "other prototypes": (lambda: {"prototypes": 7}, {}, r"prototypes\.weight: \(7, 8\) in the file, \(6, 8\) here(.|\n)*set objective\.prototypes"),
    "no prototypes": (lambda: {"spoil": lambda m: m["heads"].pop("0.prototypes0.weight")}, {}, r"prototypes: missing in the file: weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGED)
def test_what_does_not_fit_is_named_with_a_remedy_and_nothing_has_changed(what, tmp_path):
    make, model, why = CHANGED[what]
    file, _, _ = checkpoint(tmp_path, **make())
    wanted = config("all", **model)
    state = fresh_state(wanted)
    with pytest.raises(ConfigError, match=why):
        warm_start(state, wanted, from_file(file))
    assert same(state.state_dict(), fresh_state(wanted).state_dict()) == set()


def test_it_begins_so_once_and_every_snapshot_of_the_run_says_so(tmp_path):
    file, _, _ = checkpoint(tmp_path)
    wanted, shelf = config(), Shelf()
    read = functools.partial(from_file, file)
    whole = learn(tmp_path / "a", 8, Shelf(), config=until(wanted, 8), warm=read)
    learn(tmp_path / "b", 5, shelf, config=until(wanted, 5), warm=read)
    file.rename(tmp_path / "gone.torch")  # a home that has learnt needs it no more
    parts = learn(tmp_path / "b", 8, shelf, config=until(wanted, 8), warm=read)
    assert same(whole.state_dict(), parts.state_dict()) == set()
    events = [line for line in read_lines(tmp_path / "b" / "history" / "train.jsonl") if line.get("event") == "warm_start"]
    assert [(e["step"], e["source"], e["layout"], e["parts"]) for e in events] == [(0, "seer.torch", "vissl", ["trunk"])]
    assert events[0]["digest"].startswith("sha256:") and events[0]["not_taken"] == ["head", "prototypes"]
    digests = []
    registry = OciLayout(tmp_path / "registry")
    for step in (4, 8):
        export = shelf.exports[step][1]
        digests.append(registry.manifest(publish(registry, export)[1])[1]["annotations"]["org.streamlearn.init"])
    assert digests == [f"seer.torch ({events[0]['digest']}, vissl: trunk)"] * 2


def until(wanted: Config, steps: int) -> Config:
    return wanted.model_copy(update={"train": wanted.train.model_copy(update={"max_steps": steps})})


def test_a_checkpoint_of_before_there_was_an_origin_is_gone_on_from(tmp_path):
    state = learn(tmp_path, 2, Shelf())

    class Old:
        last_step = 2

        def load(self, room):
            return {name: part for name, part in state.state_dict().items() if name != "origin"}

    from streamlearn.contract.status import Heartbeat

    again = resume(small_config(), Old(), Heartbeat(tmp_path, "train"), warm=lambda: pytest.fail("read although there is a checkpoint"))
    assert again.origin == {} and again.step == 2
