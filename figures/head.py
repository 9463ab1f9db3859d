"""The head of a drawn person: face, hair, sunglasses and hat, from the front and from behind."""

import cmath
import math

from .drawing import disc, pick, plain, smooth, uniform


class Head:
    """The part of Person that paints heads: all of it is the body part "head", even hair on the shoulders.

    Uses the person's rng, turn (radians), front, skin, hair, hair_style, beard, hat and glasses, and the
    frame of the head: head (its centre), head_up (unit vector), head_size.
    """

    def face(self, x, y):
        """A point of the head's own frame: x to image right, y up; the skull spans -1..1 in both."""
        k = self.head_size
        return self.head + .052 * k * x * 1j * self.head_up + .068 * k * y * self.head_up

    def on_head(self, points, cover, cloth, shade=1.0, curve=True):
        """Paint a polygon given in the head's frame, rounded unless `curve` is False."""
        outline = [self.face(x, y) for x, y in points]
        outline = smooth(outline) if curve else outline
        self.paint(outline, "head", cover, cloth, shade, cmath.phase(self.head_up))

    def spot(self, x, y, rx, ry, cover, cloth, shade=1.0):
        """Paint an ellipse given in the head's frame."""
        k = self.head_size
        outline = disc(self.face(x, y), .052 * rx * k, .068 * ry * k, 1j * self.head_up)
        self.paint(outline, "head", cover, cloth, shade)

    def hair_behind(self):
        """Hair that the head and shoulders of a front view hide in part."""
        if self.hair_style == "curly":
            self.spot(0, .25, 1.6, 1.25, "hair", self.hair, .85)
        elif self.hair_style in ("long", "bob"):
            low = -1.15 if self.hair_style == "bob" else -2.1
            outline = ((-1.1, .5), (0, 1.1), (1.1, .5), (1.3, -.6), (1.2, low), (0, low + .1), (-1.2, low),
                       (-1.3, -.6))
            self.on_head(outline, "hair", self.hair, .78)
        elif self.hair_style == "bun":
            self.spot(0, 1.15, .55, .42, "hair", self.hair, .9)

    def head_front(self):
        x0 = .42 * math.sin(self.turn)  # the features follow the turn of the head
        self.features(x0)
        if self.glasses:
            self.wear_glasses(x0)
        self.hair_front()
        if self.hat:
            self.wear_hat()

    def features(self, x0):
        """Ears, skin, beard, eyes, nose and lips; x0: of the middle of the face. Glasses hide the eyes."""
        skin, hair = self.skin, self.hair
        for s in (1, -1):
            self.spot(s * .98 - .4 * x0, -.05, .17, .2, "skin", skin, .9)
        outline = ((-.97, .2), (-.75, .85), (0, 1.02), (.75, .85), (.97, .2), (.88, -.4), (.5, -.88),
                   (0, -1.02), (-.5, -.88), (-.88, -.4))
        self.on_head(outline, "skin", skin, .95)
        self.on_head(((-.62, .2), (0, .6), (.62, .2), (.5, -.4), (0, -.75), (-.5, -.4)), "skin", skin, 1.06)
        if self.beard:
            outline = ((-.93, -.1), (-.6, -.3), (x0, -.36), (.6, -.3), (.93, -.1), (.82, -.5), (.45, -.95),
                       (0, -1.02), (-.45, -.95), (-.82, -.5))
            self.on_head(outline, "skin", hair, .95)
        for s in (1, -1) if not self.glasses else ():
            x = x0 + .4 * s
            self.spot(x, .06, .21, .11, "skin", plain((240, 236, 230)))
            self.spot(x + .15 * x0, .06, .11, .11, "skin", plain((44, 30, 28)))
            self.on_head(((x - .26, .27), (x, .36), (x + .26, .27), (x, .28)), "skin", hair, .7)
        nose = 1.25 * x0
        outline = (x0 - .03, .05), (nose - .14, -.24), (nose + .14, -.24), (x0 + .03, .05)
        self.on_head(outline, "skin", skin, .84, False)
        lips = plain((176, 82, 78))
        self.on_head(((x0 - .33, -.5), (x0, -.45), (x0 + .33, -.5), (x0, -.63)), "skin", lips)

    def wear_glasses(self, x0):
        for s in (1, -1):
            x = x0 + .44 * s
            lens = ((x - .4, .26), (x + .4, .26), (x + .37, -.1), (x + .1, -.24), (x - .2, -.22),
                    (x - .38, -.05))
            glint = (x - .2, .17), (x + .05, .17), (x - .15, -.05)
            self.on_head(lens, "sunglasses", self.glasses)
            self.on_head(glint, "sunglasses", self.glasses, 1.9, False)
        bar = (-.95, .2), (.95, .2), (.95, .09), (-.95, .09)
        self.on_head(bar, "sunglasses", self.glasses, 1, False)

    def hair_front(self):
        """Hair above the face of a front view, and before the shoulders where it is long."""
        hair = self.hair
        parting = pick(self.rng, (-.5, 0, .5))
        fringe = uniform(self.rng, .42, .68)
        down = {"short": .1, "curly": .0, "bun": .25}.get(self.hair_style, -.5)
        outline = ((-1.06, down), (-1.1, .5), (-.7, 1.02), (0, 1.2), (.7, 1.02), (1.1, .5), (1.06, down),
                   (.86, .2), (.72, fringe), (parting, fringe + .16), (-.72, fringe), (-.86, .2))
        self.on_head(outline, "hair", hair, .9)
        self.on_head(((-.7, .75), (-.3, 1.05), (.5, 1.0), (.1, .85)), "hair", hair, 1.25)
        if self.hair_style == "long":
            for s in (1, -1):
                low = -2.3 - .4 * self.rng.random()
                lock = ((s * .85, .3), (s * 1.12, .35), (s * 1.35, -.7), (s * 1.45, low),
                        (s * .95, low - .15), (s * .8, -.9))
                lit = (s * 1.0, .1), (s * 1.1, .1), (s * 1.25, low + .4), (s * 1.1, low + .4)
                self.on_head(lock, "hair", hair, .95)
                self.on_head(lit, "hair", hair, 1.25)

    def head_back(self):
        hair, style = self.hair, self.hair_style
        for s in (1, -1):
            self.spot(s * .98, -.05, .17, .2, "skin", self.skin, .9)
        self.on_head(((-.9, -.2), (.9, -.2), (.62, -.85), (-.62, -.85)), "skin", self.skin, .9)
        if style == "curly":
            self.spot(0, .22, 1.55, 1.3, "hair", hair, .88)
        low = {"bob": -1.2, "long": -2.3}.get(style, -.62)
        wide = 1.2 if low < -1 else .62
        ear = 1.06 if low < -1 else .92
        outline = ((-1.06, .3), (-.75, .95), (0, 1.16), (.75, .95), (1.06, .3), (ear, -.3), (wide, low),
                   (0, low - .12), (-wide, low), (-ear, -.3))
        self.on_head(outline, "hair", hair, .88)
        self.on_head(((-.6, .4), (0, .85), (.6, .4), (.35, low + .5), (-.35, low + .5)), "hair", hair, 1.1)
        if style == "bun":
            self.spot(0, .45, .5, .42, "hair", hair, .7)
            self.spot(0, .5, .4, .34, "hair", hair, 1.2)
        if self.hat:
            self.wear_hat()

    def wear_hat(self):
        shape, cloth = self.hat
        x0 = .3 * math.sin(self.turn)
        level = .5 if self.front else .25
        top = 1.5 if shape == "beanie" else 1.38
        outline = ((-1.13, level), (-1.02, .95), (-.5, top), (.5, top), (1.02, .95), (1.13, level),
                   (0, level - .1))
        lit = (-.6, level + .25), (-.3, top - .1), (.3, top - .1), (.6, level + .25)
        self.on_head(outline, "hat", cloth, .9)
        self.on_head(lit, "hat", cloth, 1.1)
        if shape == "brim":
            self.spot(0, level + .05, 1.85, .26, "hat", cloth, .8)
            self.spot(0, level + .1, 1.6, .14, "hat", cloth, 1.05)
        elif shape == "beanie":
            rim = ((-1.18, level - .05), (-1.15, level + .3), (0, level + .38), (1.15, level + .3),
                   (1.18, level - .05), (0, level - .12))
            self.on_head(rim, "hat", cloth, 1.2)
        elif self.front:
            peak = ((x0 - .95, level + .1), (x0, level + .2), (x0 + .95, level + .1),
                    (x0 * 1.6 + .8, level - .16), (x0 * 1.6 - .8, level - .16))
            self.on_head(peak, "hat", cloth, .7)
