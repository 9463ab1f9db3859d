"""The order of samples and the augmentation: functions of the seed, and flips that keep left and right."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from figures import Figures
from sst.batches import Crops, Schedule, augment, collate, fit, flip_table
from sst.data import Photos
from sst.domains import LabelDomain, builtin_domain
from sst.errors import InputError


def test_every_micro_batch_has_every_domain_and_the_rest_goes_around():
    schedule = Schedule([5, 7, 11], batch_size=4, seed=0)
    counts = [Counter(d for d, _, _ in schedule[m]) for m in range(6)]
    # 4 = 3 * 1 + 1: the one slot left goes to domain 0, 1, 2, 0, 1, 2
    assert [[c[0], c[1], c[2]] for c in counts] == [[2, 1, 1], [1, 2, 1], [1, 1, 2]] * 2
    counts = [Counter(d for d, _, _ in Schedule([5, 7, 11], 5, 0)[m]) for m in range(3)]
    # two slots left: 0 and 1, then 2 and 0, then 1 and 2
    assert [[c[0], c[1], c[2]] for c in counts] == [[2, 2, 1], [2, 1, 2], [1, 2, 2]]


def test_each_epoch_of_a_domain_reads_every_sample_once():
    schedule = Schedule([5, 7, 11], batch_size=4, seed=3)
    keys = [key for m in range(60) for key in schedule[m]]
    for d, size in enumerate(schedule.sizes):
        read = [(epoch, index) for domain, epoch, index in keys if domain == d]
        assert len(read) == 80 and read[:size] != read[size:2 * size]
        for epoch in range(len(read) // size):
            assert sorted(read[epoch * size:(epoch + 1) * size]) == [(epoch, i) for i in range(size)]
    assert schedule.passes(60) == [80 / 5, 80 / 7, 80 / 11]


def test_a_micro_batch_does_not_depend_on_what_was_read_before():
    assert Schedule([50, 9], 6, 1)[37] == [Schedule([50, 9], 6, 1)[m] for m in range(40)][37]
    assert Schedule([50, 9], 6, 1)[0] != Schedule([50, 9], 6, 2)[0]


def test_a_batch_too_small_for_the_domains():
    with pytest.raises(InputError, match="--batch-size 2: every micro-batch needs an image of each of the 3 label domains; use 3 or more"):
        Schedule([5, 5, 5], 2, 0)


def test_flip_twice_is_the_identity_and_ignored_stays_ignored():
    table = flip_table(builtin_domain("cihp"))
    assert (table[table] == np.arange(256)).all() and table[255] == 255
    assert table[builtin_domain("cihp").index("left arm")] == builtin_domain("cihp").index("right arm")


class Fixed:
    """A random generator that always scales by `scale`, starts at the window's `start` and flips or not."""

    def __init__(self, scale, flip, start=0):
        self.scale, self.flip, self.start = scale, flip, start

    def uniform(self, low, high):
        assert (low, high) == (0.5, 2)
        return self.scale

    def integers(self, low, high):
        return low if self.start == 0 else high - 1

    def random(self):
        return 0.0 if self.flip else 0.9


def picture():
    label = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    return np.repeat((label * 100)[..., None], 3, axis=2), label


IDENTITY = np.arange(256, dtype=np.uint8)
SWAP = np.array([0, 2, 1, *range(3, 256)], np.uint8)


def test_augment_without_change_is_the_picture():
    image, label = augment(*picture(), Fixed(1.0, False), (3, 4), IDENTITY)
    assert (image == picture()[0]).all() and (label == picture()[1]).all()


def test_augment_mirrors_picture_and_label_and_swaps_the_sides():
    image, label = augment(*picture(), Fixed(1.0, True), (3, 4), SWAP)
    assert (image == picture()[0][:, ::-1]).all()
    assert (label == np.array([0, 2, 1])[picture()[1][:, ::-1]]).all()


def test_augment_doubles_and_crops_at_both_ends():
    whole = picture()[1].repeat(2, 0).repeat(2, 1)  # 6 x 8
    for start, window in ((0, whole[:2, :3]), (1, whole[-2:, -3:])):
        _, label = augment(*picture(), Fixed(2.0, False, start), (2, 3), IDENTITY)
        assert (label == window).all()


