"""Label domains: the published ids, the priors, and what is refused."""

import json

import numpy as np
import pytest
import torch

from sst.domains import (
    BUILTIN, HERE, LabelDomain, builtin_domain, from_dict, read_masks, vocabulary, word_similarity)
from sst.errors import InputError

GOOD = {"name": "mine", "classes": ["background", "left hand", "right hand", "hat"],
        "flip_pairs": [["left hand", "right hand"]], "adjacency": [["hat", "left hand"]]}


def test_builtin_domains_have_the_published_ids():
    assert {name: builtin_domain(name).num_classes for name in BUILTIN} == {
        "pascal": 7, "atr": 18, "cihp": 20, "lip": 20, "ccp-coarse": 7, "ccp-common": 13, "ccp-middle": 13,
        "ccp-fine": 27}
    assert builtin_domain("pascal").classes == (
        "background", "head", "torso", "upper arms", "lower arms", "upper legs", "lower legs")
    atr, cihp, lip = builtin_domain("atr"), builtin_domain("cihp"), builtin_domain("lip")
    assert [atr.index(c) for c in ("hat", "belt", "left shoe", "right arm", "scarf")] == [1, 8, 9, 15, 17]
    assert [cihp.index(c) for c in ("glove", "torso-skin", "left arm", "right shoe")] == [3, 10, 14, 19]
    assert [c for c in zip(cihp.classes, lip.classes) if c[0] != c[1]] == [("torso-skin", "jumpsuits")]


@pytest.mark.parametrize("name", BUILTIN)
def test_intra_mask_is_a_symmetric_sparse_graph_of_the_body(name):
    domain = builtin_domain(name)
    mask = domain.intra_mask()
    assert torch.equal(mask, mask.T) and torch.equal(mask.diagonal(), torch.ones(domain.num_classes))
    assert mask[0].sum() == 1, "background touches only itself"
    assert (mask[1:].sum(1) >= 2).all(), "a part that touches nothing"
    off = mask.sum() - domain.num_classes
    assert off / (domain.num_classes * (domain.num_classes - 1)) < 0.75
    for left, right in domain.flip_pairs:  # contact of the two sides is a pose's, not the body's
        assert mask[domain.index(left), domain.index(right)] == 0


@pytest.mark.parametrize("name", BUILTIN)
def test_adjacency_is_the_same_in_a_mirror(name):
    domain = builtin_domain(name)
    flip = domain.flip_index()
    assert torch.equal(domain.intra_mask(), domain.intra_mask()[flip][:, flip])


def test_limbs_touch_on_their_own_side_only():
    cihp = builtin_domain("cihp")
    touch = lambda a, b: bool(cihp.intra_mask()[cihp.index(a), cihp.index(b)])
    assert touch("left leg", "left shoe") and not touch("left leg", "right shoe")
    assert touch("pants", "left shoe") and touch("pants", "right shoe")
    assert touch("face", "hair") and touch("face", "torso-skin") and not touch("hat", "pants")
    atr = builtin_domain("atr")
    assert all(atr.intra_mask()[atr.index("bag"), atr.index(side + " arm")] for side in ("left", "right"))


def test_flip_index_is_its_own_inverse():
    for name in BUILTIN:
        flip = builtin_domain(name).flip_index()
        assert torch.equal(flip[flip], torch.arange(len(flip)))
    assert builtin_domain("atr").flip_index().tolist() == [
        0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 9, 11, 13, 12, 15, 14, 16, 17]


def test_palette_tells_all_classes_apart_and_relates_domains():
    for name in BUILTIN:
        palette = builtin_domain(name).palette()
        assert palette.dtype == np.uint8 and len({tuple(c) for c in palette.tolist()}) == len(palette)
    pascal, cihp = builtin_domain("pascal"), builtin_domain("cihp")
    assert (pascal.palette()[pascal.index("torso")] == cihp.palette()[cihp.index("upper-clothes")]).all()


