"""The backbone for small machines: EfficientNet-Lite0 (Tan and Le 2019), without its classifier.

Lite is the variant for phones: ReLU6, no squeeze-and-excitation. Its parameters bear the names of the public
ImageNet file, without their underscores.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .backbone import Backbone

# Table 1 of the paper, stages 2 to 8. Of each: blocks, kernel, stride of the first, expansion, channels.
TABLE = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
         (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
ENDS = (3, 5, 11, 16)  # the maps of strides 4, 8, 16, 32 are what so many blocks have made


def norm(channels):
    return nn.BatchNorm2d(channels, eps=1e-3)  # TensorFlow's


class SameConv2d(nn.Conv2d):
    """A convolution without bias and with TensorFlow's "same" padding, for sides that the stride divides.

    At stride 2 a window then starts at every second pixel, the first included, and k - 2 pixels are missing:
    0 before and 1 after for 3x3, 1 and 2 for 5x5. (In general the padding depends on the side.) ParsingNet
    pads its photos to sides that 32 divides, so all of the network's convolutions see such sides.
    """

    def __init__(self, inputs, outputs, kernel, stride=1, groups=1):
        before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
        padding = before if before == after else 0
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.frame = None if before == after else (before, after, before, after)

    def forward(self, x):
        return super().forward(x if self.frame is None else F.pad(x, self.frame))


class Block(nn.Module):
    """MBConv: 1x1 to a multiple of the channels, a depthwise convolution, 1x1 to the new channels."""

    def __init__(self, inputs, kernel, stride, expansion, outputs):
        super().__init__()
        width = expansion * inputs
        self.expand_conv = None
        if expansion != 1:
            self.expand_conv, self.bn0 = SameConv2d(inputs, width, 1), norm(width)
        self.depthwise_conv, self.bn1 = SameConv2d(width, width, kernel, stride, groups=width), norm(width)
        self.project_conv, self.bn2 = SameConv2d(width, outputs, 1), norm(outputs)
        self.relu = nn.ReLU6(inplace=True)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        y = x if self.expand_conv is None else self.relu(self.bn0(self.expand_conv(x)))
        y = self.relu(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(Backbone):
    """images (B, 3, H, W), H and W multiples of 32 -> four maps of strides 4, 8, 16, 32."""

    network = "an EfficientNet-Lite0"
    file = "EfficientNet-Lite0's file (efficientnet-lite0-57934424.pth)"

    def __init__(self):
        super().__init__()
        self.conv_stem, self.bn0 = SameConv2d(3, 32, 3, 2), norm(32)
        self.relu = nn.ReLU6(inplace=True)
        self.blocks, channels = nn.ModuleList(), 32
        for count, kernel, stride, expansion, outputs in TABLE:
            for n in range(count):
                self.blocks.append(Block(channels, kernel, 1 if n else stride, expansion, outputs))
                channels = outputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as the paper's code; a depthwise filter has a fan-out of k*k
                fan_out = module.weight[:, 0].numel() / module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        self.channels = [self.blocks[end - 1].project_conv.out_channels for end in ENDS]
        # TensorFlow trained the weights on (x - 127) / 128, x in 0 .. 255; here images come with ImageNet's
        # mean and std. So does the example in the README of the weights' port, but it is older than they
        # are, and their first batch norm knows better: on street photos the variance behind the first
        # convolution is 0.99 times the recorded one (median of the channels), with mean and std 4.98 times.
        mean, std = torch.tensor(((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))).view(2, 3, 1, 1)
        self.register_buffer("scale", 255 / 128 * std, persistent=False)
        self.register_buffer("shift", (255 * mean - 127) / 128, persistent=False)

    def stages(self):
        stages = [list(self.blocks[start:end]) for start, end in zip((0, *ENDS), ENDS)]
        return [[self.conv_stem, self.bn0, *stages[0]], *stages[1:]]

    def forward(self, images):
        x = images * self.scale + self.shift
        x = self.relu(self.bn0(self.conv_stem(x)))
        maps = []
        for made, block in enumerate(self.blocks, 1):
            x = block(x)
            if made in ENDS:
                maps.append(x)
        return maps

    @staticmethod
    def from_imagenet(state):
        """A published file's entries under this network's names, without those of the classifier's head."""
        names = {key: key.lstrip("_").replace("._", ".") for key in state}
        head = ("conv_head.", "bn1.", "fc.")
        return {name: state[key] for key, name in names.items() if not name.startswith(head)}
