"""What every backbone of the kept network can do: keep what ImageNet has taught it."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # SyncBatchNorm, too, is one


class Backbone(nn.Module):
    """images (B, 3, H, W), normalised with ImageNet's mean and std -> four maps of strides 4, 8, 16, 32.

    A subclass has `channels` of the four maps, `stages()`, and what sst/checkpoint.py needs of its published
    file: `network` and `file` in words, and `from_imagenet`. `stages()` are four lists of modules: those that
    make each map of the one before, the stem in the first.
    """

    frozen = False

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:  # batches of four are too small to replace ImageNet's statistics (as in DETR)
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def freeze(self, stages=0):
        """Batch norm keeps its statistics, scales and shifts from here on, the first stages all they have."""
        self.frozen = True
        norms = [module for module in self.modules() if isinstance(module, _BatchNorm)]
        for module in norms + sum(self.stages()[:stages], []):
            module.requires_grad_(False)
        self.train(self.training)
