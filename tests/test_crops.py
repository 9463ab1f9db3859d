"""The order of samples and the augmentation: functions of the seed, and flips that keep left and right."""

from collections import Counter

import numpy as np
import pytest
import torch

from sst.crops import Crops, Schedule, augment, collate, flip_table
from sst.domains import LabelDomain, builtin_domain
from sst.errors import InputError
from figures import Figures


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
    message = "--batch-size 2: every micro-batch needs an image of each of the 3 label domains; use 3 or more"
    with pytest.raises(InputError, match=message):
        Schedule([5, 5, 5], 2, 0)


def test_equal_slots_read_what_they_always_read():
    """A run that began with an earlier version goes on with the same samples."""
    schedule = Schedule([5, 7, 11], 4, 3)
    assert [schedule[m] for m in range(3)] == [[(0, 0, 4), (0, 0, 2), (1, 0, 2), (2, 0, 7)],
                                               [(0, 0, 1), (1, 0, 1), (1, 0, 4), (2, 0, 0)],
                                               [(0, 0, 3), (1, 0, 0), (2, 0, 1), (2, 0, 4)]]


UNEVEN = [2, 7, 13]  # an epoch of 22 samples


def mixed(B, seed, start, end):
    """The keys of micro-batches start .. end - 1 with proportional slots, one after the other."""
    schedule = Schedule(UNEVEN, B, seed, "proportional")
    return [key for m in range(start, end) for key in schedule[m]]


