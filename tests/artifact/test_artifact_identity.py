import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from breadth import some
from places import TESTS
from torch import Tensor, nn
from torch.nn import functional as F

import growfx
from growfx.errors import ArtifactError, GrowfxWarning


def set_stride(model: Any) -> None:
    model.conv1.stride = (1, 1)


def set_padding_mode(model: Any) -> None:
    model.conv1.padding_mode = "reflect"
    model.conv1._reversed_padding_repeated_twice = [3, 3, 3, 3]


def set_eps(model: Any) -> None:
    model.bn1.eps = 0.5


def set_momentum(model: Any) -> None:
    model.bn1.momentum = 0.7


def set_pool(model: Any) -> None:
    model.maxpool.kernel_size = 5
    model.maxpool.padding = 2


def set_ceil_mode(model: Any) -> None:
    model.maxpool.ceil_mode = True  # without an effect at even sizes


def patch_forward(model: Any) -> None:
    model.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), model)


def patch_block(model: Any) -> None:
    own = model.layer1[0]
    own.forward = types.MethodType(lambda self, x: type(self).forward(self, x) + 1, own)


def drop_head(model: Any) -> None:
    model.fc = nn.Identity()


def other_activation(model: Any) -> None:
    first = model.layer1[0]
    name = "act1" if hasattr(first, "act1") else "relu"
    setattr(first, name, nn.SiLU())


def hook_that_changes(model: Any) -> None:
    model.layer2.register_forward_hook(lambda module, args, output: output * 0.5)


def hook_that_changes_in_training(model: Any) -> None:
    model.layer2.register_forward_hook(lambda module, args, output: output * 2 if module.training else None)


CHANGES: dict[Callable[[Any], None], str] = {
    set_stride: "`conv1.stride` is (1, 1), not (2, 2)",
    set_padding_mode: "`conv1.padding_mode` is 'reflect', not 'zeros'",
    set_eps: "`bn1.eps` is 0.5, not 1e-05",
    set_momentum: "`bn1.momentum` is 0.7",
    set_pool: "`maxpool.kernel_size` is 5",
    set_ceil_mode: "`maxpool.ceil_mode` is True",
    patch_forward: "`forward` was replaced",
    patch_block: "`layer1.0.forward` was replaced",
    drop_head: "fc",
    other_activation: "is a SiLU, not ReLU",
    hook_that_changes: "`layer2` has hooks",
    hook_that_changes_in_training: "in train mode",
}
LIBRARIES: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm.create_model("resnet18", num_classes=10),
    "torchvision": lambda: torchvision.models.resnet18(num_classes=10),
    "growfx timm": lambda: growfx.create_model("resnet18", num_classes=10),
    "growfx torchvision": lambda: growfx.create_model("torchvision/resnet18", num_classes=10),
}
X = torch.rand(1, 3, 32, 32)


CASES = [
    *(("timm", change) for change in CHANGES),
    *(("growfx torchvision", change) for change in (set_eps, patch_block, drop_head)),
]
KEPT = {set_stride, patch_forward, hook_that_changes_in_training}


@pytest.mark.parametrize(
    ("library", "change"), some(CASES, lambda case: case[1] in KEPT or case == ("growfx torchvision", drop_head))
)
def test_a_model_changed_after_it_was_made_is_not_claimed_to_be_that_of_its_name(
    tmp_path: Path, library: str, change: Callable[[Any], None]
) -> None:
    model = LIBRARIES[library]()
    change(model)
    net = growfx.wrap(model, X, density=0.3)
    with pytest.warns(GrowfxWarning, match="model=") as warned:
        info = growfx.save(net, tmp_path / "out")
    assert CHANGES[change] in " ".join(info.notes)
    assert CHANGES[change] in str(warned[0].message)
    assert warned[0].filename == __file__
    assert info.model is None
    assert growfx.inspect(tmp_path / "out") == info
    with pytest.raises(ArtifactError, match="model=") as refused:
        growfx.load(tmp_path / "out")
    assert CHANGES[change] in str(refused.value)
    loaded = growfx.load(tmp_path / "out", model=growfx.unwrap(net))
    torch.testing.assert_close(loaded(X), net.eval()(X))


