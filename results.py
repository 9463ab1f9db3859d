"""docs/results.md and its picture, from the cells that experiments.py keeps: `python experiments.py report`.

A cell is {"bed", "variant", "seed", "scores": {what: mIoU %}, "seconds a step", "steps", ...}, and where its
times say nothing, since other work ran beside it, or it ran on a machine of another speed than the baseline,
{"other work": true}. Its variant may hold changed flags:
"multi steps=530" is the baseline with as much time as a variant whose step takes 1.06 times as long.
"""

import math
from pathlib import Path
from statistics import mean, median, stdev

ROOT = Path(__file__).parent
PAGE, PICTURE = ROOT / "docs/results.md", ROOT / "docs/results.png"
BASELINE = "multi"
SAME = {"pool-3": "balanced-photos"}  # test beds that are another one, with another score
# The page's words stay. What is between the two lines GLANCE, and below MARK, is written anew.
GLANCE, MARK = "<!-- glance -->", "<!-- tables -->"

# {variant, or how it begins: words added to its name}: what the table of all test beds shows.
SHOWN = {"cross": "", "cross cross-to=": ", to that head alone", "sst": ""}

# {test bed: (in words, the test bed, the score)}: what the baseline reaches with the labels that are missing.
CEILINGS = {
    "unseen-labels": ("the head `ccp-fine`", "unseen-labels", "ccp-fine on photos"),
    "poor-coarse": ("all 267 photos of `ccp-coarse`", "balanced-photos", "ccp-coarse"),
    "poor-fine": ("all 266 photos of `ccp-fine`", "balanced-photos", "ccp-fine"),
    "poor-pascal-figures": ("2,000 figures of `pascal`", "balanced-figures", "pascal"),
    "poor-cihp-figures": ("2,000 figures of `cihp`", "balanced-figures", "cihp"),
}


