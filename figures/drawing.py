"""What people and their surroundings are drawn with: parts and covers, shapes, a canvas, cloth and colours.

Points are complex numbers, x + iy with y downward, in units of the picture's height. So turning a vector is a
product, and every size of picture shows the same scene. Everything that is painted is a *piece*: a polygon
that knows its body part, what covers that part, its cloth and its shade.
"""

import cmath
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# Sides are the person's own. Hands belong to the lower arms and feet to the lower legs, as in
# PASCAL-Person-Part; the neck belongs to the torso.
PARTS = ("background", "head", "torso",
         "left upper arm", "right upper arm", "left lower arm", "right lower arm",
         "left upper leg", "right upper leg", "left lower leg", "right lower leg")
# What is seen at a pixel. A belt remembers the garment it is worn on, because label sets without
# a belt class call it by that garment. A bag has no body part: its part is background.
COVERS = ("nothing", "skin", "hair", "hat", "sunglasses", "upper-clothes", "coat", "dress",
          "pants", "skirt", "socks", "shoe", "glove", "scarf", "bag",
          "belt on pants", "belt on skirt", "belt on dress", "belt on coat")
PART = {name: i for i, name in enumerate(PARTS)}
COVER = {name: i for i, name in enumerate(COVERS)}

HALF = [cmath.exp(-1j * math.pi * t / 6) for t in range(7)]  # a half circle, from +1 to -1
CIRCLE = [cmath.exp(2j * math.pi * t / 16) for t in range(16)]
PLAIN, STRIPES, CHECKS, DOTS, GRADIENT = range(5)
# A pattern mixes two colours by a u + b v + c u v + d, where u and v are waves across and along the cloth.
PATTERNS = np.array([(0, 0, 0, 0), (2.5, 0, 0, 0), (1.6, 1.6, 0, 0), (0, 0, 4, -1.4), (.9, 0, 0, 0)],
                    np.float32)


# --- shapes: lists of complex points -------------------------------------------------------------

def limb(a, b, ra, rm, rb, round_a=True, round_b=True):
    """Outline of a tapered limb from a to b: radius ra at a, rm at two fifths, rb at b."""
    d = b - a
    n = 1j * d / (abs(d) or 1)
    end = HALF if round_b else HALF[::6]
    start = HALF if round_a else HALF[::6]
    m = a + .4 * d
    return ([m + rm * n] + [b + rb * n * w for w in end]
            + [m - rm * n] + [a - ra * n * w for w in start])


def disc(c, rx, ry, axis=1):
    """Outline of an ellipse; axis is the unit vector of its rx direction."""
    return [c + axis * complex(rx * w.real, ry * w.imag) for w in CIRCLE]


def box(x, y, w, h):
    """Outline of an upright rectangle: its upper left corner, its width and height."""
    return [complex(x, y), complex(x + w, y), complex(x + w, y + h), complex(x, y + h)]


def smooth(points, steps=3):
    """Closed curve through the points (Catmull-Rom)."""
    out = []
    n = len(points)
    for i in range(n):
        a, b, c, d = points[i - 1], points[i], points[(i + 1) % n], points[(i + 2) % n]
        for k in range(steps):
            t = k / steps
            out.append(b + .5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a))))
    return out


def arc(c, rx, ry, axis, start, stop, steps=9):
    """Points of an ellipse from angle start to stop (degrees, clockwise on screen from axis)."""
    out = []
    for k in range(steps):
        w = cmath.exp(1j * math.radians(start + (stop - start) * k / (steps - 1)))
        out.append(c + axis * complex(rx * w.real, ry * w.imag))
    return out


def turned(degrees):
    """Unit vector at an angle from straight down, positive toward image right."""
    return 1j * cmath.exp(-1j * math.radians(degrees))


# --- the canvas ----------------------------------------------------------------------------------