@pytest.mark.parametrize("library", some(LIBRARIES, lambda name: name in ("timm", "growfx torchvision")))
def test_a_model_as_it_was_made_is_claimed_and_was_compared(tmp_path: Path, library: str) -> None:
    net = growfx.wrap(LIBRARIES[library](), X, density=0.3)
    info = growfx.save(net, tmp_path / "out")
    assert info.identity_checked
    assert info.notes == ()
    torch.testing.assert_close(growfx.load(tmp_path / "out")(X), net.eval()(X))


@pytest.mark.parametrize("library", some(["timm", "torchvision"], lambda name: name == "torchvision"))
def test_a_torchvision_or_timm_model_changed_before_wrap_is_named_in_the_warning(tmp_path: Path, library: str) -> None:
    model: Any = LIBRARIES[library]()
    model.conv1.stride = (1, 1)
    with pytest.warns(GrowfxWarning, match=r"resnet18` builds: `conv1.stride` is \(1, 1\), not \(2, 2\)"):
        growfx.save(growfx.wrap(model, X), tmp_path / "out")


def set_inplace(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = not module.inplace


def count_calls(model: Any) -> None:
    model.calls = 17


def keep_features(model: Any) -> None:
    model.layer2.register_forward_hook(lambda module, args, output: None)


@pytest.mark.parametrize(
    ("library", "change"),
    some(
        [("timm", keep_features), ("torchvision", set_inplace), ("growfx timm", count_calls)],
        lambda case: case[0] != "torchvision",
    ),
)
def test_what_changes_no_value_refuses_nothing(tmp_path: Path, library: str, change: Callable[[Any], None]) -> None:
    model = LIBRARIES[library]()
    change(model)
    info = growfx.save(growfx.wrap(model, X), tmp_path / "out")
    assert info.model is not None
    assert info.identity_checked


def test_probabilities_of_dropping_count_though_evaluation_does_not_show_them(tmp_path: Path) -> None:
    model: Any = growfx.create_model("test_vit", drop_path_rate=0.2, num_classes=3)
    growfx.save(growfx.wrap(model), tmp_path / "same")
    drop = next(m for m in model.modules() if type(m).__name__ == "DropPath")
    drop.drop_prob = 0.9
    with pytest.warns(GrowfxWarning, match=r"drop_prob` is 0.9"):
        growfx.save(growfx.wrap(model), tmp_path / "path")
    model = growfx.create_model("torchvision/squeezenet1_1", num_classes=3)
    model.classifier[0].p = 0.9
    with pytest.warns(GrowfxWarning, match=r"`classifier.0.p` is 0.9, not 0.5"):
        growfx.save(growfx.wrap(model, torch.rand(1, 3, 64, 64)), tmp_path / "dropout")


class Own(nn.Module):
    """A model with a setting, a function, a counter and a cache."""

    def __init__(self, width: int = 6, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 3)
        self.scale, self.act = scale, F.relu
        self.calls, self.cache = 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache = x.shape
        return self.second(self.act(self.first(x))) * self.scale


def make_random(seed: int = 0) -> nn.Module:
    """Its structure is drawn anew each time."""
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(int(torch.randint(1, 9, ())))])


def make_with_words(act: Any = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), act())


def own_net(change: Callable[[Any], None] = lambda model: None, **kwargs: Any) -> growfx.MaskedGraph:
    model = growfx.create_model(f"{__name__}:Own", **kwargs)
    change(model)
    return growfx.wrap(model, torch.rand(2, 4), density=0.5)