class Bed:
    """A test bed's cells. question, score: what it asks, which score counts. names: of variants, in words."""

    def __init__(self, name, question, score, cells, names):
        self.name, self.question, self.score = name, question, score
        self.names = named(name, names)
        self.runs = SAME.get(name, name)
        self.cells = [cell for cell in cells if cell["bed"] == self.runs
                      and (self.runs == name or cell["variant"] in names)]
        self.all = cells
        self.scores, self.others = {}, {}  # {variant: {seed: score}}, and the mean of the other heads'
        for cell in self.cells:
            variant, seed, scores = cell["variant"], cell["seed"], cell["scores"]
            self.scores.setdefault(variant, {})[seed] = scores[score]
            heads = [what for what in scores if what != "mean" and ": " not in what]  # not a class's
            if score in heads and len(heads) > 1:
                others = [scores[head] for head in heads if head != score]
                self.others.setdefault(variant, {})[seed] = mean(others)
        self.variants = sorted(self.scores, key=self.order)
        self.longer = [v for v in self.variants if v.startswith(f"{BASELINE} steps=")]

    def order(self, variant):
        name, *changes = variant.split()
        return list(self.names).index(name), changes

    def label(self, variant):
        name, *changes = variant.split()
        return ", ".join([self.names[name], *changes])

    def seconds(self, variant):
        """The median of its cells' seconds a step; None where other work ran beside all of them."""
        times = [cell["seconds a step"] for cell in self.cells
                 if cell["variant"] == variant and not cell.get("other work")]
        return median(times) if times else None

    def baseline(self, variant):
        """The baseline's variant with the same changes, such as another image size, or with as many steps."""
        changes = variant.split()[1:]
        steps = [change for change in changes if change.startswith("steps=")]
        same = " ".join([BASELINE, *changes])
        return same if same in self.scores else " ".join([BASELINE, *steps])

    def at_equal_time(self, variant, ratio):
        """The comparison with the baseline's run that takes as long as the variant's, or a little longer."""
        if not ratio or self.baseline(variant) != BASELINE:
            return ""
        steps = {cell["variant"]: cell["steps"] for cell in self.cells}
        for longer in sorted(self.longer, key=steps.get):
            if -0.01 <= steps[longer] / steps[BASELINE] - ratio <= 0.08:
                return compared(self.scores[variant], self.scores[longer])
        return ""

    def ceiling(self):
        """Rows of CEILINGS for this test bed, one for each image size of which cells are kept."""
        words, bed, score = CEILINGS.get(self.name, ("", "", ""))
        values = {}  # {the baseline as it is, or with another image size: scores}
        for cell in self.all:
            name, *changes = cell["variant"].split()
            sizes = all(change.startswith(("crop=", "size=")) for change in changes)
            if (cell["bed"], name) == (bed, BASELINE) and sizes:
                values.setdefault(cell["variant"], []).append(cell["scores"][score])
        return [f"| ceiling: {self.label(variant)}, {words} | {spread(scores)} | {len(scores)} | | | | |"
                for variant, scores in sorted(values.items())]

    def rows(self):
        """Lines of Markdown: a row for each variant, and those of the ceiling."""
        lines = []
        for variant in self.variants:
            values, seconds = list(self.scores[variant].values()), self.seconds(variant)
            baseline = self.baseline(variant)
            row = f"| {self.label(variant)} | {spread(values)} | {len(values)} "
            if variant.split()[0] == BASELINE or baseline not in self.scores:
                row += f"| | | | {seconds:.3f} s |" if seconds else "| | | | not measured |"
            else:
                ratio = seconds and self.seconds(baseline) and seconds / self.seconds(baseline)
                row += f"| {compared(self.scores[variant], self.scores[baseline])} | "
                row += self.at_equal_time(variant, ratio) + f" | {self.beside(variant)} | "
                row += f"{ratio:.2f} x |" if ratio else "not measured |"
            lines.append(row)
        return lines + self.ceiling()

    def beside(self, variant):
        """What a variant changes in the mean of the heads that are not scored, at equal steps, in words."""
        baseline = self.baseline(variant)
        return compared(self.others[variant], self.others[baseline]) if variant in self.others else ""

    def glance(self, heading):
        """A row: the baseline, and what the variants SHOWN change at equal steps."""
        baseline = self.scores[BASELINE]
        row = f"| [{self.name}](#{heading}) | {self.score} | {spread(baseline.values())} |"
        for shown in SHOWN:
            variants = [v for v in self.variants if v == shown or shown.endswith("=") and v.startswith(shown)]
            for variant in variants[:1]:
                row += f" {compared(self.scores[variant], baseline)} | {self.beside(variant)} |"
            row += "" if variants else " | |"
        return row

    def commands(self):
        """What gives these cells."""
        groups = {}  # {(changed flags, seeds): names of the variants that have both}
        for variant in self.variants:
            name, *changes = variant.split()
            groups.setdefault((" ".join(changes), tuple(sorted(self.scores[variant]))), []).append(name)
        return [f"python experiments.py run --photos DIR --only {self.runs} --variants {' '.join(names)} "
                + (f'--try "{changes}" ' if changes else "") + f"--seeds {' '.join(map(str, seeds))}"
                for (changes, seeds), names in groups.items()]

    def draw(self, axis):
        """A column of dots for each variant, the mean a line."""
        for x, variant in enumerate(self.variants):
            values = list(self.scores[variant].values())
            axis.plot([x] * len(values), values, "o", color="C0", alpha=0.6)
            axis.plot([x - 0.2, x + 0.2], [mean(values)] * 2, color="C1", linewidth=2)
        axis.set(title=self.name, ylabel=f"{self.score}, mIoU %", xticks=range(len(self.variants)))
        axis.set_xlim(-0.6, len(self.variants) - 0.4)
        labels = [" ".join(w for w in v.split() if not w.startswith("crop=")) for v in self.variants]
        axis.set_xticklabels(labels, rotation=20, ha="right", fontsize=7)
        axis.grid(axis="y", alpha=0.3)


def family_of(bed):
    """ "pool-6" -> "pool": test beds that differ in a number are one table and one panel."""
    family, _, number = bed.rpartition("-")
    return family if number.isdigit() else bed


def heading(beds):
    """The name of the table of one family."""
    return beds[0].name if len(beds) == 1 else family_of(beds[0].name)


def table(beds):
    """Lines of Markdown for the test beds of one family."""
    first = beds[0]
    against = f"against {first.label(BASELINE)}, equal steps"
    commands = [command for bed in beds for command in bed.commands()]
    column, rule = ("| test bed ", "|---") if len(beds) > 1 else ("", "")
    rows = [(f"| {bed.name} " if column else "") + row for bed in beds for row in bed.rows()]
    return [f"## {heading(beds)}", "", first.question, "", "```",
            *dict.fromkeys(commands), "```", "",
            f"{column}| | {first.score}, mIoU % | n | {against} | equal time | the other heads | a step |",
            f"{rule}|---|---|---|---|---|---|---|", *rows, ""]


def at_a_glance(families):
    """Lines of Markdown: every test bed in a row."""
    names = families[0][0].names
    columns = [column for variant, words in SHOWN.items()
               for column in (names[variant.split()[0]] + words, "the other heads")]
    return [f"| test bed | scored | baseline | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|",
            *[bed.glance(heading(beds)) for beds in families for bed in beds]]


