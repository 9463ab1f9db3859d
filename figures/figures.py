"""Pictures of drawn people, their label maps, and a dataset of them.

`figure(seed, index)` draws one to three clothed people before a cluttered background and keeps, for every
pixel, the body part and what covers it. A label set is a table over those two, so one picture has an exact
label map in each of PASCAL-Person-Part, ATR and CIHP.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from sst.domains import builtin_domain
from sst.errors import InputError

from .drawing import (COVERS, GRADIENT, PARTS, Canvas, box, disc, dye, fabric, muted, pick, plain, smooth,
                      turned, uniform)
from .person import Person

LIMBS = {"upper arm": "arm", "lower arm": "arm", "upper leg": "leg", "lower leg": "leg"}


# --- translation: (part, cover) -> class name ----------------------------------------------------

def side_and_limb(part):
    """("left", "upper arm") of "left upper arm"; ("", part) of parts without a side."""
    side, _, rest = part.partition(" ")
    return (side, rest) if rest else ("", part)


def pascal(part, cover):
    """Body parts, whatever covers them: hair and hats are head, a sleeve is arm, a shoe lower leg."""
    side, limb = side_and_limb(part)
    return limb + "s" if side else part  # a bag has no part, so it is background


def clothes(part, cover, torso_skin):
    """What ATR and CIHP agree on: garments by name, bare skin by the limb, shoes by the foot."""
    side, limb = side_and_limb(part)
    if cover == "nothing":
        return "background"
    if cover == "shoe":
        return (side or "left") + " shoe"  # only lower legs wear shoes
    if cover != "skin":
        return cover
    if side:
        return f"{side} {LIMBS[limb]}"
    return {"head": "face", "torso": torso_skin, "background": "background"}[part]


def atr(part, cover):
    """ATR has no class for gloves, socks and coats, and none for bare skin but face, arms and legs:
    the neck and a bare torso are face, the only class left that means skin."""
    cover = {"glove": "skin", "socks": "skin", "coat": "upper-clothes"}.get(cover, cover)
    return "belt" if cover.startswith("belt on ") else clothes(part, cover, "face")


def cihp(part, cover):
    """CIHP has no belt (it is the garment it is worn on) and no bag (it is background)."""
    cover = cover.removeprefix("belt on ")
    return "background" if cover == "bag" else clothes(part, cover, "torso-skin")


def label_table(domain, rule):
    """(parts, covers) uint8: the class id of every combination, by a rule over their names."""
    return np.array([[domain.index(rule(part, cover)) for cover in COVERS] for part in PARTS], np.uint8)


TABLES = {rule.__name__: label_table(builtin_domain(rule.__name__), rule) for rule in (pascal, atr, cihp)}


# --- pictures ------------------------------------------------------------------------------------

@dataclass
class Figure:
    """One picture: image (H, W, 3) uint8 RGB; part and cover (H, W) uint8, indices into PARTS and COVERS."""

    image: np.ndarray
    part: np.ndarray
    cover: np.ndarray

    def label(self, name):
        """(H, W) uint8 class ids of the label set `name`, a key of TABLES."""
        return TABLES[name][self.part, self.cover]

    def mirrored(self):
        """The same scene in a mirror, where every left limb is a right limb."""
        swap = np.array([PARTS.index(other_side(name)) for name in PARTS], np.uint8)
        return Figure(self.image[:, ::-1].copy(), swap[self.part[:, ::-1]], self.cover[:, ::-1].copy())


def other_side(name):
    """"right upper arm" of "left upper arm"; parts without a side stay."""
    side, rest = side_and_limb(name)
    return {"": "", "left": "right ", "right": "left "}[side] + rest


def figure(seed, index, size=(128, 128), mirror=False):
    """Figure number `index` of a seed, the same in any order and process. size: (height, width) in pixels."""
    rng = np.random.default_rng((seed, index))
    canvas = Canvas(size, pick(rng, (-1, 1)))
    people = crowd(canvas, rng, size[1] / size[0])
    background(canvas, rng, size[1] / size[0], people)
    for person in people:
        person.draw()
    foreground(canvas, rng, size[1] / size[0], people)
    image, part, cover = canvas.render()
    drawn = Figure(photograph(image, rng), part, cover)
    return drawn.mirrored() if mirror else drawn


def crowd(canvas, rng, aspect):
    """One to three people, the farthest first: whole, or cut by the picture's edge."""
    count = 1 + (rng.random() < .38) + (rng.random() < .12)
    close = uniform(rng, 1.25, 2.0) if rng.random() < .27 else 1
    people = []
    for k in range(count):
        person = Person(canvas, rng, close * uniform(rng, .76, .95) * (1 if count == 1 else .92))
        crown, ankle = person.top_and_bottom()
        if close > 1 and rng.random() < .8:  # close up: the legs leave the picture
            y = uniform(rng, .02, .12) - crown
        elif close > 1:                      # or the head does
            y = uniform(rng, .9, 1.0) - ankle
        else:
            y = uniform(rng, .5, .62) - .5 * (crown + ankle) - .05
        x = aspect * ((k + .5) / count + uniform(rng, -.16, .16) / count ** .5)
        person.place(complex(x, y))
        people.append(person)
    if rng.random() < .5:
        people.reverse()
    return people


