"""Pictures of runs and notebooks: what is shown once, where classes are put on a body, what moves."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sst.domains import LabelDomain, builtin_domain
from sst.plots import save_curves, save_samples

sys.path.insert(0, str(Path(__file__).parent.parent / "notebooks"))

from pictures import (Listing, Moving, apart, body_graph, class_places, diagram, heat_map, matrices, panel,
                      place_of, sampling_points, shade, timings, touch)

DOMAIN = LabelDomain("mine", ("background", "head", "torso", "arms", "hat"),
                     adjacency=(("head", "torso"), ("head", "hat"), ("torso", "arms")))
BODY = np.array([[0, 1, 1, 0, 0],  # a head of two pixels, a torso below it
                 [3, 2, 2, 3, 3],  # an arm of one pixel at the left, of two at the right
                 [0, 2, 2, 0, 0]], np.uint8)


def test_the_place_of_a_class_is_its_mean_or_on_its_larger_half():
    assert place_of(BODY == 1).tolist() == [1.5, 0]
    assert place_of(BODY == 2).tolist() == [1.5, 1.5]
    # The mean (7/3, 1) is torso; the right arm has two of three pixels.
    assert place_of(BODY == 3).tolist() in ([3, 1], [4, 1])


def test_a_class_that_is_not_there_is_put_where_others_have_it():
    other = np.zeros((8, 8), np.uint8)
    other[2:6, 2:6] = 2
    other[2, 2:6] = 4  # a hat over the whole width, in the first of four rows
    places = class_places(BODY, [other], 5)
    # The hat's mean (1.5, 0) of a box of 4 x 4 from (2, 2) is (0.375, 0); BODY's box is 5 x 3 from (0, 0).
    assert np.allclose(places[4], (0.375 * 5, 0)) and np.allclose(places[1], (1.5, 0))
    assert np.isnan(class_places(BODY, [], 5)[4]).all()


def test_names_at_one_place_are_moved_apart_and_stay_in_the_picture():
    moved = apart(np.array([[50.0, 1]] * 4 + [[10.0, 90]]), gap=(20, 10), size=(100, 100))
    distance = np.linalg.norm((moved[:, None] - moved[None]) / (20, 10), axis=-1)[np.triu_indices(5, 1)]
    assert distance.min() > 0.7 and (moved >= 0).all() and (moved <= 100).all()
    assert np.allclose(moved[4], (10, 90), atol=5)  # nobody was near


def test_pictures_are_images_that_a_notebook_shows():
    photo = np.zeros((*BODY.shape, 3), np.uint8)
    for picture in (panel([photo, BODY], ["photo", "labels"], [None, DOMAIN]),
                    body_graph([(DOMAIN, photo, BODY, [])]),
                    matrices([torch.eye(2), np.eye(2)], ["a", "b"], ["x", "y"], ["u", "v"])):
        assert picture.mode == "RGB" and picture._repr_png_().startswith(b"\x89PNG")
    black, white = [0] * 3, [255] * 3
    assert shade([[0, 1], [5, 1]], 0, 1, cmap="gray").tolist() == [[black, white], [white, white]]


def test_sampling_points_are_drawn_where_the_query_looks():
    image = np.full((8, 8, 3), 255, np.uint8)
    reference, weights = torch.tensor([[0.5, 0.5]]), torch.full((1, 1, 1, 1), 0.5)
    left, far = (sampling_points(image, {"q": 0}, reference, torch.full((1, 1, 1, 1, 2), x), weights)
                 for x in (0.25, 9.0))

    def amber(picture):
        """Where it has that colour, without the legend."""
        return (np.abs(np.asarray(picture).astype(int) - (255, 176, 0)).sum(-1) < 60)[:, :250]

    assert amber(left).any() and not amber(far).any()


def test_samples_show_a_photo_once_with_all_domains_that_have_it(tmp_path):
    photo, label = np.full((40, 30, 3), 200, np.uint8), np.zeros((40, 30), np.uint8)
    pascal, atr = builtin_domain("pascal"), builtin_domain("atr")
    other = photo // 2
    same = [(pascal, [(photo, label, label)]), (atr, [(photo, label, label)])]
    apart = [(pascal, [(photo, label, label)]), (atr, [(other, label, label)])]
    sizes = []
    for samples in (same, apart, [(pascal, [])]):
        save_samples(samples, tmp_path / "samples.png")
        sizes.append(Image.open(tmp_path / "samples.png").size)
    assert sizes[0][0] == pytest.approx(sizes[1][0] * 5 / 3, abs=3), "photo and two pictures for each domain"
    assert sizes[0][1] < 0.7 * sizes[1][1], "one row, not two"
    assert min(sizes[2]) > 0, "no photo of the dataset could be read"


@pytest.mark.parametrize("rows", [True, False])
def test_curves_have_a_second_row_where_there_is_sst(tmp_path, rows):
    x = {"atr": {"x0": 0.5}} if rows else {}
    lines = [{"kind": "train", "step": step, "loss": {"seg/atr": 1.0, "total": 2.0}, "cos": x, "centred": x,
              "rank": x} for step in (1, 2)]
    save_curves(lines + [{"kind": "val", "step": 2, "miou": {"atr": 30.0}}], tmp_path / "curves.png")
    width, height = Image.open(tmp_path / "curves.png").size
    assert height == (700 if rows else 350) and width == 1500


def test_the_shares_of_the_gradient_are_drawn(tmp_path):
    lines = [{"kind": "train", "step": step, "loss": {"seg/atr": 1.0}, "cos": {}} for step in (1, 2)]
    measured = [{"kind": "gradient", "step": step, "shares": {"seg": 0.7, "aux": 0.3}} for step in (1, 2)]
    for name, content in (("without", lines), ("with", lines + measured)):
        save_curves(content, tmp_path / f"{name}.png")
    one, two = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
                for name in ("without", "with"))
    assert np.abs(one - two)[:, 500:1000].max() > 100, "in the second panel of three"


def test_a_moving_picture_is_a_png_that_plays():
    frames = [Image.new("RGB", (20, 9), (40 * k, 0, 0)) for k in range(4)]
    played = Image.open(io.BytesIO(Moving(frames, 100)._repr_png_()))
    assert played.format == "PNG" and played.n_frames == 4 and played.size == (20, 9)
    played.seek(3)
    assert played.convert("RGB").getpixel((0, 0)) == (120, 0, 0) and played.info["duration"] == 2000


def test_a_control_is_a_strip_of_pictures_where_no_server_is():
    def draw(red, mask):
        return Image.new("RGB", (10, 6 if mask else 8), (red, 0, 255 * mask))

    strip = touch(draw, columns=2, red=[10, 20], mask=[False, True])
    assert strip.size == (20, 16)
    assert strip.getpixel((0, 0)) == (10, 0, 0) and strip.getpixel((10, 0)) == (10, 0, 255)
    assert strip.getpixel((0, 8)) == (20, 0, 0) and strip.getpixel((19, 7)) == (255, 255, 255)


def test_a_control_is_a_widget_where_a_server_shows_it(monkeypatch):
    made = []
    shell = SimpleNamespace(kernel=None)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    widgets = SimpleNamespace(interact=lambda draw, **choices: made.append((draw, choices)) or draw)
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    assert touch(shade, low=[0, 1]) is None and made == [(shade, {"low": [0, 1]})]
    del shell.kernel  # IPython in a terminal
    assert touch(lambda low: Image.new("RGB", (3, 3)), low=[0, 1]).size == (6, 3)


def test_a_listing_is_source_in_colours():
    listing = Listing(Moving._repr_png_, place_of)
    assert listing._repr_markdown_().startswith("```python\ndef _repr_png_(self):\n    durations")
    assert "def place_of(region):" in repr(listing) and listing._repr_markdown_().endswith("\n```")


def test_a_diagram_joins_its_boxes():
    boxes = {"a": (0.1, 0.1, 0.5, 0.5, "one", True), "b": (1.3, 0.1, 0.5, 0.5, "two", False)}
    apart = np.asarray(diagram(boxes, [], (2, 0.8)))
    joined = np.asarray(diagram(boxes, [("a", "b", "")], (2, 0.8)))
    changed = np.nonzero((apart != joined).any((0, 2)))[0]
    assert 55 < changed.min() and changed.max() < 135, "only between them"


def test_a_heat_map_is_dark_where_the_matrix_is_large():
    picture = np.asarray(heat_map(np.array([[0.0, 1.0]]), "two entries")).astype(int).sum(-1)
    middle = picture.shape[0] // 2
    assert picture[middle, 150] > picture[middle, 350]


def test_timings_take_any_number_of_turns():
    assert timings([1, 2], {"a": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]}, "size").size == (560, 360)
