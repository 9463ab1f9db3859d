"""The backbone: ResNet-50/101 (He et al. 2016) in its v1.5 form, whose parameters bear torchvision's names.

v1.5 puts a block's stride in its 3x3 convolution. So the public ImageNet files load unchanged.
"""

from torch import nn

from .backbone import Backbone


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
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(Backbone):
    """images (B, 3, H, W) -> four maps of strides 4, 8, 16, 32 with 4, 8, 16, 32 times `width` channels.

    blocks: residual blocks per stage; (3, 4, 6, 3) with width 64 is ResNet-50.
    """

    file = "torchvision's ResNet file (such as resnet50-0676ba61.pth)"

    def __init__(self, blocks=(3, 4, 6, 3), width=64):
        super().__init__()
        self.blocks = tuple(blocks)
        self.network = f"a ResNet with blocks {self.blocks}"
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

    def stages(self):
        return [[self.conv1, self.bn1, self.layer1], [self.layer2], [self.layer3], [self.layer4]]

    @staticmethod
    def from_imagenet(state):
        """A published file's entries without those of the classifier's head."""
        return {key: value for key, value in state.items() if not key.startswith("fc.")}
