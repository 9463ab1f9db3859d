"""Draw docs/sst.png, the scheme of SST in the README: two label domains, the network, what is thrown away.

    python tools/make_readme_picture.py DIR docs/sst.png

DIR is Clothing Co-Parsing (Apache-2.0). The two training photos are the first of the training lists of
`ccp-coarse` and `ccp-fine`, with their labels. The photo on the right is docs/photo.jpg, number 0 of the
validation list, with what the packaged parser says. The numbers are those of the preset `lite`.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import sst
from sst.data import open_dataset
from sst.domains import builtin_domain
from sst.model import ParsingNet
from sst.modules import SST
from sst.plots import colourise

INK, FADED, KEPT, PALE = "#22303c", "#6f7d8a", "#2f4b66", "#f4f6f8"
ONE, TWO = "#d95f02", "#3b6fd4"  # of the two label domains
DASHES = (0, (4, 3))
WIDTH, HEIGHT = 16, 9


def text(axis, x, y, words, size=15, colour=INK, **more):
    axis.text(x, y, words, **(dict(fontsize=size, color=colour, ha="center", va="center") | more))


def box(axis, x, y, w, h, words="", face="white", edge=FADED, size=15, colour=INK, dashed=False, **more):
    axis.add_patch(FancyBboxPatch(
        (x + 0.1, y + 0.1), w - 0.2, h - 0.2, boxstyle="round,pad=0.1,rounding_size=0.14", facecolor=face,
        edgecolor=edge, linewidth=1.6, linestyle=DASHES if dashed else "-"))
    text(axis, x + w / 2, y + h / 2, words, size, colour, linespacing=1.35, **more)


def arrow(axis, start, end, colour=INK, words="", above=0.17):
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=15, linewidth=1.8,
                                   color=colour, shrinkA=0, shrinkB=0))
    text(axis, (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + above, words, 13, colour)


def picture(axis, pixels, x, y, height, edge=INK):
    width = height * pixels.shape[1] / pixels.shape[0]
    axis.imshow(pixels, extent=(x, x + width, y, y + height), zorder=3, interpolation="lanczos")
    axis.add_patch(Rectangle((x, y), width, height, facecolor="none", edgecolor=edge, linewidth=1.6,
                             zorder=4))
    return x + width


def shaded(image, label, domain):
    """The label map's colours with the photo's light and shade; the background is the photo, paled."""
    brightness = image.mean(axis=2, keepdims=True) / 255
    pale = 255 - 0.3 * (255 - image.astype(float))
    coloured = colourise(label, domain) * (0.86 + 0.19 * brightness)
    return np.where(label[..., None] > 0, coloured, pale).clip(0, 255).astype(np.uint8)


def draw_kept(axis, samples, photo, answers):
    """Photos of both domains, the network, its maps and heads, and what it says of a photo."""
    for y, (domain, image, label), colour, n in zip((6.85, 4.75), samples, (ONE, TWO), (1, 2)):
        end = picture(axis, image, 0.2, y, 1.65, colour)
        picture(axis, shaded(image, label, domain), end + 0.08, y, 1.65, colour)
        text(axis, 0.2, y + 1.83, f"label domain {n}: {domain.num_classes} classes", 14, colour, ha="left",
             weight="bold")
        arrow(axis, (2.75, y + 0.87), (3.3, 6.5), colour)
    for i, (name, shrink) in enumerate((("backbone", 0), ("encoder", 0.45), ("decoder", 0))):
        box(axis, 3.35 + 1.22 * i, 5.1 + shrink, 1.15, 2.8 - 2 * shrink, name, KEPT, KEPT, 17, "white",
            rotation=90)
    arrow(axis, (7.0, 6.5), (7.4, 6.5))
    for l, (x, side) in enumerate(((7.5, 0.45), (8.05, 0.75), (8.9, 1.2)), 1):
        axis.add_patch(Rectangle((x, 6.5 - side / 2), side, side, facecolor="#c9d6e3", edgecolor=KEPT))
        text(axis, x + side / 2, 6.5 + side / 2 + 0.18, f"$H_{l}$", 15)
    for y, colour, n in ((6.9, ONE, 1), (5.1, TWO, 2)):
        arrow(axis, (10.15, 6.5), (10.6, y + 0.4), colour)
        box(axis, 10.65, y, 1.15, 0.8, f"head {n}", "white", colour, 15, colour)
        text(axis, 11.22, y + 1.0, "$L_{seg}$, Eq. 1", 13, FADED)
    draw_answers(axis, photo, answers)


def draw_answers(axis, photo, answers):
    """What the trained network says of a new photo, in both label sets."""
    text(axis, 14.0, 8.68, "afterwards: both label sets", 17, weight="bold")
    x = 12.05
    for pixels, edge in ((photo, INK), *zip((shaded(photo, label, d) for d, label in answers), (ONE, TWO))):
        picture(axis, pixels, x, 6.5, 1.93, edge)
        x += 1.3
    for k, (domain, label) in enumerate(answers):
        ids, pixels = np.unique(label, return_counts=True)
        for row, z in enumerate([z for z in ids[np.argsort(-pixels)] if z > 0][:6]):
            left, top = 12.35 + 1.9 * k, 6.22 - 0.26 * row
            axis.add_patch(Rectangle((left, top - 0.08), 0.2, 0.16, facecolor=domain.palette()[z] / 255,
                                     edgecolor="0.4", linewidth=0.5))
            text(axis, left + 0.28, top, domain.classes[z], 12, ha="left")


def draw_thrown_away(axis, numbers):
    """MSA and MSE of both domains, MST between them, and the losses."""
    box(axis, 0.15, 0.1, 15.7, 4.1, "", PALE, FADED, dashed=True)
    text(axis, 1.0, 3.85, "SST: only while training", 17, FADED, ha="left", weight="bold")
    text(axis, 15.6, 3.85, numbers, 14, FADED, ha="right")
    for y, colour, n in ((2.55, ONE, 1), (0.3, TWO, 2)):
        middle = y + 0.5
        arrow(axis, (0.5, middle), (0.95, middle), FADED)
        box(axis, 1.0, y, 2.1, 1.0, f"MSA {n}\nEq. 2 to 4", "white", colour, 15, colour)
        arrow(axis, (3.15, middle), (4.35, middle), colour, "$S_1, S_2, S_3$", 0.22)
        box(axis, 4.4, y, 2.1, 1.0, f"MSE {n}\nEq. 6, $M_{{intra}}$", "white", colour, 15, colour)
        arrow(axis, (6.55, middle), (8.15, middle), colour, "$X_0, X_1, X_2, X_3$", 0.22)
        box(axis, 8.2, y, 1.6, 1.0, "$L_{aux}$\nEq. 7", "white", colour, 15, colour)
        arrow(axis, (6.55, 2.65 if n == 1 else 1.2), (10.3, 2.2 if n == 1 else 1.65), colour)
    box(axis, 10.35, 1.05, 2.4, 1.75, "MST\nEq. 8, $M_{static}$\nEq. 9, $M_{dynamic}$", "white", INK)
    arrow(axis, (12.8, 1.92), (13.5, 1.92))
    words = "consistency\n$L_{dataset}$, Eq. 10\n$L_{img}$, Eq. 11"
    box(axis, 13.55, 1.05, 2.1, 1.75, words, "white", INK, 14)


def draw(photos, path):
    domains = [builtin_domain(name) for name in ("ccp-coarse", "ccp-fine")]
    samples = []
    for domain in domains:
        image, label = open_dataset(domain.name, photos).load(0)
        samples.append((domain, image, label))
    parser = sst.load()
    photo = np.asarray(Image.open(ROOT / "docs/photo.jpg"))
    answers = [(domain, parser(photo)[domain.name]) for domain in domains]
    kept = sum(p.numel() for p in ParsingNet(domains, "lite").parameters())
    dropped = sum(p.numel() for p in SST(domains, dim=64).parameters())

    sheet = Figure(figsize=(WIDTH, HEIGHT), dpi=100)
    FigureCanvasAgg(sheet)
    axis = sheet.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axis.axis("off")
    text(axis, 5.2, 8.68, "one network", 17, weight="bold")
    text(axis, 5.2, 8.3, f"{kept:,} numbers, kept", 14, KEPT)
    draw_kept(axis, samples, photo, answers)
    draw_thrown_away(axis, f"{dropped:,} numbers, thrown away")
    axis.plot([8.4, 8.4, 0.5, 0.5], [5.8, 4.42, 4.42, 0.8], color=FADED, linewidth=1.8, linestyle=DASHES)
    text(axis, 8.6, 4.62, "feature maps ↓  gradients ↑", 14, FADED, ha="left")
    axis.set_aspect("equal")

    sheet.canvas.draw()
    pixels = np.asarray(sheet.canvas.buffer_rgba())[..., :3].astype(int)
    pixels = pixels // 8 * 8 * 255 // 248  # 5 bits a channel: half the bytes
    Image.fromarray(pixels.astype(np.uint8)).save(path, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(*sys.argv[1:])