def background(canvas, rng, aspect, people):
    """A wall, a floor, and clutter in the very colours of the people; what they sit on, and their shadows."""
    wall_and_floor(canvas, rng, aspect)
    worn = [cloth for p in people for cloth in (p.skin, p.hair, p.top, p.bottom, p.bag_cloth)]
    for _ in range(int(uniform(rng, 4, 12))):
        cloth = pick(rng, worn) if rng.random() < .7 else plain(dye(rng))
        clutter(canvas, rng, complex(uniform(rng, 0, aspect), uniform(rng, 0, 1)), cloth)
    for p in people:
        if p.sitting:
            y, w = p.hips.imag + uniform(rng, 0, .03) * p.h, uniform(rng, .09, .16) * p.h
            scenery(canvas, box(p.hips.real - w, y, 2 * w, .25 * p.h), fabric(rng, .3), .85)
            scenery(canvas, box(p.hips.real - w, y, 2 * w, .03 * p.h), plain(dye(rng)), 1.05)
    for p in people:
        feet = [leg[2] for leg in p.legs.values()]
        ground = complex(p.hips.real, max(foot.imag for foot in feet) + .025 * p.h)
        scenery(canvas, disc(ground, .16 * p.h, .03 * p.h), plain((70, 66, 64)), .9)


def scenery(canvas, outline, cloth, shade=1.0):
    """Paint a polygon that is background: no body part, and nothing covers it."""
    canvas.paint(outline, 0, 0, cloth, shade)


def wall_and_floor(canvas, rng, aspect):
    """Both with a gradient or a fabric; windows, doors or posters on the wall."""
    def gradient():
        return GRADIENT, muted(dye(rng)), muted(dye(rng), .3), uniform(rng, .1, .4), uniform(rng, 0, 3.1)

    scenery(canvas, box(-.01, -.01, aspect + .02, 1.02), gradient() if rng.random() < .7 else fabric(rng, .5))
    horizon = uniform(rng, .55, .9)
    for _ in range(int(uniform(rng, 1, 5))):
        x, y = uniform(rng, -.1, aspect), uniform(rng, -.1, horizon - .1)
        rectangle = box(x, y, uniform(rng, .08, .4), uniform(rng, .08, .5))
        scenery(canvas, rectangle, fabric(rng, .5), uniform(rng, .8, 1.1))
    right = aspect + .01
    floor = [complex(-.01, horizon), complex(right, horizon + uniform(rng, -.06, .06)), complex(right, 1.01),
             complex(-.01, 1.01)]
    scenery(canvas, floor, gradient() if rng.random() < .6 else fabric(rng, .7))


