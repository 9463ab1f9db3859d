"""The network that is kept (Sec. 4.1, "Human Parsing Network"): backbone, encoder, decoder, heads.

It knows nothing of MSA, MSE and MST (sst/modules.py): those only read its feature maps while it is trained.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .deform_attn import deform_attn
from .efficientnet import EfficientNetLite0
from .resnet import ResNet


STRIDE = 32  # of the deepest map


@dataclass(frozen=True)
class Arch:
    """Sizes of the network. The presets are one architecture in several sizes, with one of two backbones."""

    blocks: tuple = (3, 4, 6, 3)  # residual blocks per stage, of a ResNet
    width: int = 64               # channels of the first stage's bottlenecks, of a ResNet
    dim: int = 256                # D, the width of encoder, decoder and H_1..H_3
    heads: int = 8                # M, of deformable and of window attention
    points: int = 4               # P, deformable points per head and level
    layers: int = 6               # encoder layers
    ffn: int = 1024               # hidden width of the encoder's feed-forward nets
    window: int = 8               # pixels along a side of a Swin window
    mlp: int = 4                  # hidden width of a Swin block's MLP, in multiples of D
    backbone: str = "resnet"      # or "efficientnet-lite0", which has one size


ARCHS = {
    "r50": Arch(),
    "r101": Arch(blocks=(3, 4, 23, 3)),
    "small": Arch(blocks=(2, 2, 2, 2), width=16, dim=64, heads=2, layers=1, ffn=128, window=4, mlp=2),
    "lite": Arch(backbone="efficientnet-lite0", dim=64, heads=2, layers=1, ffn=128, window=4, mlp=2),
}


def build_backbone(arch):
    """The Backbone of an Arch. Raises ValueError for one that is not known."""
    if arch.backbone == "efficientnet-lite0":
        return EfficientNetLite0()
    if arch.backbone != "resnet":
        raise ValueError(f"the backbone {arch.backbone!r} is neither 'resnet' nor 'efficientnet-lite0'")
    return ResNet(arch.blocks, arch.width)


def sine_position(h, w, dim, device):
    """(h*w, dim) sines and cosines of a pixel's row and column, each spread over 2*pi, as DETR."""
    wavelength = 10000 ** (torch.arange(0, dim // 2, 2, device=device) / (dim // 2))  # (dim/4,)
    axes = []
    for n in (h, w):
        angle = (torch.arange(n, device=device) + 1) / n * 2 * torch.pi
        angle = angle[:, None] / wavelength  # (n, dim/4)
        axes.append(torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1))  # (n, dim/2)
    rows, columns = axes
    rows, columns = rows[:, None].expand(h, w, dim // 2), columns[None].expand(h, w, dim // 2)
    return torch.cat([rows, columns], dim=-1).reshape(h * w, dim)


class EncoderLayer(nn.Module):
    """Deformable self-attention over the pixels of all levels, then a feed-forward net; post-norm."""

    def __init__(self, arch, levels):
        super().__init__()
        self.heads, self.levels, self.points = arch.heads, levels, arch.points
        samples = arch.heads * levels * arch.points
        self.offsets = nn.Linear(arch.dim, samples * 2)
        self.weights = nn.Linear(arch.dim, samples)
        self.value = nn.Linear(arch.dim, arch.dim)
        self.output = nn.Linear(arch.dim, arch.dim)
        self.norm1, self.norm2 = nn.LayerNorm(arch.dim), nn.LayerNorm(arch.dim)
        self.ffn = nn.Sequential(nn.Linear(arch.dim, arch.ffn), nn.ReLU(), nn.Linear(arch.ffn, arch.dim))
        # At the start head m looks in direction m of a circle, at 1, 2 .. P pixels, all with equal weight.
        angle = torch.arange(arch.heads) * (2 * torch.pi / arch.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)  # (M, 2), onto the unit square
        steps = direction[:, None, None] * torch.arange(1, arch.points + 1)[:, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.offsets.weight.zero_()
            self.offsets.bias.copy_(steps.expand(-1, levels, -1, -1).flatten())
            self.weights.weight.zero_()
            self.weights.bias.zero_()
        for linear in (self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x, position, reference, shapes):
        B, S, D = x.shape
        M, L, P = self.heads, self.levels, self.points
        query = x + position
        offsets = self.offsets(query).view(B, S, M, L, P, 2)  # in pixels of each level
        size = torch.tensor([[w, h] for h, w in shapes], device=x.device, dtype=reference.dtype)  # (L, 2)
        locations = reference[:, None, None, None] + offsets / size[:, None]
        weights = self.weights(query).view(B, S, M, L * P).softmax(-1).view(B, S, M, L, P)
        attended = deform_attn(self.value(x).view(B, S, M, D // M), shapes, locations, weights)
        x = self.norm1(x + self.output(attended))
        return self.norm2(x + self.ffn(x))


class Encoder(nn.Module):
    """Multi-scale deformable-attention Transformer encoder (Mask2Former's pixel decoder).

    Backbone maps of strides 8, 16, 32 -> maps of the same sizes with D channels.
    """

    def __init__(self, channels, arch):
        super().__init__()
        groups = 32 if arch.dim % 32 == 0 else 1
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, arch.dim, 1), nn.GroupNorm(groups, arch.dim)) for c in channels)
        self.level = nn.Parameter(torch.randn(len(channels), arch.dim))
        self.layers = nn.ModuleList(EncoderLayer(arch, len(channels)) for _ in range(arch.layers))
        for projection in self.projections:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)

    def forward(self, maps):
        maps = [project(m) for project, m in zip(self.projections, maps)]
        shapes = [tuple(m.shape[-2:]) for m in maps]
        B, D = maps[0].shape[:2]
        device = maps[0].device
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)  # (B, S, D)
        position = torch.cat([sine_position(h, w, D, device) + level
                              for (h, w), level in zip(shapes, self.level)])  # (S, D)
        reference = torch.cat([pixel_centres(h, w, device) for h, w in shapes])  # (S, 2)
        for layer in self.layers:
            x = layer(x, position, reference, shapes)
        rows = x.split([h * w for h, w in shapes], dim=1)
        return [r.transpose(1, 2).reshape(B, D, h, w) for r, (h, w) in zip(rows, shapes)]


