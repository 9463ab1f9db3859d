"""SST on a network that is not ours: generality is the paper's first claim. README's example is this test."""

import re
from pathlib import Path

import torch
from torch import nn


class Foreign(nn.Module):
    """A plain convolutional pyramid with two heads; it has never heard of sst."""

    def __init__(self):
        super().__init__()
        conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.ReLU())
        layers = [conv(3, 32), conv(32, 64), conv(64, 64), conv(64, 64)]  # strides 2, 4, 8, 16
        self.down = nn.ModuleList(layers)
        self.heads = nn.ModuleDict({"pascal": nn.Conv2d(64, 7, 1), "cihp": nn.Conv2d(64, 20, 1)})

    def forward(self, images):
        maps = []
        for layer in self.down:
            images = layer(images)
            maps.append(images)
        return maps[:0:-1]  # 1/16, 1/8, 1/4


def test_the_readme_example_trains_a_foreign_network():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", readme, re.S) if "SST(" in code]
    assert len(example.strip().splitlines()) <= 12
    torch.manual_seed(0)
    net = Foreign()
    labels = torch.randint(0, 7, (4, 8, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    names = {"net": net, "images": torch.rand(4, 3, 64, 64), "labels": labels, "torch": torch}
    exec(example, names)
    first = names["loss"].item()
    gradients = [p.grad for p in net.parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
    assert set(names["losses"]) == {"seg/pascal", "seg/cihp", "aux/pascal", "aux/cihp", "dataset", "img"}
    for _ in range(5):
        names["optimizer"].step()
        names["optimizer"].zero_grad()
        H = net(names["images"])
        losses, _ = names["sst"](H, labels, [0, 0, 1, 1])
        losses |= {f"seg/{n}": names["L_seg"](head(H[-1][2 * i:2 * i + 2]), labels[2 * i:2 * i + 2])
                   for i, (n, head) in enumerate(net.heads.items())}
        loss = names["L_u"](losses)
        loss.backward()
    assert loss.item() < first
