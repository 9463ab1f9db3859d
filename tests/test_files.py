"""The pixels of one file: colour modes, EXIF, JPEGs decoded at a part of their size, and fitting."""

import numpy as np
import pytest
from PIL import Image
from test_predict import photo

from sst.data import Photos
from sst.domains import builtin_domain
from sst.errors import InputError
from sst.files import fit, pixels, read_image


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16", "1", "LA"])
def test_photos_of_every_colour_mode_become_rgb(tmp_path, mode):
    grey = np.full((4, 6), 200, np.uint8)
    if mode == "I;16":
        image, path = Image.fromarray(grey.astype(np.uint16) * 257), tmp_path / "x.png"
    else:
        image = Image.fromarray(grey).convert(mode)
        path = tmp_path / ("x.jpg" if mode in ("L", "CMYK") else "x.png")
    image.save(path)
    pixels, size, turn = read_image(path)
    assert size == (4, 6) and turn == 1
    assert pixels.shape == (4, 6, 3) and pixels.dtype == np.uint8
    difference = abs(pixels.astype(int) - (255 if mode == "1" else 200)).max()
    assert difference <= (60 if mode == "P" else 2) or mode == "1"


@pytest.mark.parametrize("orientation, turned", [
    (1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (4, np.flipud),
    (5, lambda a: a.swapaxes(0, 1)), (6, lambda a: np.rot90(a, -1)),
    (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)), (8, np.rot90), (9, lambda a: a)])
def test_exif_rotation_is_carried_out(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.tif"):
        Image.fromarray(photo(30, 50)).save(tmp_path / name, exif=exif)
        for image in (tmp_path / name, Image.open(tmp_path / name)):
            assert np.array_equal(pixels(image), turned(photo(30, 50)))
    Image.fromarray(photo(30, 50)).save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - turned(photo(30, 50))).max() < 20


def test_exif_nonsense_does_not_matter(tmp_path):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", 6
    nonsense = bytearray(exif.tobytes())
    nonsense[17] = 3  # the maker's name as whole numbers
    Image.fromarray(photo(30, 50)).save(tmp_path / "a.jpg", exif=bytes(nonsense))
    assert pixels(tmp_path / "a.jpg").shape == (50, 30, 3)


def test_fit_keeps_the_aspect_and_centres():
    image, label, box = fit(np.full((10, 20, 3), 9, np.uint8), (8, 8), np.ones((10, 20), np.uint8))
    assert box == (2, 0, 4, 8)
    assert (label[2:6] == 1).all() and (label[:2] == 255).all() and (label[6:] == 255).all()
    assert (image[3] == 9).all()


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path):
    """A photo of 900x600 for 64x64: read at a quarter, fitted into the same box with the same label.

    It is the same picture but for smoothing.
    """
    big = np.random.default_rng(0).integers(0, 255, (18, 12, 3), dtype=np.uint8)
    big = np.kron(big, np.ones((50, 50, 1), np.uint8))
    Image.fromarray(big).save(tmp_path / "a.jpg", quality=95)
    label = np.kron(np.arange(6, dtype=np.uint8).reshape(3, 2), np.ones((300, 300), np.uint8))
    Image.fromarray(label).save(tmp_path / "a.png")
    photos = Photos(builtin_domain("pascal"), [tmp_path / "a.jpg"], [tmp_path / "a.png"])
    (whole, label), (small, same) = photos.load(0), photos.load(0, (64, 64))
    assert whole.shape == (900, 600, 3) and small.shape == (225, 150, 3) and np.array_equal(label, same)
    one, two = fit(whole, (64, 64), label), fit(small, (64, 64), label)
    assert one[2] == two[2] == (0, 10, 64, 43) and np.array_equal(one[1], two[1])
    assert np.abs(one[0].astype(int) - two[0]).mean() < 3
    Image.fromarray(label[:-1]).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a.png: the label map is 600x899 but its photo .* is 600x900"):
        photos.load(0, (64, 64))
