"""One articulated, clothed person: a pose by joint angles, an outfit, and how both are painted."""

import cmath
import math

from .drawing import (COVER, HAIRS, PART, SKINS, arc, disc, dye, fabric, jitter, pick, plain, smooth, turned,
                      uniform)
from .head import Head

# Angles of the two bones of a limb, in degrees from straight down, outward positive, as ranges; then the
# ranges of foreshortening. Arms also say whether they are before the person's own chest (True), behind
# their back (False) or may be either (None).
ARM_POSES = (  # upper arm, lower arm, foreshortening of each, before the chest
    ((5, 22), (0, 16), (1, 1), (1, 1), None),              # hanging
    ((5, 22), (0, 16), (1, 1), (1, 1), True),
    ((40, 56), (-52, -34), (1, 1), (.9, 1), True),         # hand on the hip
    ((12, 30), (-112, -72), (.9, 1), (.75, 1), True),      # across the belly
    ((60, 105), (50, 110), (.9, 1), (.9, 1), None),        # stretched sideways
    ((60, 100), (140, 190), (.8, 1), (.8, 1), None),       # waving
    ((125, 165), (140, 200), (.9, 1), (.9, 1), None),      # overhead
    ((15, 40), (15, 60), (.6, .9), (.55, .9), True),       # reaching toward the camera
    ((18, 30), (-60, -25), (.9, 1), (.8, 1), False))       # hand behind the back
LEG_POSES = (
    ((1, 8), (0, 6), (1, 1), (1, 1)),                      # standing
    ((1, 8), (0, 6), (1, 1), (1, 1)),
    ((8, 20), (4, 16), (1, 1), (1, 1)),                    # legs apart
    ((2, 10), (-4, 6), (.95, 1), (.55, .8)),               # heel lifted
    ((10, 28), (-8, 6), (.5, .7), (.9, 1)),                # knee lifted
    ((20, 50), (10, 50), (.9, 1), (.9, 1)))                # kick
SIT = ((18, 34), (-6, 10), (.4, .55), (.95, 1))

# Radii at the near end, two fifths on, and the far end of a bone, in body heights.
UPPER_ARM, LOWER_ARM = (.031, .029, .024), (.025, .025, .016)
UPPER_LEG, LOWER_LEG = (.056, .052, .036), (.036, .040, .022)
# Half widths of the torso at heights above the hips.
TORSO = ((-.055, .040), (-.03, .074), (0., .088), (.05, .079), (.10, .069), (.16, .078), (.22, .090),
         (.265, .096), (.285, .088), (.30, .062), (.315, .036), (.33, .030))


def ramp(points, t):
    """Piecewise linear function through (x, y) points."""
    if t <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if t <= x1:
            return y0 + (y1 - y0) * (t - x0) / (x1 - x0)
    return points[-1][1]


def bone_radius(radii, t):
    return ramp(((0, radii[0]), (.4, radii[1]), (1, radii[2])), t)