def pixel_centres(h, w, device):
    """(h*w, 2): x, y of every pixel's centre, the map spanning [0, 1]."""
    y = ((torch.arange(h, device=device) + 0.5) / h)[:, None].expand(h, w)
    x = ((torch.arange(w, device=device) + 0.5) / w)[None].expand(h, w)
    return torch.stack([x, y], dim=-1).reshape(h * w, 2)


class SwinBlock(nn.Module):
    """A Swin Transformer block (Liu et al. 2021): attention in windows of n x n pixels, then an MLP.

    shift: pixels by which the windows are displaced, 0 or n // 2.
    """

    def __init__(self, dim, heads, window, shift, mlp=4):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp * dim), nn.GELU(), nn.Linear(mlp * dim, dim))
        self.bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))  # relative position bias
        nn.init.trunc_normal_(self.bias, std=0.02)
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        place = torch.stack([y.flatten(), x.flatten()])  # (2, n*n)
        offset = place[:, :, None] - place[:, None] + window - 1  # (2, n*n, n*n), 0 .. 2n - 2
        self.register_buffer("offset", offset[0] * (2 * window - 1) + offset[1], persistent=False)

    def forward(self, x):
        B, H, W, D = x.shape
        n, M, s = self.window, self.heads, self.shift
        y = F.pad(self.norm1(x), (0, 0, 0, -W % n, 0, -H % n))
        h, w = y.shape[1:3]
        if s:
            y = y.roll((-s, -s), dims=(1, 2))
        y = self.windows(y)  # (B*N, n*n, D), N windows an image
        qkv = self.qkv(y).view(-1, n * n, 3, M, D // M)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))  # each (B*N, M, n*n, D/M)
        bias = self.bias[self.offset].permute(2, 0, 1)  # (M, n*n, n*n)
        if s or h != H or w != W:
            # Rolling and padding bring pixels into one window that do not belong together.
            rows, columns = zones(H, h, s, x.device), zones(W, w, s, x.device)
            zone = self.windows(rows[:, None, None] * 8 + columns[:, None])  # (N, n*n, 1)
            # -inf and not a large negative number: exp(-100) is a denormal, and they are ten times slower.
            bias = bias.masked_fill((zone != zone.transpose(1, 2))[:, None], -torch.inf)  # (N, M, n*n, n*n)
        attention = q * (D // M) ** -0.5 @ k.transpose(-1, -2)  # (B*N, M, n*n, n*n)
        attention = (attention.unflatten(0, (B, -1)) + bias).flatten(0, 1).softmax(dim=-1)
        y = attention.to(v.dtype) @ v
        y = self.output(y.transpose(1, 2).reshape(-1, n * n, D))
        y = y.view(B, h // n, w // n, n, n, D).transpose(2, 3).reshape(B, h, w, D)
        if s:
            y = y.roll((s, s), dims=(1, 2))
        x = x + y[:, :H, :W]
        return x + self.mlp(self.norm2(x))

    def windows(self, x):
        """(B, h, w, D) or (h, w, D) -> (B*N, n*n, D)."""
        n, (h, w, D) = self.window, x.shape[-3:]
        return x.reshape(-1, h // n, n, w // n, n, D).transpose(2, 3).reshape(-1, n * n, D)


def zones(size, padded, shift, device):
    """(padded,) int64 along one axis after the roll: pixels attend to each other only within one zone.

    Zone 0 are the pixels in place, +1 those that the roll has wrapped around, +2 the padding.
    """
    source = torch.arange(padded, device=device).roll(-shift)  # the pixel that the roll has brought here
    return (source < shift).long() + 2 * (source >= size).long()


class DecoderStage(nn.Module):
    """2x upsampling, the 1x1 lateral map added, one pair of Swin Transformer blocks."""

    def __init__(self, lateral, arch):
        super().__init__()
        self.lateral = nn.Conv2d(lateral, arch.dim, 1)
        self.blocks = nn.Sequential(*(SwinBlock(arch.dim, arch.heads, arch.window, shift, arch.mlp)
                                      for shift in (0, arch.window // 2)))

    def forward(self, x, lateral):
        lateral = self.lateral(lateral)
        x = F.interpolate(x, size=lateral.shape[-2:], mode="bilinear", align_corners=False) + lateral
        x = x.permute(0, 2, 3, 1).contiguous()  # (B, h, w, D): what the blocks do is along D
        return self.blocks(x).permute(0, 3, 1, 2)  # (B, D, h, w)


class ParsingNet(nn.Module):
    """The parsing network.

    domains: {name: number of classes}, or label domains; arch: an Arch or the name of one of ARCHS.
    """

    def __init__(self, domains, arch="r50"):
        super().__init__()
        if not isinstance(domains, dict):
            domains = {d.name: d.num_classes for d in domains}
        self.arch = ARCHS[arch] if isinstance(arch, str) else arch
        self.photos = None  # how photos are prepared for it, where it was read from a file
        self.backbone = build_backbone(self.arch)
        c4, *rest = self.backbone.channels
        self.encoder = Encoder(rest, self.arch)
        dim = self.arch.dim
        self.decoder = nn.ModuleList(DecoderStage(channels, self.arch) for channels in (dim, dim, c4))
        self.heads = nn.ModuleDict({name: nn.Conv2d(dim, classes, 1) for name, classes in domains.items()})
        for name, rgb in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):  # ImageNet's
            self.register_buffer(name, torch.tensor(rgb).view(3, 1, 1), persistent=False)

    def features(self, images):
        """images (B, 3, H, W), RGB in [0, 1], any H and W -> [H_1, H_2, H_3] at 1/16, 1/8, 1/4, (B, D, h, w).

        Pixel (i, j) of the map at 1/s stands for the s x s pixels of the image at (s*i, s*j): h = ceil(H/s).
        """
        H, W = images.shape[-2:]
        # Levels round up: 375 pixels would be 12 at 1/32, each 31.25 wide, and the levels would be stretched
        # onto each other. So sides are padded to multiples of 32, in the mean colour, which is zero here.
        x = F.pad((images - self.mean) / self.std, (0, -W % STRIDE, 0, -H % STRIDE))
        c4, *rest = self.backbone(x)
        e8, e16, x = self.encoder(rest)
        maps = []
        for stage, lateral in zip(self.decoder, (e16, e8, c4)):
            x = stage(x, lateral)
            maps.append(x)
        # Rounded up without a negative number, which ONNX would round towards zero.
        return [H_l[:, :, :(H + s - 1) // s, :(W + s - 1) // s] for H_l, s in zip(maps, (16, 8, 4))]

    def forward(self, images, domains=None):
        """images (B, 3, H, W), RGB in [0, 1] -> {domain: logits (B, Z, H, W)} of those domains, or of all."""
        H, W = images.shape[-2:]
        F_ = self.features(images)[-1]
        logits = {}
        for name in domains or self.heads:
            A = F.interpolate(self.heads[name](F_), scale_factor=4, mode="bilinear", align_corners=False)
            logits[name] = A[:, :, :H, :W]
        return logits

    def spec(self):
        """The network's sizes as plain values; `checkpoint.from_spec` builds it again."""
        sizes = asdict(self.arch)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in sizes.items()}