# What the colour-blind see of linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
VISION = {
    "normal": np.eye(3),
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]}


def lab(rgb, vision):
    """(..., 3) uint8 sRGB -> CIELAB (D65) as that vision sees it."""
    rgb = rgb / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.transpose(VISION[vision]), 0, 1)
    to_xyz = np.transpose([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    xyz = linear @ to_xyz / (0.9505, 1, 1.0888)
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def test_lab_of_known_colours():
    white_black_red = lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]]), "normal")
    assert np.allclose(white_black_red, [[100, 0, 0], [0, 0, 0], [53.2, 80.1, 67.2]], atol=0.3)
    red, green = lab(np.array([[200, 60, 0], [110, 110, 0]]), "deuteranopia")
    assert np.linalg.norm(red - green) < 15  # a brick red and an olive


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("name", BUILTIN)
def test_palette_parts_classes_that_touch_also_for_the_colour_blind(name, vision):
    domain = builtin_domain(name)
    seen = lab(domain.palette(), vision)
    distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)  # below 2 is hardly seen, 10 at a glance
    touch = domain.intra_mask().numpy() > 0
    touch[0] = touch[:, 0] = True  # every part lies somewhere before the background
    np.fill_diagonal(touch, False)
    a, b = np.unravel_index(np.where(touch, distance, np.inf).argmin(), distance.shape)
    assert distance[a, b] > 18, f"{domain.classes[a]} and {domain.classes[b]}"


def test_palette_of_synonyms_and_unknown_names():
    names = ("background", "glasses", "sunglasses", "hat", "headwear", "Left-Shoe", "shoes",
             *(f"thing {i}" for i in range(60)))
    palette = LabelDomain("mine", names).palette().tolist()
    assert len({tuple(c) for c in palette}) == len(names)
    assert palette[5] == builtin_domain("cihp").palette()[18].tolist()  # left shoe, however it is written


def test_clothing_co_parsing_lists_are_disjoint():
    folder = HERE / "builtin"
    ids = {g: (folder / f"ccp-{g}_train_id.txt").read_text().split() for g in ("coarse", "middle", "fine")}
    ids["val"] = (folder / "ccp_val_id.txt").read_text().split()
    sizes = {name: len(part) for name, part in ids.items()}
    assert sizes == {"coarse": 267, "middle": 267, "fine": 266, "val": 104}
    assert len({id for part in ids.values() for id in part}) == 904


def test_word_similarity_of_known_words():
    cihp, pascal = builtin_domain("cihp"), builtin_domain("pascal")
    M = word_similarity(cihp, pascal)
    assert M.shape == (20, 7) and M.abs().max() <= 1 + 1e-5
    assert torch.allclose(word_similarity(cihp, cihp).diagonal(), torch.ones(20), atol=1e-5)
    assert torch.allclose(M.T, word_similarity(pascal, cihp))
    assert M[0, 0] == pytest.approx(1, abs=1e-5) and M[0].argmax() == 0
    same, left_arm = word_similarity(cihp, builtin_domain("lip")), cihp.index("left arm")
    assert same[left_arm, cihp.index("right arm")] > same[left_arm, cihp.index("hat")]


def test_vocabulary_covers_every_builtin_class_and_raw_tag_in_300_KB():
    assert (HERE / "label_vectors.npz").stat().st_size < 300_000 and len(vocabulary()) >= 150
    for name in BUILTIN:
        word_similarity(builtin_domain(name), builtin_domain(name))
    tags = [tag.replace("-", " ") for tags in builtin_domain("ccp-fine").label_map.values() for tag in tags]
    assert len(tags) == 59 and all(tag in vocabulary() for tag in tags)


def test_a_word_without_vector_is_named_with_the_fix():
    with pytest.raises(InputError, match="class 'qwertz' has no word vector; name a word .*--lam 0"):
        word_similarity(LabelDomain("x", ("background", "qwertz")), builtin_domain("pascal"))


