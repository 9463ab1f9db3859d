"""Draw docs/sst.png, the picture that opens the README, from a trained demo: its predictions are real.

    python train.py --mode universal
    python tools/make_readme_picture.py runs/universal docs/sst.png

The figure, number 398 of the validation seed, is none that the demo was trained or validated on. It was
chosen among 900 because the demo parses it well; `samples.png` of a run shows unchosen ones.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from figures import figure
from sst import checkpoint
from sst.inference import photo_logits
from sst.plots import colourise

INK, FADED, KEPT = "#22303c", "#6f7d8a", "#2f4b66"
TITLES = {"pascal": "PASCAL-Person-Part", "atr": "ATR", "cihp": "CIHP"}
MODULES = [("MSA", "pools each class's\npixels into a vector", "Eq. 2–4"),
           ("MSE", "lets parts that touch\nlearn from each other", "Eq. 5–7"),
           ("MST", "maps one label set's\nclasses onto another's", "Eq. 8–11")]
DASHES = (0, (4, 3))
MIDDLE = 5.95  # the height at which the photo, the network and its outputs are joined


def box(axis, x, y, w, h, face, edge, dashed=False, width=1.6):
    axis.add_patch(FancyBboxPatch(
        (x + 0.1, y + 0.1), w - 0.2, h - 0.2, boxstyle="round,pad=0.1,rounding_size=0.16",
        facecolor=face, edgecolor=edge, linewidth=width, linestyle=DASHES if dashed else "-"))


def arrow(axis, start, end, colour=INK, dashed=False, both=False, bend=0.0):
    axis.add_patch(FancyArrowPatch(
        start, end, arrowstyle="<|-|>" if both else "-|>", mutation_scale=17, linewidth=2, color=colour,
        linestyle=DASHES if dashed else "-", connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0))


def shaded(image, label, domain):
    """The label map's colours with the photo's light and shade; the background is the photo, paled."""
    brightness = image.mean(axis=2, keepdims=True) / 255
    pale = 255 - 0.3 * (255 - image.astype(float))
    coloured = colourise(label, domain) * (0.86 + 0.19 * brightness)
    return np.where(label[..., None] > 0, coloured, pale).clip(0, 255).astype(np.uint8)


def text(axis, x, y, words, size=16, colour=INK, **more):
    axis.text(x, y, words, **(dict(fontsize=size, color=colour, ha="center", va="center") | more))


def picture(axis, pixels, x, y, side):
    axis.imshow(pixels, extent=(x, x + side, y, y + side), zorder=3, interpolation="lanczos")
    axis.add_patch(Rectangle((x, y), side, side, facecolor="none", edgecolor=INK, linewidth=1.2, zorder=4))


def draw_label_sets(axis, photo, labels, domains):
    """What the network predicts in each label domain, with its most frequent classes as a legend."""
    text(axis, 12.62, 7.93, "three label sets", 21, weight="bold")
    side = 2.4
    for i, domain in enumerate(domains):
        y, label = 5.2 - 2.52 * i, labels[domain.name]
        axis.plot([8.5, 8.78, 8.78], [MIDDLE, MIDDLE, y + side / 2], color=INK, linewidth=2,
                  solid_joinstyle="round")
        arrow(axis, (8.78, y + side / 2), (9.3, y + side / 2))
        picture(axis, shaded(photo, label, domain), 9.36, y, side)
        text(axis, 11.95, y + side - 0.16, TITLES[domain.name], 17, ha="left", weight="bold")
        text(axis, 15.85, y + side - 0.16, f"{domain.num_classes} classes", 15, FADED, ha="right")
        ids, pixels = np.unique(label, return_counts=True)
        shown = [z for z in ids[np.argsort(-pixels)] if z > 0][:10]
        for k, z in enumerate(shown):
            left, top = 11.95 + 2.0 * (k // 5), y + side - 0.66 - 0.38 * (k % 5)
            axis.add_patch(Rectangle((left, top - 0.12), 0.28, 0.24, facecolor=domain.palette()[z] / 255,
                                     edgecolor="0.4", linewidth=0.6))
            text(axis, left + 0.38, top, domain.classes[z], 15, ha="left")


def draw_what_vanishes(axis, dropped):
    """The modules of SST and the number of their parameters."""
    arrow(axis, (7.81, 4.3), (7.81, 3.12), FADED, dashed=True, both=True)
    text(axis, 7.6, 3.45, "feature maps ↓  gradients ↑", 15, FADED, ha="right")
    box(axis, 0.2, 0.14, 8.3, 2.94, "#f4f6f8", FADED, dashed=True)
    text(axis, 0.5, 2.72, "only while training", 21, FADED, ha="left", weight="bold")
    text(axis, 8.24, 2.7, f"{dropped:,} parameters, dropped", 15, FADED, ha="right")
    for i, (name, words, equations) in enumerate(MODULES):
        x = 0.38 + 2.67 * i
        box(axis, x, 0.32, 2.6, 2.04, "white", FADED, dashed=True, width=1.2)
        text(axis, x + 0.2, 1.98, name, 20, FADED, weight="bold", ha="left")
        text(axis, x + 2.42, 1.98, equations, 14, FADED, ha="right")
        text(axis, x + 1.3, 1.08, words, 15, FADED, linespacing=1.5)


def draw(run, path):
    net, domains = checkpoint.load_model(run / "model.pt")
    trained = checkpoint.load(run / "last.pt", "run")["weights"]
    kept = sum(p.numel() for p in net.parameters())
    dropped = sum(w.numel() for name, w in trained.items()
                  if name.startswith("sst.") and not name.endswith(("M_intra", "M_static")))
    photo = figure(2 ** 31, 398, (480, 480)).image
    logits = photo_logits(net, photo, checkpoint.trained_size(net, run / "model.pt"))
    labels = {name: A.argmax(0).numpy() for name, A in logits.items()}

    width, height = 16, 8.3
    sheet = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(sheet)
    axis = sheet.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axis.axis("off")

    text(axis, 1.9, 7.93, "one photo", 21, weight="bold")
    picture(axis, photo, 0.25, 4.3, 3.3)
    arrow(axis, (3.6, MIDDLE), (4.12, MIDDLE))
    text(axis, 6.33, 7.93, "one network", 21, weight="bold")
    for i, (name, shrink) in enumerate((("backbone", 0), ("encoder", 0.45), ("decoder", 0))):
        box(axis, 4.16 + 1.48 * i, 4.35 + shrink, 1.38, 3.2 - 2 * shrink, KEPT, KEPT)
        text(axis, 4.85 + 1.48 * i, MIDDLE, name, 18, "white", rotation=90)
    text(axis, 4.2, 4.03, f"{kept:,} parameters, kept", 15, KEPT, ha="left", weight="bold")
    draw_label_sets(axis, photo, labels, domains)
    draw_what_vanishes(axis, dropped)

    sheet.canvas.draw()
    pixels = np.asarray(sheet.canvas.buffer_rgba())[..., :3].astype(int)
    pixels = pixels // 8 * 8 * 255 // 248  # 5 bits a channel: half the bytes
    Image.fromarray(pixels.astype(np.uint8)).save(path, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(Path(sys.argv[1]), sys.argv[2])