@pytest.mark.parametrize("B", [1, 2, 4, 50])
def test_proportional_slots_read_every_sample_of_every_domain_once_an_epoch(B):
    end = -(-66 // B)  # three epochs
    keys = mixed(B, 3, 0, end)
    assert len(keys) == end * B
    for epoch in range(3):
        read = sorted((d, index) for d, e, index in keys if e == epoch)
        assert read == [(d, index) for d, size in enumerate(UNEVEN) for index in range(size)]
    for m in range(end):
        first, last = m * B // 22, (m * B + B - 1) // 22
        assert {epoch for _, epoch, _ in mixed(B, 3, m, m + 1)} == set(range(first, last + 1))


def test_proportional_slots_mix_the_domains_anew_in_every_epoch():
    first, second, other = ([(d, index) for d, _, index in keys]
                            for keys in (mixed(1, 3, 0, 22), mixed(1, 3, 22, 44), mixed(1, 4, 0, 22)))
    assert first != second and first != other and first != sorted(first)
    domains = [{d for d, _, _ in mixed(4, 3, m, m + 1)} for m in range(5)]
    assert {0, 1, 2} in domains and {1, 2} in domains, "a micro-batch may lack a domain"


@pytest.mark.parametrize("B", [3, 8, 30])
def test_a_proportional_micro_batch_is_sorted_and_does_not_depend_on_what_was_read_before(B):
    schedule = Schedule(UNEVEN, B, 1, "proportional")
    in_order = [schedule[m] for m in range(40)]
    for m in (37, 5):
        assert Schedule(UNEVEN, B, 1, "proportional")[m] == in_order[m]
    for keys in in_order:
        domains = [d for d, _, _ in keys]
        assert domains == sorted(domains) and len(keys) == B


@pytest.mark.parametrize("slots", ["equal", "proportional"])
def test_passes_are_what_has_been_counted(slots):
    schedule, counts = Schedule(UNEVEN, 5, 2, slots), Counter()
    for m in range(40):
        assert schedule.passes(m) == [counts[d] / size for d, size in enumerate(UNEVEN)]
        counts.update(d for d, _, _ in schedule[m])


def test_slots_that_are_unknown():
    with pytest.raises(ValueError, match="slots is 'fair'; it is one of equal, proportional"):
        Schedule(UNEVEN, 4, 0, "fair")


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


# Label and red channel of a crop of 4 x 4 out of 5 x 6 pixels, and the next random number, for three seeds.
FIXED = [
    ([[8, 8, 7, 7], [14, 14, 13, 13], [20, 20, 19, 19], [20, 20, 19, 19]],
     [[82, 77, 71, 66], [116, 111, 105, 100], [150, 145, 139, 134], [185, 180, 174, 169]],
     0.016527635528529094),
    ([[17, 16, 16, 15], [17, 16, 16, 15], [23, 22, 22, 21], [29, 28, 28, 27]],
     [[116, 111, 105, 99], [156, 151, 145, 139], [196, 191, 185, 179], [232, 227, 221, 215]],
     0.9486494471372439),
    ([[0, 1, 3, 4], [6, 7, 9, 10], [18, 19, 21, 22], [24, 25, 27, 28]],
     [[14, 23, 32, 41], [70, 79, 88, 97], [126, 135, 144, 153], [182, 191, 200, 209]],
     0.0919159421350969),
]


@pytest.mark.parametrize("seed", range(3))
def test_a_common_factor_gives_the_crops_that_it_always_gave(seed):
    """A run that began with an earlier version goes on with the same crops."""
    label = np.arange(30, dtype=np.uint8).reshape(5, 6)
    image, rng = np.repeat((label * 8)[..., None], 3, axis=2), np.random.default_rng(seed)
    image, label = augment(image, label, rng, (4, 4), SWAP, resize="common")
    assert (label.tolist(), image[..., 0].tolist(), rng.random()) == FIXED[seed]


class TwoFactors(Fixed):
    """Scales by one factor after the other."""

    def uniform(self, low, high):
        return self.scale.pop(0)


def test_independent_factors_are_of_height_and_width():
    whole = picture()[1].repeat(2, 0)  # 6 x 4
    image, label = augment(*picture(), TwoFactors([2.0, 1.0], False), (6, 4), IDENTITY, resize="independent")
    assert (label == whole).all() and (image[::5] == picture()[0][[0, 2]]).all()
    _, label = augment(*picture(), TwoFactors([1.0, 2.0], False), (3, 8), IDENTITY, resize="independent")
    assert (label == picture()[1].repeat(2, 1)).all()
    factors = [2.0, 1.0]
    _, label = augment(*picture(), TwoFactors(factors, False), (6, 8), IDENTITY)
    assert (label == whole.repeat(2, 1)).all() and factors == [1.0], "a common factor is drawn once"


def test_independent_factors_are_drawn_from_the_range_for_each_side():
    """A photo in a crop that it never fills, whose padding is ignored, shows both factors."""
    image, sides = np.zeros((40, 50, 3), np.uint8), []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        _, label = augment(image, image[..., 0], rng, (120, 120), IDENTITY, resize="independent")
        sides.append([(label == 0).any(1).sum() / 40, (label == 0).any(0).sum() / 50])
    height, width = np.array(sides).T
    for factor in (height, width):
        assert 0.5 <= factor.min() < 0.55 and 1.95 < factor.max() <= 2 and abs(factor.mean() - 1.25) < 0.1
    assert abs(np.corrcoef(height, width)[0, 1]) < 0.2


def test_a_resize_that_is_unknown():
    with pytest.raises(ValueError, match="resize is 'both'; it is one of common, independent"):
        augment(*picture(), Fixed(1.0, False), (3, 4), IDENTITY, resize="both")


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


def crops(**options):
    domains = [builtin_domain(name) for name in ("pascal", "atr")]
    figures = [Figures(domain, 0, 10, (64, 64), i, 2) for i, domain in enumerate(domains)]
    return Crops(figures, None, (64, 64), seed=5, **options)


def test_a_sample_depends_on_its_key_alone():
    one, two = crops(), crops()
    two[(1, 0, 2)]
    a, b = one[(0, 3, 7)], two[(0, 3, 7)]
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not torch.equal(a[0], one[(0, 4, 7)][0]), "another epoch augments anew"


def test_crops_are_resized_as_asked():
    key = (0, 3, 7)
    same, independent = crops(resize="common")[key], crops(resize="independent")[key]
    assert torch.equal(crops()[key][1], same[1]) and not torch.equal(same[1], independent[1])
    image, label = augment(*crops().datasets[0].load(7), np.random.default_rng((5, *key)), (64, 64),
                           flip_table(builtin_domain("pascal")), resize="independent")
    assert np.array_equal(independent[0].permute(1, 2, 0), image) and np.array_equal(independent[1], label)


def test_a_batch_has_what_the_network_takes():
    images, labels, domain, names, skipped = collate([crops()[key] for key in ((0, 0, 1), (1, 0, 2))])
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.uint8 and labels.shape == (2, 64, 64)
    assert domain == ["pascal", "atr"] and all("figure" in name for name in names)


def test_a_broken_file_reaches_the_training_loop_as_its_sentence():
    class Broken:
        domain = LabelDomain("x", ("background", "body"))

        def load(self, i, size=None):
            raise InputError("photo.jpg: broken")

    loader = torch.utils.data.DataLoader(Crops([Broken()], None, (32, 32), 0), batch_sampler=[[(0, 0, 0)]],
                                         num_workers=1, collate_fn=collate)
    (batch,) = loader
    assert isinstance(batch, InputError) and str(batch) == "photo.jpg: broken"