def draw_family(axis, beds):
    """The scores over the number in the test beds' names: the seeds dots, the means a line."""
    name, numbers = family_of(beds[0].name), [int(bed.name.rpartition("-")[2]) for bed in beds]
    for k, variant in enumerate(beds[0].names):
        scored = [(n, list(bed.scores[variant].values())) for n, bed in zip(numbers, beds)
                  if variant in bed.scores]
        for n, values in scored:
            axis.plot([n] * len(values), values, "o", color=f"C{k}", alpha=0.4)
        axis.plot(*zip(*[(n, mean(values)) for n, values in scored]), color=f"C{k}", label=variant)
    axis.set(title=name, ylabel=f"{beds[0].score}, mIoU %", xscale="log", xticks=numbers)
    axis.set_xticklabels([f"{name.rpartition('-')[2]} {n}" for n in numbers], fontsize=7)
    axis.minorticks_off()
    axis.legend(fontsize=7)
    axis.grid(axis="y", alpha=0.3)


def named(bed, names):
    """{variant: in words}: what Multi-datasets is in dedicated parsing is fine-tuning."""
    return names | {BASELINE: "Fine-tuning"} if bed.startswith("dedicated") else names


def paired(scores, baseline):
    """Differences, seed by seed, of the seeds that both have."""
    return [scores[seed] - baseline[seed] for seed in sorted(scores.keys() & baseline.keys())]


def compared(scores, baseline):
    """The paired differences in words: mean ± standard error, how many are gains, p."""
    differences = paired(scores, baseline)
    if not differences:
        return "no seed in common"
    better = sum(d > 0 for d in differences)
    words = f"{spread(differences, '+')}, {better} of {len(differences)}"
    return words + (f", p {p_value(differences):.2g}" if len(differences) > 1 else "")


def p_value(differences):
    """Two-sided, of a paired t-test: the tails of Student's density, integrated."""
    n = len(differences)
    if n < 2 or not stdev(differences):
        return float("nan")
    t, nu = abs(mean(differences)) / stdev(differences) * n ** 0.5, n - 1
    constant = math.exp(math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2)) / (nu * math.pi) ** 0.5
    # With x = sqrt(nu) tan(a) the density is constant * sqrt(nu) cos(a)^(nu - 1) over a finite interval.
    start, steps = math.atan(t / nu ** 0.5), 20000
    width = (math.pi / 2 - start) / steps
    tail = sum(math.cos(start + (k + 0.5) * width) ** (nu - 1) for k in range(steps)) * width
    return 2 * constant * nu ** 0.5 * tail


def spread(values, sign=""):
    """Mean and standard error, in words."""
    values = list(values)
    error = f" ± {stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.2f}{error}"


def tuning(cells, names):
    """Lines of Markdown: every setting that was tried on the photos held back."""
    lines = ["## Tuning", "",
             "Trained on four fifths of the training lists, scored on the last fifth. A row names what "
             "differs from the", "preset; `balance=0.25` is the preset's own value today.", "",
             "| test bed | | mIoU % | n |", "|---|---|---|---|"]
    groups = {}
    for cell in cells:
        groups.setdefault((cell["bed"], cell["variant"]), []).append(cell["scores"][cell["score"]])
    for (bed, variant), values in sorted(groups.items()):
        name, *changes = variant.split()
        words = ", ".join([named(bed, names)[name], *changes])
        lines.append(f"| {bed} | {words} | {spread(values)} | {len(values)} |")
    return lines + [""] if cells else []


def picture(families):
    """A panel for each family of test beds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    columns = min(4, len(families))
    rows = -(-len(families) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.4 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, beds in zip(panels, families):
        if len(beds) > 1:
            draw_family(axis, beds)
        else:
            beds[0].draw(axis)
    for axis in panels[len(families):]:
        axis.axis("off")
    figure.savefig(PICTURE)


def report(beds, names, cells, tuned):
    """Write the tables and the picture below the page's words.

    beds: experiments.BEDS. names: {variant: in words}. cells, tuned: of the test beds and of tuning.
    """
    beds = [Bed(name, question, score, cells, names) for name, (question, _, score) in beds.items()]
    families = {}
    for bed in beds:
        if bed.cells:
            families.setdefault(family_of(bed.name), []).append(bed)
    families = list(families.values())
    words = PAGE.read_text().split(MARK)[0] if PAGE.exists() else "# Results\n\n"
    if words.count(GLANCE) == 2:
        before, _, after = words.split(GLANCE)
        words = before + "\n".join([GLANCE, "", *at_a_glance(families), "", GLANCE]) + after
    lines = [MARK, "", "![Every seed a dot, the mean a line](results.png)", ""]
    lines += [line for beds in families for line in table(beds)] + tuning(tuned, names)
    PAGE.write_text(words + "\n".join(lines))
    picture(families)
    print(f"wrote {PAGE.name} and {PICTURE.name} from {len(cells)} cells")
