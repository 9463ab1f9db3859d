"""Drawn figures: one scene, three label maps that must agree pixel by pixel."""

import ast
from pathlib import Path

import numpy as np
import pytest

from figures import COVERS, PARTS, TABLES, Figures, figure
from sst.domains import builtin_domain
from sst.errors import InputError

DOMAINS = ("pascal", "atr", "cihp")


@pytest.fixture(scope="module")
def drawn():
    return [figure(1, i) for i in range(300)]


@pytest.fixture(scope="module")
def some(drawn):
    return drawn[:100]


def is_class(f, name, *wanted):
    """(H, W) bool: where the label map of a label set holds one of the class names."""
    return np.isin(builtin_domain(name).classes, wanted)[f.label(name)]


def is_part(f, *words):
    return np.array([any(word in part for word in words) for part in PARTS])[f.part]


def is_cover(f, *names):
    return np.isin(f.cover, [COVERS.index(name) for name in names])


def test_same_figure_in_any_order():
    first = [figure(3, i) for i in (0, 1, 2)]
    again = [figure(3, i) for i in (2, 1, 0)][::-1]
    for a, b in zip(first, again):
        assert (a.image == b.image).all() and (a.part == b.part).all() and (a.cover == b.cover).all()
    assert (first[0].image != first[1].image).any()
    assert (first[0].part != figure(4, 0).part).any()


@pytest.mark.parametrize("size", [(128, 128), (96, 64), (77, 150)])
def test_shapes_types_and_ids(size):
    for i in range(6):
        f = figure(5, i, size)
        assert f.image.shape == size + (3,) and f.image.dtype == np.uint8
        for array, count in ((f.part, len(PARTS)), (f.cover, len(COVERS))):
            assert array.shape == size and array.dtype == np.uint8 and array.max() < count
        for name in DOMAINS:
            label = f.label(name)
            assert label.shape == size and label.dtype == np.uint8
            assert label.max() < builtin_domain(name).num_classes


def test_size_does_not_change_the_scene():
    small, large = figure(2, 7, (64, 64)), figure(2, 7, (128, 128))
    assert (large.part[1::2, 1::2] == small.part).mean() > .9


def test_head_is_hat_hair_face_and_sunglasses(some):
    names = ("hat", "hair", "face", "sunglasses")
    for f in some:
        head = is_class(f, "pascal", "head")
        assert (head == is_class(f, "cihp", *names)).all()
        # ATR's face also holds the neck and other bare skin of the torso
        skin = is_class(f, "cihp", "torso-skin")
        assert (is_class(f, "atr", *names) == (head | skin)).all()


@pytest.mark.parametrize("limb, words", [("arms", ("arm", "glove")), ("legs", ("leg", "shoe", "socks"))])
def test_limbs_lie_in_limbs(some, limb, words):
    for name in ("cihp", "atr"):
        for wanted in [c for c in builtin_domain(name).classes if c.split()[-1] in words]:
            count = 0
            for f in some:
                here = is_class(f, name, wanted)
                count += here.sum()
                assert is_class(f, "pascal", "upper " + limb, "lower " + limb)[here].all(), (name, wanted)
            assert count > 1000, (name, wanted)


def test_translation_of_covers(drawn):
    rules = {  # cover -> its class in atr and in cihp
        "belt on pants": ("belt", "pants"), "belt on skirt": ("belt", "skirt"),
        "belt on dress": ("belt", "dress"), "belt on coat": ("belt", "coat"),
        "bag": ("bag", "background"), "scarf": ("scarf", "scarf"), "hat": ("hat", "hat"),
        "coat": ("upper-clothes", "coat"), "upper-clothes": ("upper-clothes", "upper-clothes")}
    for cover, expected in rules.items():
        count = 0
        for f in drawn:
            here = is_cover(f, cover)
            count += here.sum()
            for name, want in zip(("atr", "cihp"), expected):
                assert is_class(f, name, want)[here].all(), (cover, name)
        assert count > 100, cover