def clutter(canvas, rng, c, cloth):
    """Something at the point c that may be taken for a part of a person."""
    kind = rng.random()
    if kind < .4:    # a limb that nobody has
        d = uniform(rng, .06, .2) * turned(uniform(rng, -180, 180))
        r = uniform(rng, .015, .04)
        canvas.tube(c, c + d, r, r * 1.05, .7 * r, 0, 0, cloth)
    elif kind < .6:  # a ball like a head
        r = uniform(rng, .02, .06)
        scenery(canvas, disc(c, r, 1.2 * r), cloth, .9)
        scenery(canvas, disc(c - .2j * r, .6 * r, .7 * r), cloth, 1.07)
    elif kind < .8:
        rectangle = box(c.real, c.imag, uniform(rng, .03, .2), uniform(rng, .03, .2))
        scenery(canvas, rectangle, cloth, uniform(rng, .8, 1.1))
    else:            # a bush or a heap of clothes
        r = uniform(rng, .04, .12)
        outline = smooth([c + r * uniform(rng, .5, 1.2) * turned(60 * k) for k in range(6)])
        scenery(canvas, outline, cloth, .9)


def foreground(canvas, rng, aspect, people):
    """Sometimes a post hides a part of the people."""
    if rng.random() < .12:
        cloth = pick(rng, [p.bottom for p in people]) if rng.random() < .5 else fabric(rng)
        x = uniform(rng, 0, aspect)
        a, b = (complex(x, 1.02), complex(x + uniform(rng, -.1, .1), uniform(rng, -.02, .8)))
        r = uniform(rng, .02, .06)
        canvas.tube(a, b, r, r, r, 0, 0, cloth)


def photograph(image, rng):
    """(3, H, W) float32 in 0..255, which is changed -> (H, W, 3) uint8, as a camera takes it.

    Uneven light, a colour cast, contrast, grain and blur.
    """
    height, width = image.shape[1:]
    y, x = np.ogrid[-.5:.5:height * 1j, -.5:.5:width * 1j]
    angle = uniform(rng, 0, 2 * math.pi)
    light = 1 + uniform(rng, .05, .35) * (x * math.cos(angle) + y * math.sin(angle))
    patches = Image.fromarray(rng.random((9, 9), np.float32)).resize((width, height), Image.BICUBIC)
    light = (light + uniform(rng, .05, .3) * (np.asarray(patches) - .5)).astype(np.float32)
    cast = [uniform(rng, .92, 1.08) for _ in range(3)]
    exposure, contrast = uniform(rng, .8, 1.12), uniform(rng, .8, 1.05)
    image *= light * np.float32(contrast)
    image += 120 * (1 - contrast)
    image *= np.array(cast, np.float32)[:, None, None] * np.float32(exposure)
    image += uniform(rng, 1, 9) * rng.standard_normal((height, width), np.float32)
    np.clip(image, 0, 255, out=image)
    picture = Image.merge("RGB", [Image.fromarray(channel) for channel in image.astype(np.uint8)])
    if rng.random() < .5:
        picture = picture.filter(ImageFilter.GaussianBlur(uniform(rng, .002, .006) * height))
    return np.array(picture)


# --- a dataset -----------------------------------------------------------------------------------

class Figures:
    """A dataset of figures in one label set: numbers offset, offset + stride, ... of a seed.

    Datasets of one seed and stride share no picture if their offsets differ and are below the stride.
    domain: a LabelDomain whose name is in TABLES; raises InputError for another. A figure is drawn when it is
    first asked for, then kept in memory.
    """

    def __init__(self, domain, seed, count, size=(128, 128), offset=0, stride=1):
        if domain.name not in TABLES:
            raise InputError(f"figures have no label set '{domain.name}'; they have {', '.join(TABLES)}")
        self.domain, self.seed, self.count, self.size = domain, seed, count, tuple(size)
        self.offset, self.stride, self.drawn = offset, stride, {}

    def __len__(self):
        return self.count

    def load(self, i, size=None):
        """image (H, W, 3) uint8 RGB and label (H, W) uint8 of the i-th figure, drawn at its own size."""
        if i not in self.drawn:
            drawn = figure(self.seed, self.offset + self.stride * i, self.size)
            self.drawn[i] = drawn.image, drawn.label(self.domain.name)
        return self.drawn[i]

    def where(self, i):
        """What messages call the i-th figure."""
        return f"figure {self.offset + self.stride * i} of seed {self.seed}"
