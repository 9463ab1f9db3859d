"""The notebooks' pictures: where classes are put on a body, what a legend and a matrix show."""

import sys
from pathlib import Path

import numpy as np
import torch

from sst.domains import LabelDomain

sys.path.insert(0, str(Path(__file__).parent.parent / "notebooks"))

from pictures import (apart, body_graph, class_places, heat_map, matrices, panel, place_of, sampling_points,
                      shade, timings)

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


def test_a_heat_map_is_dark_where_the_matrix_is_large():
    picture = np.asarray(heat_map(np.array([[0.0, 1.0]]), "two entries")).astype(int).sum(-1)
    middle = picture.shape[0] // 2
    assert picture[middle, 150] > picture[middle, 350]


def test_timings_take_any_number_of_turns():
    assert timings([1, 2], {"a": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]}, "size").size == (560, 360)