def test_a_domain_survives_json():
    domain = from_dict(GOOD)
    assert from_dict(json.loads(json.dumps(domain.to_dict()))) == domain
    assert domain.intra_mask().tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 1, 0, 1]]


def test_a_domain_without_adjacency_says_what_to_do():
    with pytest.raises(InputError, match="--intra-mask none"):
        from_dict({"name": "mine", "classes": ["background", "body"]}).intra_mask()


@pytest.mark.parametrize("change, message", [
    ({"classes": ["background", "hat", "hat"]}, "class 'hat' is listed twice"),
    ({"classes": ["background"]}, "1 classes; a domain has 2 to 255"),
    ({"classes": ["background"] + [f"c{i}" for i in range(255)]}, "256 classes"),
    ({"classes": "background"}, "must be a list"),
    ({"classes": ["background", 3]}, "3 is no class name"),
    ({"classes": ["background", "hat\x1b[31m"]}, "'hat\\x1b[31m' is no class name; classes are non-empty"),
    ({"classes": ["background", "hat\nshoe"]}, "'hat\\nshoe' is no class name"),
    ({"name": "my domain"}, "use letters, digits"),
    ({"name": None}, "use letters, digits"),
    ({"flip_pairs": [["left hand", "left foot"]]},
     "names 'left foot', which is not a class; classes are background, left hand"),
    ({"flip_pairs": [["left hand", "right hand"], ["hat", "left hand"]]}, "'left hand' is in two flip_pairs"),
    ({"flip_pairs": [["hat"]]}, "every entry is a pair"),
    ({"flip_pairs": ["ab"]}, "every entry is a pair"),
    ({"adjacency": [["hat", "hat"]]}, "pairs 'hat' with itself"),
    ({"adjacency": [["hat", "shoe"]]}, "names 'shoe'"),
    ({"adjacency": 3}, "must be a list"),
    ({"label_map": {"hat": [1]}}, "label_map lacks class 'background'"),
    ({"label_map": {"background": [0], "left hand": [1], "right hand": [1], "hat": [2]}},
     "raw label 1 is listed twice, in class 'left hand' and in class 'right"),
    ({"label_map": {"background": [256], "left hand": [1], "right hand": [3], "hat": [2]}},
     "neither a tag name nor an integer from 0 to 255"),
    ({"colours": {"background": [0, 0, 0]}}, "colours lacks class 'left hand'"),
    ({"colours": {"background": [0, 0, 0], "left hand": [1, 1, 256], "right hand": [2, 2, 2],
                  "hat": [3, 3, 3]}}, "the colour of 'left hand' is [1, 1, 256]; write"),
    ({"colours": {"background": [0, 0, 0], "left hand": [1, 1, 1], "right hand": [1, 1, 1],
                  "hat": [3, 3, 3]}}, "'right hand' has the colour of 'left hand'"),
    ({"colours": {"background": [0, 0, 0]}, "label_map": {"background": [0], "left hand": [1],
                                                          "right hand": [3], "hat": [2]}},
     "holds label_map and colours; labels are numbers or colours"),
    ({"aliases": {"mitten": "glove"}}, "aliases names 'mitten', which is not a class"),
    ({"aliases": {"hat": "qwertz"}}, "the alias of 'hat' is 'qwertz', which has no word vector"),
    ({"label_map": {"background": [True], "left hand": [1], "right hand": [3], "hat": [2]}},
     "neither a tag name nor an integer"),
    ({"label_map": {"background": ["null"], "left hand": [1], "right hand": [], "hat": []}},
     "mixes tag names and integers"),
    ({"label_map": {"background": 0, "left hand": [1], "right hand": [3], "hat": [2]}},
     "must map every class to a list"),
    ({"label_map": {"head": [1]}}, "names 'head', which is not a class"),
    ({"label_map": {"background": [0], "left hand": [1, 1], "right hand": [], "hat": [2]}},
     "raw label 1 is listed twice"),
    ({"flip_pairs": [["background", "hat"]]}, "the background 'background' (id 0), which has no side"),
    ({"name": "train"}, "'train' is a word that PyTorch keeps for itself"),
    ({"images": 3}, "'images' is 3; it must be a path"),
    ({"flippairs": []}, "unknown key 'flippairs'; known are name, classes"),
])
def test_a_domain_that_contradicts_itself_is_refused_in_one_sentence(change, message):
    with pytest.raises(InputError) as caught:
        from_dict(GOOD | change, "somewhere/domain.json")
    sentence = str(caught.value)
    assert message in sentence and sentence.startswith("somewhere/domain.json: ") and "\n" not in sentence