def test_augment_pads_what_is_smaller_than_the_crop():
    image, label = augment(*picture(), Fixed(1.0, False, start=1), (5, 6), IDENTITY)  # at the top left
    assert (label[:3, :4] == picture()[1]).all() and (label[3:] == 255).all() and (label[:, 4:] == 255).all()
    assert (image[4, 5] == [124, 116, 104]).all()
    _, label = augment(*picture(), Fixed(1.0, False, start=0), (5, 6), IDENTITY)  # at the bottom right
    assert (label[2:, 2:] == picture()[1]).all() and (label[:2] == 255).all()


def test_augmented_photo_and_label_stay_aligned():
    # The colour is the label times 60: away from soft edges the nearest class of the colour is the label.
    label = np.kron(np.arange(4, dtype=np.uint8).reshape(2, 2), np.ones((40, 40), np.uint8))
    image = np.repeat((label * 60)[..., None], 3, axis=2)
    wrong, moved = [], []
    for seed in range(20):
        a, b = augment(image, label, np.random.default_rng(seed), (64, 64), IDENTITY)
        for counts, colour in ((wrong, a), (moved, np.roll(a, (1, 1), (0, 1)))):
            counts.append(((b != 255) & (np.rint(colour[..., 0] / 60) != b)).sum())
    assert np.median(wrong) <= 64, "at most a pixel along one of the two edges"
    assert np.median(moved) > 128, "one pixel out of place would be seen"


def test_fit_keeps_the_aspect_and_centres():
    image, label, box = fit(np.full((10, 20, 3), 9, np.uint8), (8, 8), np.ones((10, 20), np.uint8))
    assert box == (2, 0, 4, 8)
    assert (label[2:6] == 1).all() and (label[:2] == 255).all() and (label[6:] == 255).all() and (image[3] == 9).all()


def crops(flip_free=False):
    return Crops([Figures(builtin_domain(n), 0, 10, (64, 64), i, 2) for i, n in enumerate(("pascal", "atr"))], None, (64, 64), seed=5)


def test_a_sample_depends_on_its_key_alone():
    one, two = crops(), crops()
    two[(1, 0, 2)]
    a, b = one[(0, 3, 7)], two[(0, 3, 7)]
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not torch.equal(a[0], one[(0, 4, 7)][0]), "another epoch augments anew"


def test_a_batch_has_what_the_network_takes():
    images, labels, domain, names, skipped = collate([crops()[key] for key in ((0, 0, 1), (1, 0, 2))])
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.uint8 and labels.shape == (2, 64, 64)
    assert domain == [0, 1] and all("figure" in name for name in names)


def test_a_broken_file_reaches_the_training_loop_as_its_sentence():
    class Broken:
        domain = LabelDomain("x", ("background", "body"))

        def load(self, i, size=None):
            raise InputError("photo.jpg: broken")

    loader = torch.utils.data.DataLoader(Crops([Broken()], None, (32, 32), 0), batch_sampler=[[(0, 0, 0)]], num_workers=1, collate_fn=collate)
    (batch,) = loader
    assert isinstance(batch, InputError) and str(batch) == "photo.jpg: broken"


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path):
    """A photo of 900x600 for 64x64: read at a quarter, fitted into the same box with the same label, the same picture but for smoothing."""
    big = np.kron(np.random.default_rng(0).integers(0, 255, (18, 12, 3), dtype=np.uint8), np.ones((50, 50, 1), np.uint8))
    Image.fromarray(big).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(np.kron(np.arange(6, dtype=np.uint8).reshape(3, 2), np.ones((300, 300), np.uint8))).save(tmp_path / "a.png")
    photos = Photos(builtin_domain("pascal"), [tmp_path / "a.jpg"], [tmp_path / "a.png"])
    (whole, label), (small, same) = photos.load(0), photos.load(0, (64, 64))
    assert whole.shape == (900, 600, 3) and small.shape == (225, 150, 3) and np.array_equal(label, same)
    one, two = fit(whole, (64, 64), label), fit(small, (64, 64), label)
    assert one[2] == two[2] == (0, 10, 64, 43) and np.array_equal(one[1], two[1])
    assert np.abs(one[0].astype(int) - two[0]).mean() < 3
    Image.fromarray(label[:-1]).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a.png: the label map is 600x899 but its photo .* is 600x900"):
        photos.load(0, (64, 64))