def test_translation_of_skin_gloves_and_socks(some):
    for side in ("left", "right"):
        for cover, limb, atr_class, cihp_class in (
                ("glove", "lower arm", "arm", "glove"), ("socks", "lower leg", "leg", "socks"),
                ("shoe", "lower leg", "shoe", "shoe"), ("skin", "lower arm", "arm", "arm"),
                ("skin", "upper leg", "leg", "leg")):
            count = 0
            for f in some:
                here = is_cover(f, cover) & is_part(f, f"{side} {limb}")
                count += here.sum()
                assert is_class(f, "atr", f"{side} {atr_class}")[here].all()
                want = cihp_class if cihp_class in ("glove", "socks") else f"{side} {cihp_class}"
                assert is_class(f, "cihp", want)[here].all()
                assert is_class(f, "pascal", limb + "s")[here].all()
            assert count > 300, (side, cover, limb)
    neck = 0
    for f in some:
        here = is_cover(f, "skin") & is_part(f, "torso")
        neck += here.sum()
        assert is_class(f, "atr", "face")[here].all()
        assert is_class(f, "cihp", "torso-skin")[here].all()
        assert is_class(f, "pascal", "torso")[here].all()
    assert neck > 1000


def test_covers_are_worn_where_they_belong(drawn):
    """The tables have an entry for every pair, so a pair that makes no sense must never be drawn."""
    homes = {"hair": ("head",), "hat": ("head",), "sunglasses": ("head",), "glove": ("lower arm",),
             "socks": ("lower leg",), "shoe": ("lower leg",), "scarf": ("torso",),
             "bag": ("background",), "nothing": ("background",),
             "pants": ("torso", "leg"), "skirt": ("torso", "leg"), "dress": ("torso", "arm", "leg"),
             "coat": ("torso", "arm", "leg"), "upper-clothes": ("torso", "arm"),
             "skin": ("head", "torso", "arm", "leg"), "belt on pants": ("torso",),
             "belt on skirt": ("torso",), "belt on dress": ("torso",), "belt on coat": ("torso",)}
    assert set(homes) == set(COVERS)
    for f in drawn:
        for cover in np.unique(f.cover):
            assert is_part(f, *homes[COVERS[cover]])[f.cover == cover].all(), COVERS[cover]


@pytest.mark.parametrize("name", DOMAINS)
def test_every_class_is_frequent(drawn, name):
    domain = builtin_domain(name)
    pixels = np.array([np.bincount(f.label(name).ravel(), minlength=domain.num_classes) for f in drawn])
    seen = (pixels >= 8).mean(0)
    assert (seen >= .05).all(), {c: round(float(s), 3) for c, s in zip(domain.classes, seen)}


def test_views_from_front_and_back(drawn):
    """Left limbs are at image right in a front view, at image left in a back view."""
    views = []
    for f in drawn:
        left, right = (np.nonzero(is_part(f, side + " upper leg"))[1] for side in ("left", "right"))
        if len(left) > 60 and len(right) > 60:
            views.append(left.mean() > right.mean())
    assert .15 < 1 - np.mean(views) < .6


@pytest.mark.parametrize("name", DOMAINS)
def test_mirror(drawn, name):
    """A mirrored scene has the flipped label map with left and right exchanged."""
    swap = builtin_domain(name).flip_index().numpy()
    sided = 0
    for i in range(40):
        label, mirrored = drawn[i].label(name), figure(1, i, mirror=True)
        assert (mirrored.image == drawn[i].image[:, ::-1]).all()
        assert (mirrored.label(name) == swap[label[:, ::-1]]).all()
        sided += (swap[label] != label).sum()
    assert sided > 1000 or name == "pascal"


def test_mirror_swaps_every_part_with_a_side(drawn):
    for f in drawn[:20]:
        mirrored = f.mirrored().part[:, ::-1]
        for limb in ("upper arm", "lower arm", "upper leg", "lower leg"):
            left, right = PARTS.index("left " + limb), PARTS.index("right " + limb)
            assert ((mirrored == left) == (f.part == right)).all()
        assert (f.mirrored().mirrored().part == f.part).all()


def test_dataset():
    train = [Figures(builtin_domain(name), 0, 5, (64, 48), offset=k, stride=3)
             for k, name in enumerate(DOMAINS)]
    names = [data.where(i) for data in train for i in range(len(data))]
    assert len(set(names)) == 15 and "figure 4 of seed 0" in names
    for data in train:
        assert len(data) == 5 and data.domain.name in TABLES
        image, label = data.load(2)
        want = figure(0, int(data.where(2).split()[1]), (64, 48))
        assert (image == want.image).all() and (label == want.label(data.domain.name)).all()


def test_unknown_label_set_is_refused():
    with pytest.raises(InputError, match="lip"):
        Figures(builtin_domain("lip"), 0, 5)


def test_the_library_does_not_need_the_figures():
    for path in sorted((Path(__file__).parent.parent / "sst").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not any(name.split(".")[0] == "figures" for name in names), path.name