class Canvas:
    """Pieces painted back to front into one id map at twice the picture's size.

    The ids carry everything (part, cover, colours, texture, shade) through lookup tables, so the
    labels are hard edged and exact while the picture is antialiased.
    """

    def __init__(self, size, light):
        self.height, self.width = size
        self.scale = 2 * self.height
        self.ids = Image.new("I", (2 * self.width, 2 * self.height))
        self.polygon = ImageDraw.Draw(self.ids).polygon
        self.light = light  # -1 or 1: the image side that the light comes from
        self.pieces = []

    def paint(self, outline, part, cover, cloth, shade=1.0, angle=0.0):
        """Paint a polygon. cloth: (kind, rgb, second rgb, period, angle), see `plain`."""
        k = self.scale
        kind, (r, g, b), (r2, g2, b2), period, tilt = cloth
        self.polygon([(z.real * k, z.imag * k) for z in outline], fill=len(self.pieces))
        self.pieces.append((part, cover, r, g, b, r2 - r, g2 - g, b2 - b, kind, period, tilt + angle, shade))

    def tube(self, a, b, ra, rm, rb, part, cover, cloth, round_a=True, round_b=True, tone=1.0):
        """Paint a limb with a lit side, so that it looks round."""
        d = (b - a) / (abs(b - a) or 1)
        angle = cmath.phase(d)
        self.paint(limb(a, b, ra, rm, rb, round_a, round_b), part, cover, cloth, .86 * tone, angle)
        # The lit core reaches far into round ends, so that two bones look like one limb; it stays
        # inside the outline, so it cannot change a label.
        side = .2 * rm * self.light * abs(d.imag) - .1j * rm * abs(d.real)
        a += side + d * (-.35 * ra if round_a else .6 * ra)
        b += side + d * (.35 * rb if round_b else -.6 * rb)
        self.paint(limb(a, b, .55 * ra, .55 * rm, .55 * rb), part, cover, cloth, 1.08 * tone, angle)

    def render(self):
        """The picture as float32 (3, H, W) in 0..255, and part and cover maps (H, W) uint8."""
        table = np.array(self.pieces, np.float32)
        double = np.asarray(self.ids)
        ids = double[1::2, 1::2]
        rgbx = np.zeros((len(table), 4), np.uint8)
        # patterns swing about the mean of their two colours, so a softened edge shows the mean
        rgbx[:, :3] = np.clip(table[:, 2:5] + .5 * table[:, 5:8], 0, 255)
        colours = rgbx.view(np.uint32)[:, 0][double]
        picture = Image.frombuffer("RGBX", double.shape[::-1], colours, "raw", "RGBX", 0, 1).reduce(2)
        image = np.array([np.asarray(picture.getchannel(c)) for c in range(3)], np.float32)
        here = colours[1::2, 1::2]
        inside = (table[:, 8] > PLAIN)[ids]  # a pattern, and not on an edge
        inside &= (here == colours[::2, ::2]) & (here == colours[1::2, ::2]) & (here == colours[::2, 1::2])
        where = np.flatnonzero(inside)
        piece = ids.ravel()[where]
        y, x = np.divmod(where.astype(np.int32), self.width)
        share = weave(table[:, 8:11], piece, y, x, self.height)
        image.reshape(3, -1)[:, where] += share * table[:, 5:8].T.copy()[:, piece]
        shade = Image.fromarray(np.clip(table[:, 11] * 128, 0, 255).astype(np.uint8)[ids])
        shade = shade.filter(ImageFilter.GaussianBlur(.009 * self.height))
        image *= np.asarray(shade) * np.float32(1 / 128)
        part, cover = table[:, :2].astype(np.uint8).T
        return image, part[ids], cover[ids]


def weave(textures, piece, y, x, height):
    """(N,) float32: the second colour's share, minus a half, at N pixels.

    textures: (pieces, 3) kind, period, angle. piece, y, x: (N,) of each pixel.
    """
    kind, period, angle = textures.T
    k = 2 * np.pi / (period * height) * np.where(kind == GRADIENT, .12, 1)
    across = (k * np.cos(angle)).astype(np.float32)[piece]
    along = (k * np.sin(angle)).astype(np.float32)[piece]
    x, y = x.astype(np.float32), y.astype(np.float32)
    u, v = np.sin(x * across + y * along), np.sin(y * across - x * along)
    a, b, c, d = PATTERNS[kind.astype(int)].T.copy()
    wave = a[piece] * u + (b[piece] + c[piece] * u) * v + d[piece]
    return .5 * np.clip(wave, -1, 1, out=wave)


# --- cloth and colours ---------------------------------------------------------------------------

SKINS = ((255, 220, 190), (238, 196, 160), (222, 172, 130), (190, 136, 96), (146, 98, 68), (98, 64, 46))
HAIRS = ((28, 24, 24), (58, 38, 28), (96, 62, 38), (150, 100, 54), (206, 164, 96), (150, 58, 30),
         (172, 172, 176))
SOBER = ((30, 32, 38), (240, 238, 232), (120, 122, 128), (38, 50, 88), (84, 112, 156), (206, 186, 150),
         (94, 70, 52))


def plain(rgb):
    return PLAIN, rgb, rgb, 1.0, 0.0


def muted(rgb, much=.5):
    """The colour as walls have it: nearer to a light grey."""
    return tuple(c + much * (150 - c) for c in rgb)


def jitter(rng, rgb, amount=14):
    return tuple(min(250, max(8, c + amount * (2 * rng.random() - 1))) for c in rgb)


def dye(rng):
    """A colour as clothes have them: sober, vivid, or (hard to tell from a bare limb) skin-like."""
    kind = rng.random()
    if kind < .45:
        return jitter(rng, pick(rng, SOBER))
    if kind < .53:
        return jitter(rng, pick(rng, SKINS))
    hue, light, strength = 6 * rng.random(), 90 + 150 * rng.random(), .35 + .6 * rng.random()
    return tuple(light * (1 - strength * min(1, max(0, 2 - abs((hue - c) % 6 - 3)))) for c in (0, 2, 4))


def fabric(rng, patterned=.5):
    """A cloth with a pattern or without."""
    rgb = dye(rng)
    if rng.random() > patterned:
        return plain(rgb)
    kind = 1 + int(4 * rng.random())
    return kind, rgb, dye(rng), uniform(rng, .025, .06), pick(rng, (0, math.pi / 2, math.pi / 4))


def pick(rng, items):
    return items[int(rng.random() * len(items))]


def uniform(rng, low, high):
    return low + (high - low) * rng.random()