def test_models_made_by_a_callable_are_compared_too(tmp_path: Path) -> None:
    net = own_net(width=5)
    net(torch.rand(7, 4))
    info = growfx.save(net, tmp_path / "same")
    assert info.model == {"library": "python", "name": f"{__name__}:Own", "kwargs": {"width": 5}}
    assert info.identity_checked

    def other_scale(model: Any) -> None:
        model.scale = 3.0

    def other_function(model: Any) -> None:
        model.act = F.gelu

    for change, text in ((other_scale, "`scale` is 3.0, not 1.0"), (other_function, "`act` was replaced")):
        with pytest.warns(GrowfxWarning, match=text):
            assert growfx.save(own_net(change), tmp_path / change.__name__).model is None


def test_a_structure_drawn_anew_each_time_is_not_claimed(tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = growfx.wrap(growfx.create_model(f"{__name__}:make_random"), torch.rand(2, 4))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with pytest.warns(GrowfxWarning, match="make_random` builds"):
        assert growfx.save(net, tmp_path / "out").model is None
    assert torch.equal(torch.get_rng_state(), state)


def test_arguments_that_no_file_can_hold_are_named(tmp_path: Path) -> None:
    model = growfx.create_model(f"{__name__}:make_with_words", act=nn.GELU)
    with pytest.warns(GrowfxWarning, match="arguments of .*make_with_words` cannot be stored"):
        assert growfx.save(growfx.wrap(model, torch.rand(2, 4)), tmp_path / "out").model is None


def test_an_untied_weight_is_another_model(tmp_path: Path) -> None:
    model: Any = growfx.create_model("artifact_nets:Tied")
    growfx.save(growfx.wrap(model, torch.rand(2, 3, 6, 6)), tmp_path / "tied")
    model.second.weight = nn.Parameter(model.first.weight.detach().clone())
    with pytest.warns(GrowfxWarning, match=r"`second.weight` is no longer tied to `first.weight`"):
        growfx.save(growfx.wrap(model, torch.rand(2, 3, 6, 6)), tmp_path / "untied")


def test_a_model_of_an_own_class_saves_without_a_warning_and_says_why_it_has_no_name(tmp_path: Path) -> None:
    info = growfx.save(growfx.wrap(Own(), torch.rand(2, 4)), tmp_path / "out")
    assert info.model is None
    assert "`Own`" in info.notes[0]


def test_saving_leaves_network_buffers_modes_and_generators_alone(tmp_path: Path) -> None:
    net = growfx.wrap(LIBRARIES["growfx timm"](), X, density=0.5).train()
    net.layer1.eval()
    net.conv1.seen = 5  # something that only training could show to matter
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes, state = [m.training for m in net.modules()], torch.get_rng_state()
    growfx.save(net, tmp_path / "out")
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_the_same_changed_net_gives_the_same_bytes(tmp_path: Path) -> None:
    for out in ("a", "b"):
        torch.manual_seed(0)
        net = own_net(patched := (lambda model: setattr(model, "act", lambda x: x.relu() + 1)))
        del patched
        with pytest.warns(GrowfxWarning):
            growfx.save(net, tmp_path / out)
    for file in ("config.json", "sparse.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.filterwarnings("default::growfx.GrowfxWarning")
def test_the_command_that_writes_an_artifact_shows_what_it_cannot_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from growfx.cli import main

    common = ["--data", "digits", "--epochs", "1", "--quiet", "--set", "img_size=8"]
    monkeypatch.chdir(TESTS)
    model = f"{__name__}:drawn_anew"
    with pytest.raises(SystemExit) as ended:
        main(["train", model, "--method", "static", "--density", "0.5", "--out", str(tmp_path / "run"), *common])
    assert ended.value.code == 0
    shown = capsys.readouterr().err
    assert "growfx: " in shown
    assert "model=" in shown
    config = json.loads((tmp_path / "run" / "artifact" / "config.json").read_text())
    assert config["growfx"]["model"] is None
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert ended.value.code == 0
    assert "model=" in capsys.readouterr().err
    assert (tmp_path / "out" / "sparse.safetensors").exists()


COUNT = [0.0]


def drawn_anew(num_classes: int = 10) -> nn.Module:
    """Each model has another setting."""
    COUNT[0] += 0.01
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Dropout(COUNT[0]), nn.Linear(16, num_classes))
