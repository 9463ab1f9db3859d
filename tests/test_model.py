"""The kept network: shapes, torchvision's names, any input size, windows that do not leak."""

import pytest
import torch
import torch.nn.functional as F

from sst.domains import builtin_domain
from sst.errors import InputError
from sst.files import MEAN_COLOUR
from sst.checkpoint import from_spec, load_imagenet
from sst.model import ARCHS, Arch, ParsingNet, SwinBlock, sine_position
from sst.modules import SST
from sst.resnet import ResNet
from sst.scenarios import Universal

TINY = Arch(blocks=(1, 1, 1, 1), width=8, dim=32, heads=2, layers=1, ffn=32, window=4)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (97, 51), (33, 40)])
def test_every_domain_gets_logits_at_the_photo_s_size(size):
    net = ParsingNet([builtin_domain("pascal"), builtin_domain("cihp")], TINY).eval()
    images = torch.rand(2, 3, *size)
    shapes = {name: tuple(A.shape) for name, A in net(images).items()}
    assert shapes == {"pascal": (2, 7, *size), "cihp": (2, 20, *size)}
    up = lambda n, s: -(-n // s)
    assert [tuple(H.shape) for H in net.features(images)] == [
        (2, 32, up(size[0], s), up(size[1], s)) for s in (16, 8, 4)]


def test_the_presets_are_one_architecture():
    names = lambda arch: {name.split(".")[0] for name, _ in ParsingNet({"a": 2}, arch).named_children()}
    assert names("small") == names("r50")
    arch = ParsingNet({"a": 2}, "r50").arch
    assert arch == Arch()
    assert (arch.dim, arch.layers, arch.heads, arch.points, arch.ffn) == (256, 6, 8, 4, 1024)
    assert ARCHS["r101"].blocks == (3, 4, 23, 3)


def test_resnet50_has_torchvision_s_parameters():
    # Facts of torchvision's ResNet-50: 25,557,032 parameters, 2,049,000 of them in fc;
    # 318 entries without fc, counters included. Its ResNet-101 has 44,549,160 parameters.
    net = ResNet()
    assert sum(p.numel() for p in net.parameters()) == 25_557_032 - 2_049_000
    state = net.state_dict()
    assert len(state) == 318
    assert state["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert state["layer4.2.bn3.running_var"].shape == (2048,)
    assert net.layer2[0].conv2.stride == (2, 2) and net.layer2[0].conv1.stride == (1, 1)  # v1.5
    assert sum(p.numel() for p in ResNet((3, 4, 23, 3)).parameters()) == 44_549_160 - 2_049_000


def imagenet_like(net):
    """A file as torchvision's: the same keys and shapes, and fc."""
    torch.manual_seed(3)
    state = {k: torch.rand(v.shape) if v.is_floating_point() else v for k, v in net.state_dict().items()}
    return state | {"fc.weight": torch.rand(1000, 64), "fc.bias": torch.rand(1000)}


def test_imagenet_file_loads_and_freezes_batch_norm(tmp_path):
    net = ParsingNet({"a": 3}, TINY)
    state = imagenet_like(net.backbone)
    del state["bn1.num_batches_tracked"]  # as in files of PyTorch before 0.4
    torch.save(state, tmp_path / "resnet.pth")
    load_imagenet(net.backbone, tmp_path / "resnet.pth")
    net.train()
    net.features(torch.rand(2, 3, 64, 64))[-1].sum().backward()
    for key in ("conv1.weight", "bn1.running_mean", "layer4.0.bn3.weight"):
        assert torch.equal(net.backbone.state_dict()[key], state[key])
    assert net.backbone.bn1.weight.grad is None and net.backbone.conv1.weight.grad is not None
    assert not net.backbone.bn1.training and net.encoder.training


@pytest.mark.parametrize("spoil, message", [
    (lambda s: s.pop("layer1.0.conv2.weight"), "layer1.0.conv2.weight is missing, expected (8, 8, 3, 3)"),
    (lambda s: s.update({"conv1.weight": torch.zeros(64, 3, 7, 7)}),
     "conv1.weight is (64, 3, 7, 7), expected (8, 3, 7, 7)"),
    (lambda s: s.update({"layer5.weight": torch.zeros(1)}), "layer5.weight is (1,), expected absent"),
])
def test_another_network_s_weights_are_refused(tmp_path, spoil, message):
    net = ParsingNet({"a": 3}, TINY)
    state = imagenet_like(net.backbone)
    spoil(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError) as caught:
        load_imagenet(net.backbone, tmp_path / "w.pth")
    assert message in str(caught.value) and "w.pth" in str(caught.value)


def test_no_weights_file_or_no_weights_in_it(tmp_path):
    backbone = ParsingNet({"a": 3}, TINY).backbone
    with pytest.raises(InputError, match="no such file"):
        load_imagenet(backbone, tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InputError, match="text.pth: not a readable PyTorch weight file"):
        load_imagenet(backbone, tmp_path / "text.pth")
    with pytest.raises(InputError, match="no ImageNet file is published"):
        load_imagenet(backbone, "auto")


def test_auto_without_a_network_says_what_to_do(monkeypatch):
    from urllib.error import URLError
    def offline(*args, **kwargs):
        raise URLError("no route")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(InputError, match=r"resnet50-0676ba61.pth could not be downloaded "
                                         r".*no route.*--backbone-weights PATH"):
        load_imagenet(ResNet(), "auto")


@pytest.mark.parametrize("shift", [0, 2])
def test_window_attention_does_not_look_outside_its_window(shift):
    torch.manual_seed(0)
    block = SwinBlock(8, 2, 4, shift).double()
    x = torch.randn(1, 6, 9, 8, dtype=torch.float64, requires_grad=True)  # no multiple of the window: padded
    block(x)[0, 5, 8].sum().backward()
    touched = (x.grad[0].abs().sum(-1) > 0).nonzero()
    # Windows start at multiples of 4, shifted by -2 where shift is 2:
    # pixel (5, 8) is in rows 4-5, column 8 | rows 2-5, columns 6-8.
    assert touched.amin(0).tolist() == ([4, 8] if shift == 0 else [2, 6])
    assert touched.amax(0).tolist() == [5, 8]
    assert len(touched) == (2 if shift == 0 else 12)


def test_result_of_a_block_does_not_depend_on_what_follows_the_map():
    torch.manual_seed(0)
    block = SwinBlock(8, 2, 4, 2).double()
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64)
    shifted = block(x)
    # The roll must not let the last rows see the first:
    # changing row 0 leaves rows 6 and 7 (another window) alone.
    other = x.clone()
    other[:, 0] += 1
    changed = block(other)
    assert torch.equal(changed[:, 6:], shifted[:, 6:]) and not torch.equal(changed[:, 1], shifted[:, 1])


def test_relative_position_bias_depends_on_the_offset_alone():
    block = SwinBlock(8, 2, 4, 0)
    offset = block.offset  # (16, 16): pixel i = 4*row + column
    assert offset[0, 5] == offset[1, 6] == offset[10, 15] and offset[0, 5] != offset[5, 0]
    assert offset.min() == 0 and offset.max() == 48


def test_sine_position_tells_all_pixels_apart():
    position = sine_position(6, 9, 32, "cpu")
    assert position.shape == (54, 32) and torch.cdist(position, position).add(torch.eye(54)).min() > 1e-2
    # DETR: the first sine of row 1 of 6 has angle 2 pi / 6
    assert position[0, 0] == pytest.approx(torch.sin(torch.tensor(2 * torch.pi / 6)).item(), abs=1e-6)


def test_batch_mates_do_not_change_a_prediction():
    net = ParsingNet({"a": 3}, TINY).eval()
    images = torch.rand(2, 3, 50, 70)
    with torch.no_grad():
        torch.testing.assert_close(net(images)["a"][:1], net(images[:1])["a"], atol=1e-5, rtol=1e-5)


def test_spec_builds_the_same_network():
    net = ParsingNet({"a": 3}, TINY)
    again = from_spec(net.spec(), {"a": 3})
    assert again.arch == TINY and set(again.state_dict()) == set(net.state_dict())
    with pytest.raises(InputError, match="its architecture is"):
        from_spec({"dim": 3}, {"a": 3})


# Registration: the maps of the pyramid lie exactly on one another at any size -------------------------------


def smooth_photo(h, w, seed):
    """(1, 3, h, w) in [0, 1]."""
    spots = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(spots, size=(h, w), mode="bicubic", align_corners=False).clamp(0, 1)


def on_canvas(photo):
    """The photo at the top left of a canvas in the mean colour, whose sides are the next multiples of 32."""
    h, w = photo.shape[-2:]
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)  # ImageNet's
    canvas = mean.repeat(1, 1, -(-h // 32) * 32, -(-w // 32) * 32)
    canvas[..., :h, :w] = photo
    return canvas


def far_quarter_correlation(one, two, h, w):
    """Of two maps of logits (Z, H, W), class-centred, in the last quarter of h rows and w columns."""
    rows, columns = slice(h - h // 4, h), slice(w - w // 4, w)
    quarters = [A[:, rows, columns] for A in (one, two)]
    return torch.corrcoef(torch.stack([(A - A.mean(0)).flatten() for A in quarters]))[0, 1].item()


@pytest.mark.parametrize("side", [97, 113, 129, 161])
def test_a_photo_of_any_size_has_the_logits_that_it_has_on_a_canvas_of_whole_strides(side):
    """A pyramid that stretches its maps onto one another has correlations of 0.65, 0.79, 0.52, 0.56 here."""
    torch.manual_seed(2)
    net, photo = ParsingNet({"a": 7}, "small").eval(), smooth_photo(side, side, seed=2)
    with torch.no_grad():
        alone, on_the_canvas = (net(x)["a"][0] for x in (photo, on_canvas(photo)))
    assert far_quarter_correlation(alone, on_the_canvas, side, side) >= 0.97


def test_a_crop_of_any_size_has_the_losses_of_the_canvas_on_which_the_rest_is_ignored():
    domains = [builtin_domain("pascal"), builtin_domain("atr")]
    torch.manual_seed(0)
    model = Universal(ParsingNet(domains, TINY), SST(domains, TINY.dim)).train()
    images = torch.randint(256, (3, 3, 72, 88), dtype=torch.uint8)
    labels = torch.randint(7, (3, 72, 88), dtype=torch.uint8)
    canvas = torch.tensor(MEAN_COLOUR, dtype=torch.uint8).view(1, 3, 1, 1).repeat(3, 1, 96, 96)
    ignored = torch.full((3, 96, 96), 255, dtype=torch.uint8)
    canvas[..., :72, :88], ignored[..., :72, :88] = images, labels
    alone, _ = model(images, labels, ["pascal", "atr", "atr"])
    on_the_canvas, _ = model(canvas, ignored, ["pascal", "atr", "atr"])
    assert set(alone) == {"seg/pascal", "seg/atr", "aux/pascal", "aux/atr", "dataset", "img"}
    assert all(torch.equal(alone[name], on_the_canvas[name]) for name in alone)