class Person(Head):
    """Poses and dresses a person at construction (so the scene can borrow the colours); `draw` paints it.

    height: of the standing person, in picture heights. `place(hips)` puts the hips there.
    In this class side s is +1 for the limb at image right of an upright body, -1 at image left.
    """

    def __init__(self, canvas, rng, height):
        self.canvas, self.rng, self.h = canvas, rng, height
        self.front = rng.random() < .68
        # Seen from the front, the person's left is at image right; from the back it is the opposite.
        self.side = {1: "left", -1: "right"} if self.front else {1: "right", -1: "left"}
        self.build = uniform(rng, .86, 1.22)
        self.turn = math.radians(uniform(rng, -48, 48)) * (rng.random() < .7)
        self.wide = .3 + .7 * math.cos(self.turn)
        self.pose(uniform(rng, -1, 1))
        self.dress()
        self.accessories()

    # --- pose ---

    def pose(self, child):
        """Joints relative to the hips, in picture heights."""
        rng, h = self.rng, self.h
        u = lambda pair: uniform(rng, *pair)
        self.head_size = h * (1.0 if child < .6 else 1.22) * uniform(rng, .96, 1.08)
        self.up = -1j * cmath.exp(1j * math.radians(uniform(rng, -9, 9) * (1 if rng.random() < .75 else 2)))
        self.right = 1j * self.up
        self.head_up = self.up * cmath.exp(1j * math.radians(uniform(rng, -14, 14)))
        self.head = .345 * h * self.up + .068 * self.head_size * self.head_up
        swing = math.sin(self.turn) * uniform(rng, -24, 24)
        self.sitting = rng.random() < .1
        both = pick(rng, LEG_POSES[:4]) if rng.random() < .7 else None
        self.legs, self.arms, self.arm_in_front = {}, {}, {}
        for s in (1, -1):
            upper, lower, near, far = SIT if self.sitting else both or pick(rng, LEG_POSES)
            hip = s * self.right.real * .047 * h * self.wide
            knee = hip + .245 * h * u(near) * turned(s * u(upper) + s * swing)
            ankle = knee + .235 * h * u(far) * turned(s * u(lower) + s * swing * .6)
            self.legs[s] = hip, knee, ankle
            upper, lower, near, far, front = pick(rng, ARM_POSES)
            shoulder = (.275 * self.up + s * .083 * self.wide * self.build ** .5 * self.right) * h
            tilt = cmath.exp(1j * (cmath.phase(self.up) + math.pi / 2))
            elbow = shoulder + .165 * h * u(near) * turned(s * u(upper)) * tilt
            aim = turned(s * u(lower)) * tilt
            wrist = elbow + .145 * h * u(far) * aim
            tip = wrist + .05 * h * aim * cmath.exp(1j * math.radians(uniform(rng, -15, 15)))
            self.arms[s] = shoulder, elbow, wrist, tip
            if abs(self.turn) > .45 and front is None:
                front = (s * self.turn < 0) == self.front  # the far arm is behind the torso
            # the camera sees a chest's arms in front in a front view, hidden in a back view
            self.arm_in_front[s] = rng.random() < .5 if front is None else front == self.front
        self.near_leg = pick(rng, (1, -1))

    def top_and_bottom(self):
        """Heights of the crown and of the lowest ankle relative to the hips (y downward)."""
        crown = self.head + .1 * self.head_size * self.head_up
        return crown.imag, max(ankle.imag for _, _, ankle in self.legs.values())

    def place(self, hips):
        """Move the hips, which are at the origin, to a point of the picture."""
        self.hips = hips
        self.head += hips
        for joints in (self.legs, self.arms):
            for s in joints:
                joints[s] = tuple(p + hips for p in joints[s])
        # where the body's long axis runs below the hips: half way between the legs
        self.between = lambda t: (self.bone(1, t) + self.bone(-1, t)) / 2

    def bone(self, s, t):
        """A point on a leg's axis: t in 0..1 along the upper leg, 1..2 along the lower leg."""
        hip, knee, ankle = self.legs[s]
        return hip + t * (knee - hip) if t < 1 else knee + (t - 1) * (ankle - knee)

    def torso(self, x, y):
        """A point of the torso's own frame: x to image right, y up from the hips, in body heights."""
        return self.hips + self.h * (x * self.wide * self.right + y * self.up)

    # --- outfit ---

    def dress(self):
        """Skin, hair, and the garments that everybody wears, with their lengths."""
        rng, chance = self.rng, self.chance
        self.skin = plain(jitter(rng, pick(rng, SKINS)))
        self.hair = plain(jitter(rng, pick(rng, HAIRS)))
        self.hair_style = pick(rng, ("short", "short", "bob", "long", "long", "bun", "curly"))
        self.kind = pick(rng, ("pants",) * 7 + ("shorts",) * 4 + ("skirt",) * 5 + ("dress",) * 5
                         + ("jumpsuit",) * 2)
        self.top_cover = "dress" if self.kind in ("dress", "jumpsuit") else "upper-clothes"
        self.bottom_cover = {"shorts": "pants", "jumpsuit": "dress"}.get(self.kind, self.kind)
        self.top = fabric(rng, .6)
        self.bottom = self.top if self.top_cover == "dress" else fabric(rng, .35)
        self.sleeve = pick(rng, (0, .35, .5, .8, 1.5, 1.96, 1.96, 1.96))
        if self.kind == "jumpsuit" and chance(.3):
            self.sleeve = 0
        long = 1.97, 1.97, 1.95, 1.7, 1.45
        self.trouser = uniform(rng, .3, .85) if self.kind == "shorts" else pick(rng, long)
        if self.kind == "jumpsuit" and chance(.3):
            self.trouser = uniform(rng, .35, .7)
        self.hem = uniform(rng, .45, 1.15) if chance(.75) else uniform(rng, 1.2, 1.8)  # of skirt or dress
        self.flare = uniform(rng, .005, .06)
        self.tucked = .07 if self.kind == "skirt" or chance(.45) else uniform(rng, -.035, .03)
        if chance(.08):
            self.tucked = uniform(rng, .12, .16)  # a bare midriff
        self.neckline = uniform(rng, .012, .06)
        self.bare_chest = self.kind == "shorts" and chance(.15)

    def accessories(self):
        """What not everybody wears: a coat, a belt, shoes, a hat, a bag, ..."""
        rng, chance = self.rng, self.chance
        self.coat = fabric(rng, .4) if chance(.27) and not self.bare_chest else None
        self.coat_hem, self.coat_open = uniform(rng, -.1, 1.3), chance(.7)
        self.coat_gap = uniform(rng, .018, .04)
        self.belt = plain(dye(rng)) if chance(.48) else None
        self.shoe = plain(dye(rng)) if chance(.95) else None
        self.shaft = uniform(rng, .45, .8) if chance(.15) else .93  # where along the lower leg a boot begins
        self.sock = (fabric(rng, .3), uniform(rng, .3, .75)) if chance(.62) else None
        self.glove = (plain(dye(rng)), uniform(rng, .5, .9)) if chance(.22) else None
        self.hat = (pick(rng, ("cap", "brim", "beanie")), fabric(rng, .2)) if chance(.28) else None
        tints = (20, 20, 24), (46, 30, 22), (24, 34, 66), (120, 60, 40)
        self.glasses = plain(pick(rng, tints)) if chance(.42) else None
        self.scarf = fabric(rng, .6) if chance(.22) else None
        self.bag = pick(rng, ("hand", "hand", "shoulder", "back")) if chance(.42) else None
        self.bag_cloth = fabric(rng, .25)
        self.beard = (self.hair_style in ("short", "curly") and self.kind in ("pants", "shorts")
                      and chance(.35))

    def chance(self, p):
        return self.rng.random() < p

    # --- painting ---

    def paint(self, outline, part, cover, cloth, shade=1.0, angle=0.0):
        self.canvas.paint(outline, PART[part], COVER[cover], cloth, shade, angle)

    def on_torso(self, points, cover, cloth, shade=1.0, angle=0.0, side=1):
        """Paint a polygon given in the torso's frame; side -1 mirrors it."""
        part = "background" if cover == "bag" else "torso"  # a bag has no body part
        self.paint([self.torso(side * x, y) for x, y in points], part, cover, cloth, shade, angle)

    def wrap(self, part, cover, cloth, a, b, radii, start=0.0, stop=1.0, ease=1.0, flare=0.0, tone=1.0):
        """Paint the stretch start..stop of a bone from a to b; ends are round only at the joints."""
        k = self.h * self.build * ease
        self.canvas.tube(a + start * (b - a), a + stop * (b - a), k * bone_radius(radii, start),
                         k * bone_radius(radii, start + .4 * (stop - start)) + .4 * flare * self.h,
                         k * bone_radius(radii, stop) + flare * self.h, PART[part], COVER[cover], cloth,
                         start == 0, stop >= 1, tone)

    def draw(self):
        arms = sorted(self.arms, key=lambda s: self.arm_in_front[s])
        if self.front:
            self.hair_behind()
        if self.coat and self.coat_hem > .15:
            self.skirt("coat", self.coat, self.coat_hem * .98, .03, 0, .7)  # its inside, behind the legs
        for s in arms:
            if not self.arm_in_front[s]:
                self.arm(s)
        for s in (-self.near_leg, self.near_leg):
            self.leg(s)
        self.trunk()
        if self.scarf:
            self.wear_scarf()
        self.head_front() if self.front else self.head_back()
        if self.bag in ("shoulder", "back"):
            self.carry_bag()
        for s in arms:
            if self.arm_in_front[s]:
                self.arm(s)

    def leg(self, s):
        h, (hip, knee, ankle) = self.h, self.legs[s]
        upper, lower = self.side[s] + " upper leg", self.side[s] + " lower leg"
        toe_out = math.sin(self.turn) * .8 + s * .32
        toe = ankle + h * complex(.075 * toe_out * (1 if self.front else -.6), .026 if self.front else .014)
        heel = ankle + .008j * h
        tone = 1.0 if s == self.near_leg else .93

        def foot(cover, cloth, ra, rm, rb):
            self.canvas.tube(heel, toe, ra * h, rm * h, rb * h, PART[lower], COVER[cover], cloth, tone=tone)

        self.wrap(lower, "skin", self.skin, knee, ankle, LOWER_LEG, tone=tone)
        foot("skin", self.skin, .022, .024, .017)
        if self.sock:
            cloth, start = self.sock
            self.wrap(lower, "socks", cloth, knee, ankle, LOWER_LEG, start, 1, 1.08, tone=tone)
            foot("socks", cloth, .023, .025, .018)
        if self.shoe:
            if self.shaft < .9:
                self.wrap(lower, "shoe", self.shoe, knee, ankle, LOWER_LEG, self.shaft, 1, 1.18, tone=tone)
            foot("shoe", self.shoe, .026, .029, .023)
        ease, flare = 1.06 + .6 * self.flare * 4, self.flare * .3
        garment, cloth, length = self.bottom_cover, self.bottom, self.trouser
        trousers = garment == "pants" or self.kind == "jumpsuit"
        if trousers and length > 1:
            self.wrap(lower, garment, cloth, knee, ankle, LOWER_LEG, 0, length - 1, ease, flare, tone)
        if not trousers or length < 1:
            self.wrap(upper, "skin", self.skin, hip, knee, UPPER_LEG, tone=tone)
        if trousers:
            self.wrap(upper, garment, cloth, hip, knee, UPPER_LEG, 0, min(1, length), ease, 0, tone)

    def arm(self, s):
        shoulder, elbow, wrist, tip = self.arms[s]
        upper, lower = self.side[s] + " upper arm", self.side[s] + " lower arm"
        h, tone = self.h, 1.0 if self.arm_in_front[s] else .9
        if self.bag == "hand" and s == self.bag_side() and tip.imag > shoulder.imag:
            self.handbag(tip)
        sleeves = [] if self.bare_chest else [(self.top_cover, self.top, self.sleeve, 1.12)]
        if self.coat:
            sleeves.append(("coat", self.coat, 1.93, 1.28))
        covered = max((sleeve[2] for sleeve in sleeves), default=0)
        self.wrap(lower, "skin", self.skin, elbow, wrist, LOWER_ARM, tone=tone)
        if covered < 1:
            self.wrap(upper, "skin", self.skin, shoulder, elbow, UPPER_ARM, tone=tone)
        for cover, cloth, length, ease in sleeves:
            if length > 1:
                self.wrap(lower, cover, cloth, elbow, wrist, LOWER_ARM, 0, length - 1, ease, .002, tone)
            if length > 0:
                stop, flare = (length, .003) if length < 1 else (1, 0)
                self.wrap(upper, cover, cloth, shoulder, elbow, UPPER_ARM, 0, stop, ease, flare, tone)
        cover, cloth = ("glove", self.glove[0]) if self.glove else ("skin", self.skin)
        k = h * (1.12 if self.glove else 1)
        if self.glove:
            ease = 1.45 if self.coat else 1.3
            self.wrap(lower, "glove", cloth, elbow, wrist, LOWER_ARM, self.glove[1], 1, ease, tone=tone)
        d = (tip - wrist) / abs(tip - wrist)
        thumb = wrist + k * d * complex(.022, -.022 * s)
        hand = PART[lower], COVER[cover], cloth
        self.canvas.tube(wrist + .3 * (thumb - wrist), thumb, .009 * k, .009 * k, .007 * k, *hand, tone=tone)
        self.canvas.tube(wrist, tip - .012 * h * d, .017 * k, .021 * k, .014 * k, *hand, tone=tone)

    def band(self, low, high, ease=1.0, left=None, right=None):
        """Outline of the torso between two heights; left and right replace a side's half width."""
        heights = [low] + [y for y, _ in TORSO if low < y < high] + [high]
        k = self.build * ease
        edge = [ramp(TORSO, y) * (k if y < .3 else 1) for y in heights]
        return ([self.torso(-w if left is None else left, y) for w, y in zip(edge, heights)]
                + [self.torso(w if right is None else right, y) for w, y in zip(edge[::-1], heights[::-1])])

    def trunk(self):
        """Neck, torso and what is worn on them, skirts included."""
        angle = cmath.phase(self.up)
        self.paint(self.band(-.04, .33), "torso", "skin", self.skin, .92)
        self.paint(self.band(.02, .27, .6), "torso", "skin", self.skin, 1.05)
        neck = self.torso(0, .30)
        radius, skin = .027 * self.h, (PART["torso"], COVER["skin"], self.skin)
        self.canvas.tube(neck, .5 * (self.head + self.torso(0, .345)), radius, radius, radius, *skin, tone=.9)
        garment, cloth = self.bottom_cover, self.bottom
        if garment == "skirt" or self.kind == "dress":
            self.skirt(garment, cloth, self.hem, self.flare)
        self.paint(self.band(-.055, .085, 1.05), "torso", garment, cloth, .93, angle)
        self.paint(self.band(-.04, .085, .7), "torso", garment, cloth, 1.0, angle)
        if not self.bare_chest:
            low = .075 if self.top_cover == "dress" else self.tucked
            self.paint(self.band(low, .322, 1.04), "torso", self.top_cover, self.top, .91, angle)
            self.paint(self.band(low + .01, .29, .68), "torso", self.top_cover, self.top, 1.05, angle)
            depth = self.neckline if self.front else .4 * self.neckline
            edge = .322 - .6 * depth
            self.on_torso(((-.034, .325), (-.026, edge), (0, .318 - depth), (.026, edge), (.034, .325)),
                          "skin", self.skin, .97)
        if self.belt and not (self.coat and not self.coat_open):
            self.wear_belt("belt on " + garment, 1.08)
        if self.coat:
            self.wear_coat()

    def wear_belt(self, cover, ease):
        low = .066
        self.paint(self.band(low, low + .03, ease), "torso", cover, self.belt, .95)
        if self.front:
            buckle = plain((214, 190, 110))
            a, b = low + .004, low + .026
            self.on_torso(((-.012, a), (-.012, b), (.012, b), (.012, a)), cover, buckle)

    def skirt(self, cover, cloth, hem, flare, gap=0.0, tone=1.0):
        """Fabric that hangs over both legs and the space between them; every pixel belongs to the nearer leg.

        hem: 0..1 along the upper leg, 1..2 along the lower. gap: half width of an opening in the middle.
        """
        h, rows = self.h, []  # rows: place along the leg, the middle, the half width on each side
        waist = .095 * h * self.wide * self.build
        rows.append((0, self.torso(0, .05), {1: waist, -1: waist}))
        for t in [k for k in (0, .3, .6, 1, 1.3, 1.6) if k < hem] + [hem]:
            middle, radius = self.between(t), bone_radius(UPPER_LEG, t) if t < 1 else .045
            rows.append((t, middle, {s: max(s * (self.bone(s, t) - middle).real, .016 * h)
                                     + (radius * 1.1 * self.build + flare * t) * h for s in (1, -1)}))
        for s in (1, -1):
            for part, low, high in (("upper leg", 0, 1), ("lower leg", 1, 2)):
                here = [row for row in rows if low <= row[0] <= high]
                if len(here) < 2:
                    continue
                inner = [middle + s * gap * h * self.wide for _, middle, _ in here]
                outer = [middle + s * width[s] for _, middle, width in here]
                name = f"{self.side[s]} {part}"
                self.paint(outer + inner[::-1], name, cover, cloth, .9 * tone)
                for a, b in ((.2, .45), (.62, .85)):  # folds
                    fold = [i + a * (o - i) for i, o in zip(inner, outer)]
                    fold += [i + b * (o - i) for i, o in zip(inner[::-1], outer[::-1])]
                    self.paint(fold, name, cover, cloth, 1.06 * tone)

    def wear_coat(self):
        gap = self.coat_gap if self.coat_open and self.front else 0
        angle = cmath.phase(self.up)
        low = -.055 if self.coat_hem > 0 else .5 * self.coat_hem
        if self.coat_hem > 0:
            self.skirt("coat", self.coat, self.coat_hem, .02 + .5 * self.flare, gap)
        for s in (1, -1):
            side = {"left": gap} if s == 1 else {"right": -gap}
            self.paint(self.band(low, .315, 1.16, **side), "torso", "coat", self.coat, .86, angle)
            side = {"left": gap + .022} if s == 1 else {"right": -gap - .022}
            self.paint(self.band(low, .28, .8, **side), "torso", "coat", self.coat, 1.06, angle)
            if self.front:  # lapels
                self.on_torso(((gap, .20), (gap + .012, .315), (gap + .04, .30), (gap + .035, .25)),
                              "coat", self.coat, 1.16, angle, s)
        if self.front and not gap:
            r = .006 * self.h  # of a button
            for y in (.03, .11, .19):
                self.paint(disc(self.torso(.012, y), r, r), "torso", "coat", plain((36, 32, 32)))
        if self.belt and not self.coat_open:
            self.wear_belt("belt on coat", 1.18)

    def wear_scarf(self):
        side = pick(self.rng, (1, -1))
        if self.front or self.rng.random() < .4:
            low = uniform(self.rng, .07, .17)
            end = (.004, .30), (.042, .30), (.052, low), (.008, low - .006)
            lit = (.014, .29), (.03, .29), (.034, low + .01), (.018, low + .01)
            self.on_torso(end, "scarf", self.scarf, .9, .3, side)
            self.on_torso(lit, "scarf", self.scarf, 1.1, .3, side)
        around = (-.058, .318), (-.04, .345), (.04, .345), (.058, .318), (.035, .275), (-.035, .275)
        fold = (-.042, .312), (0, .298), (.042, .312), (0, .285)
        for points, shade in ((around, .95), (fold, 1.14)):
            self.paint(smooth([self.torso(x, y) for x, y in points]), "torso", "scarf", self.scarf, shade, .8)

    # --- bags: a bag has no body part ---

    def bag_side(self):
        """The side of the hand that hangs lower: it carries the bag."""
        return max(self.arms, key=lambda s: self.arms[s][3].imag)

    def handbag(self, hand):
        h, cloth = self.h, self.bag_cloth
        w, d = uniform(self.rng, .05, .085) * h, uniform(self.rng, .08, .13) * h
        top = hand + .05j * h
        handle = arc(top, .6 * w, .065 * h, 1, 180, 360) + arc(top, .42 * w, .05 * h, 1, 360, 180)
        self.paint(handle, "background", "bag", cloth, .8)
        for size, high, low, shade in ((1, 0, 1, .88), (.75, .1, .85, 1.08)):
            corners = (-.8, high), (.8, high), (1, low), (-1, low)
            outline = [top + complex(x * size * w, y * d) for x, y in corners]
            self.paint(outline, "background", "bag", cloth, shade)

    def carry_bag(self):
        """On the back, where a front view sees only straps, or at the hip on a strap across the chest."""
        h, cloth, s = self.h, self.bag_cloth, self.bag_side()
        if self.bag == "back" and not self.front:
            half = (.075, .06), (.08, .22), (.05, .275)
            outline = [(0, .045), *half, *((-x, y) for x, y in half[::-1])]
            self.paint(smooth([self.torso(x, y) for x, y in outline]), "background", "bag", cloth, .86)
            self.on_torso(((-.045, .085), (-.05, .15), (.05, .15), (.045, .085)), "bag", cloth, 1.12)
        elif self.bag == "back":
            for s in (1, -1):
                self.on_torso(((.045, .313), (.068, .30), (.078, .20), (.088, .13), (.068, .13), (.054, .20)),
                              "bag", cloth, .95, 0, s)
        else:
            self.on_torso(((-.066, .30), (-.044, .308), (.09, .06), (.07, .05)), "bag", cloth, .8, 0, s)
            w, d = .055 * h, uniform(self.rng, .045, .06) * h
            body = (-1, -.9), (1, -.9), (1.05, .8), (.7, 1), (-.7, 1), (-1.05, .8)
            flap = (-.9, -.8), (.9, -.8), (.8, 0), (-.8, 0)
            for points, shade in ((body, .88), (flap, 1.15)):
                self.paint([self.torso(s * .10, 0) + complex(x * w, y * d) for x, y in points],
                           "background", "bag", cloth, shade)
