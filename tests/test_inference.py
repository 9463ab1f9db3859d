"""From photos to logits: test-time averaging against numbers worked out by hand, and scoring a dataset."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sst.data import Photos
from sst.domains import LabelDomain
from sst.errors import InputError
from sst.inference import averaged_logits, confusion_of, photo_labels

LIMBS = LabelDomain("limbs", ("background", "left arm", "right arm"), flip_pairs=(("left arm", "right arm"),))
FLIPS = {"limbs": LIMBS.flip_index()}


class Stub(nn.Module):
    """A network that sees one pixel at a time.

    Its logits are the three channels of `see(images)`, by default of the images, the same for every head.
    """

    def __init__(self, see=nn.Identity(), heads=("limbs",)):
        super().__init__()
        self.see, self.sizes, self.photos = see, [], {"size": None}
        self.heads = nn.ModuleDict({name: nn.Conv2d(3, 3, 1, bias=False) for name in heads})
        for head in self.heads.values():
            nn.init.eye_(head.weight.data[:, :, 0, 0])

    def features(self, images):
        self.sizes.append(tuple(images.shape[-2:]))
        return [self.see(images)]

    def forward(self, images, domains=None):
        F_ = self.features(images)[-1]
        return {name: self.heads[name](F_) for name in domains or self.heads}


def near(logits, expected):
    torch.testing.assert_close(logits["limbs"], torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_a_flip_is_undone_and_left_and_right_exchanged():
    def see(images):  # the background's logit counts columns from the left edge of what the network sees
        columns = torch.arange(images.shape[-1]).expand_as(images[:, :1]).float()
        return torch.cat([columns, images[:, 1:]], dim=1)

    image = np.array([[(0, 51, 102), (0, 0, 255)], [(0, 204, 0), (0, 153, 51)]], np.uint8)
    near(averaged_logits(Stub(see), image), [[[0, 1], [0, 1]], [[.2, 0], [.8, .6]], [[.4, 1], [0, .2]]])
    # Column 0 is column 1 of the mirror: mean 1/2. Each arm gets the mean of both arms' channels at a pixel.
    arms = [[.3, .5], [.4, .4]]
    near(averaged_logits(Stub(see), image, flips=FLIPS), [[[.5, .5], [.5, .5]], arms, arms])


@pytest.mark.parametrize("views", [
    {}, {"size": (20, 9)}, {"scales": (0.5,)}, {"flips": FLIPS}, {"scales": (1, 2)},
    {"scales": (0.5, 1), "flips": FLIPS, "average": "probabilities"}], ids=str)
def test_label_maps_are_the_argmax_of_the_averaged_logits(views):
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    image = np.array(Image.fromarray(coarse).resize((31, 22), Image.Resampling.BICUBIC))
    labels, logits = (of(Stub(), image, **views)["limbs"] for of in (photo_labels, averaged_logits))
    assert labels.dtype == np.uint8 and len(np.unique(labels)) > 1
    assert (labels == logits.argmax(0).numpy()).all()


def test_scales_are_brought_to_the_photos_size_and_averaged():
    image = np.array([[(0, 0, 0), (255, 255, 255)]], np.uint8)
    net = Stub()
    # At scale 2 the network sees rows of 0 64 191 255; halved again: 32 and 223.
    row = [[(0 + 32 / 255) / 2, (1 + 223 / 255) / 2]]
    near(averaged_logits(net, image, scales=(1, 2)), [row, row, row])
    assert net.sizes == [(1, 2), (2, 4)]


def test_flips_and_scales_are_all_pairs():
    def see(images):  # logits: width, column, 0
        columns = torch.arange(images.shape[-1]).expand_as(images[:, :1]).float()
        return torch.cat([torch.full_like(columns, images.shape[-1]), columns, 0 * columns], dim=1)

    net = Stub(see)
    # Widths 2, 2, 4, 4: mean 3. Columns 0 1 and, of four halved, 0.5 2.5.
    # Arms are exchanged in the mirror, where columns are 1 0 and 2.5 0.5 once undone:
    # left arm (0 + .5)/4 and (1 + 2.5)/4, right arm the other way round.
    near(averaged_logits(net, np.zeros((1, 2, 3), np.uint8), scales=(1, 2), flips=FLIPS),
         [[[3, 3]], [[.125, .875]], [[.875, .125]]])
    assert net.sizes == [(1, 2), (1, 2), (2, 4), (2, 4)]


def test_a_scale_is_of_the_size_that_photos_are_fitted_into_and_padding_is_removed():
    net = Stub()
    photo, white = np.full((2, 4, 3), 255, np.uint8), [[1.0] * 4] * 2
    near(averaged_logits(net, photo, size=(4, 4), scales=(0.5, 1, 2)), [white, white, white])
    assert net.sizes == [(2, 2), (4, 4), (8, 8)]


def test_logits_or_probabilities_are_averaged():
    def see(images):  # logits: log(width), 0, and one that is never likely
        one = torch.ones_like(images[:, :1])
        return torch.cat([one * math.log(images.shape[-1]), 0 * one, -100 * one], dim=1)

    dot = np.zeros((1, 1, 3), np.uint8)
    near(averaged_logits(Stub(see), dot, scales=(1, 3)), [[[math.log(3) / 2]], [[0]], [[-100]]])
    near(averaged_logits(Stub(see), dot, scales=(1, 3), average="probabilities"),
         [[[(.5 + .75) / 2]], [[(.5 + .25) / 2]], [[0]]])


def limbs(root, samples):
    """Photos in the colours of classes, and label maps, from {name: (colours, labels)}."""
    for name, (colours, labels) in samples.items():
        Image.fromarray(255 * np.eye(3, dtype=np.uint8)[np.array(colours)]).save(root / f"{name}.photo.png")
        Image.fromarray(np.array(labels, np.uint8)).save(root / f"{name}.label.png")
    return Photos(LIMBS, *([root / f"{name}.{what}.png" for name in samples] for what in ("photo", "label")))


def test_every_pixel_of_every_label_map_is_counted_at_its_own_size(tmp_path):
    data = limbs(tmp_path, {"a": ([[0, 1], [2, 2]], [[0, 1], [1, 255]]),
                            "b": ([[1, 1, 2, 2]] * 4, [[1, 1, 2, 0]] * 4)})
    # a: truth 0 as 0, 1 as 1, 1 as 2. b: truth 1 as 1 eight times, 2 as 2 four times, 0 as 2 four times.
    assert confusion_of(Stub(), data).tolist() == [[1, 0, 4], [0, 9, 1], [0, 0, 4]]
    assert confusion_of(Stub(), data, indices=[0]).tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert confusion_of(Stub(), data, size=(2, 2)).sum() == 3 + 16


def test_files_that_cannot_be_read_are_left_out_and_named_where_a_list_is_given(tmp_path):
    good, other = ([[0, 1], [2, 2]], [[0, 1], [1, 2]]), ([[2, 0]], [[2, 2]])
    data = limbs(tmp_path, {"a": good, "b": good, "c": other, "d": good, "e": ([[0, 0]], [[0]])})
    whole = data.images[1].read_bytes()
    data.images[1].write_bytes(whole[:len(whole) // 2])
    Image.fromarray(np.full((2, 2), 9, np.uint8)).save(data.labels[3])
    skipped = ["from before"]
    matrix = confusion_of(Stub(), data, skipped=skipped)
    assert matrix.tolist() == [[1, 0, 0], [0, 1, 1], [1, 0, 2]], "a and c alone"
    assert (matrix == confusion_of(Stub(), data, indices=[0, 2])).all()
    for sentence, part in zip(skipped, ("from before", "b.photo.png: not a readable photo (",
                                        "d.label.png: class id 9 found; domain 'limbs' has ids 0 to 2",
                                        "e.label.png: the label map is 1x1 but its photo"), strict=True):
        assert part in sentence and "\n" not in sentence
    with pytest.raises(InputError, match="b.photo.png: not a readable photo"):
        confusion_of(Stub(), data)