def test_unknown_builtin_name_lists_the_known():
    with pytest.raises(InputError, match="unknown label domain 'coco'; built in are atr, ccp-coarse"):
        builtin_domain("coco")


# Matrices of one's own --------------------------------------------------------------------------------------

A = LabelDomain("a", ("background", "head"))
B = LabelDomain("b", ("background", "hat", "face"))


def test_matrices_are_read_by_name(tmp_path):
    file = tmp_path / "masks.json"
    file.write_text(json.dumps({"intra": {"b": [[1, 0, 0], [0, 1, 1], [0, 1, 1]]},
                                "static": {"a:b": [[1, 0], [0, .5], [0, .5]]}}))
    intra, static = read_masks(file, [A, B])
    assert intra["b"].tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]] and list(intra) == ["b"]
    assert static["a", "b"].tolist() == [[1, 0], [0, .5], [0, .5]]
    assert read_masks(file, [B], others=["a"])[1] == {}, "a's classes are not known here"
    file.write_text("{}")
    assert read_masks(file, [A, B]) == ({}, {})


@pytest.mark.parametrize("fields, message", [
    ([1], "masks.json: found list; write"),
    ({"dynamic": {}}, "holds 'dynamic'; it may hold two objects"),
    ({"intra": [[1]]}, "holds 'intra'; it may hold two objects"),
    ({"intra": {"c": [[1]]}}, "intra names 'c'; the run's label domains are a, b"),
    ({"intra": {"a": [[1, 0]]}}, "intra of 'a': shape 1 x 2; write 2 rows of 2 numbers"),
    ({"intra": {"a": [[1, 0], [1]]}}, "intra of 'a': no matrix of finite numbers; write 2 rows of 2 numbers"),
    ({"intra": {"a": [[1, .5], [0, 1]]}}, "intra of 'a' holds 0.5; M_intra holds 0 and 1 only"),
    ({"static": {"a": [[1]]}},
     "static names 'a'; write NAME_1:NAME_2 with two of the run's label domains, a, b"),
    ({"static": {"a:a": [[1, 0], [0, 1]]}}, "static names 'a:a'; write NAME_1:NAME_2"),
    ({"static": {"a:c": [[1, 0]]}}, "static names 'a:c'; write NAME_1:NAME_2"),
    ({"static": {"a:b": [[1, 0, 0], [0, 1, 1]]}}, "static of 'a:b': shape 2 x 3; write 3 rows of 2 numbers"),
    ({"static": {"a:b": [[1, 0], [0, 1], [0, float("nan")]]}},
     "static of 'a:b': no matrix of finite numbers"),
    ({"static": {"a:b": [[1, 0]] * 3, "b:a": [[1, 0, 0]] * 2}}, "static holds both a:b and b:a; keep one"),
])
def test_one_sentence_for_matrices_that_do_not_fit(tmp_path, fields, message):
    file = tmp_path / "masks.json"
    file.write_text(json.dumps(fields))
    with pytest.raises(InputError) as caught:
        read_masks(file, [A, B])
    assert message in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_one_sentence_for_a_file_that_is_missing_or_no_json(tmp_path):
    for file in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match="not readable as JSON"):
            read_masks(file, [A, B])
