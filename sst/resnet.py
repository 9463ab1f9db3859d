"""The backbone: ResNet-50/101 (He et al. 2016) in its v1.5 form, whose parameters bear torchvision's names.

v1.5 puts a block's stride in its 3x3 convolution. With those names and strides the public ImageNet files load unchanged.
"""

import pickle
from pathlib import Path
from urllib.error import URLError

import torch
from torch import nn

from .errors import InputError

IMAGENET = {  # torchvision's IMAGENET1K_V1 files, by blocks per stage
    (3, 4, 6, 3): "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    (3, 4, 23, 3): "https://download.pytorch.org/models/resnet101-63fe2227.pth",
}


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """images (B, 3, H, W) -> four maps of strides 4, 8, 16, 32 with 4, 8, 16, 32 times `width` channels.

    blocks: residual blocks per stage; (3, 4, 6, 3) with width 64 is ResNet-50.
    """

    def __init__(self, blocks=(3, 4, 6, 3), width=64):
        super().__init__()
        self.blocks, self.frozen = tuple(blocks), False
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = width
        for stage, count in enumerate(blocks):
            planes = width * 2 ** stage
            layer = []
            for block in range(count):
                layer.append(Bottleneck(channels, planes, stride=2 if stage > 0 and block == 0 else 1))
                channels = 4 * planes
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layer))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.channels = [4 * width * 2 ** stage for stage in range(4)]

    def forward(self, images):
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:  # batches of four are too small to replace the statistics of ImageNet (as DETR and Mask2Former)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def load_imagenet(self, weights):
        """Load ImageNet weights and freeze batch norm (statistics and scales).

        weights: "auto" downloads torchvision's file through torch.hub (cached); else the path of such a file.
        Raises InputError where there is no file, no network, or another network's weights.
        """
        if weights == "auto":
            url = IMAGENET.get(self.blocks)
            if url is None:
                raise InputError(f"--backbone-weights auto: no ImageNet file is published for a ResNet of blocks {self.blocks}; "
                                 f"use --backbone-weights none")
            try:
                state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
            except (URLError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise InputError(f"--backbone-weights auto: {url} could not be downloaded ({error}); fetch that file elsewhere "
                                 f"and give --backbone-weights PATH, or train from scratch with --backbone-weights none") from None
            weights = url
        else:
            if not Path(weights).is_file():
                raise InputError(f"--backbone-weights {weights}: no such file; give torchvision's ResNet file, auto or none")
            try:
                state = torch.load(weights, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError):
                raise InputError(f"{weights}: not a readable PyTorch weight file; give torchvision's ResNet file "
                                 f"(such as {IMAGENET[(3, 4, 6, 3)].rsplit('/', 1)[1]})") from None
        if not isinstance(state, dict):
            raise InputError(f"{weights}: holds a {type(state).__name__}, not a dictionary of weights")
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        own = self.state_dict()
        # Files older than PyTorch 0.4 lack the batch counters, which nothing here uses.
        wrong = [key for key in own if not key.endswith("num_batches_tracked")
                 and (key not in state or state[key].shape != own[key].shape)] + [key for key in state if key not in own]
        if wrong:
            found = tuple(state[wrong[0]].shape) if wrong[0] in state else "missing"
            wanted = tuple(own[wrong[0]].shape) if wrong[0] in own else "absent"
            raise InputError(f"{weights}: weights of another network: {wrong[0]} is {found}, expected {wanted}; give the file of a "
                             f"ResNet with blocks {self.blocks}")
        self.load_state_dict(state, strict=False)
        self.freeze()

    def freeze(self):
        """Batch norm keeps its statistics, scales and shifts from here on."""
        self.frozen = True
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        self.train(self.training)
