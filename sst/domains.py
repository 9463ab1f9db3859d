"""Label domains (SST, Sec. 3.1): a dataset's own classes, and the priors that the paper's masks are made of.

A label domain is a value: class names in id order, which of them swap in a mirrored photo, and which touch on
the body (M_intra, Eq. 6). The similarity of two domains' class names is M_static (Eq. 8). The built-in
domains are the JSON files in `sst/builtin/`, written in the very format in which a user adds a domain of
their own (`domain.json`).
"""

import colorsys
import json
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from .errors import InputError

HERE = Path(__file__).parent
BUILTIN = tuple(sorted(path.stem for path in (HERE / "builtin").glob("*.json") if path.stem != "colours"))
IGNORE = 255  # a pixel that no loss, metric or region looks at
# of a domain.json, read by sst/data.py
FILE_KEYS = ("images", "labels", "train", "val", "image_suffix", "label_suffix", "label_orientation")


@dataclass(frozen=True)
class LabelDomain:
    """One label set.

    name:       identifier of letters, digits, "-" and "_".
    classes:    class names in id order; id 0 is the background.
    flip_pairs: pairs of names that change places in a mirrored photo (left arm, right arm).
    adjacency:  pairs of names that touch on the body; None where nobody has said.
    label_map:  class name -> raw labels on disk (integers, or tag names); None where the files hold class
                ids. Raw labels under "ignore" are ignored pixels, and so is 255 unless a class has it.
    colours:    class name -> (r, g, b) in files whose labels are colours; None where they are numbers. Those
                under "ignore", one or a list of them, are ignored pixels.
    aliases:    class name -> the word whose vector stands for it in M_static, for names in any language.
    Raises InputError where these contradict each other; `origin` is the file that the message names.
    """

    name: str
    classes: tuple
    flip_pairs: tuple = ()
    adjacency: tuple | None = None
    label_map: dict | None = None
    colours: dict | None = None
    aliases: dict | None = None
    origin: str = "label domain"

    def __post_init__(self):
        check(self)

    @property
    def num_classes(self):
        """Z, background included."""
        return len(self.classes)

    def index(self, name):
        """The id of a class name."""
        return self.classes.index(name)

    def intra_mask(self):
        """M_intra of Eq. 6: (Z, Z) float32, 1 where two classes touch on the body; symmetric, diagonal 1."""
        if self.adjacency is None:
            raise InputError(f"{self.origin}: domain '{self.name}' says nothing of which classes touch on "
                             "the body; add "
                             f'"adjacency": [["class", "class"], ...] to it, or train with --intra-mask none')
        mask = torch.eye(self.num_classes)
        for a, b in self.adjacency:
            mask[self.index(a), self.index(b)] = mask[self.index(b), self.index(a)] = 1
        return mask

    def flip_index(self):
        """(Z,) int64: the id that each id becomes in a mirrored photo; its own inverse."""
        index = torch.arange(self.num_classes)
        for left, right in self.flip_pairs:
            index[self.index(left)], index[self.index(right)] = self.index(right), self.index(left)
        return index

    def palette(self):
        """(Z, 3) uint8 RGB: related classes of different domains (arms, legs, tops) have related colours."""
        if self.colours:
            return np.array([self.colours[name] for name in self.classes], np.uint8)
        chosen = []
        for i, name in enumerate(self.classes):
            known = colours().get(normalised(name))
            rgb = known if known and known not in chosen else None
            while rgb is None or rgb in chosen:  # a name that we do not know, or another one's synonym
                rgb = hue(i)
                i += self.num_classes
            chosen.append(rgb)
        return np.array(chosen, np.uint8)

    def to_dict(self):
        """Plain lists and dicts, for JSON and checkpoints; `from_dict` reads them back."""
        said = {key: value for key, value in asdict(self).items() if key != "origin"}
        return {key: value for key, value in said.items()
                if value is not None or key not in ("colours", "aliases")}


def from_dict(fields, origin="label domain"):
    """A LabelDomain from the fields of a domain.json; raises InputError naming `origin`."""
    if not isinstance(fields, dict):
        raise InputError(f"{origin}: found {type(fields).__name__}; a label domain is one JSON object with "
                         "name and classes")
    known = ("name", "classes", "flip_pairs", "adjacency", "label_map", "colours", "aliases")
    unknown = [key for key in fields if key not in known + FILE_KEYS]
    if unknown:
        raise InputError(f"{origin}: unknown key '{unknown[0]}'; known are {', '.join(known + FILE_KEYS)}")
    for key in ("name", "classes"):
        if key not in fields:
            raise InputError(f"{origin}: '{key}' is missing; a label domain needs a name and its classes in "
                             "id order")
    for key in FILE_KEYS:
        share = key == "val" and is_share(fields.get(key))
        if key in fields and not isinstance(fields[key], str) and not share:
            raise InputError(f"{origin}: '{key}' is {fields[key]!r}; it must be "
                             + WANTED.get(key, "a path relative to this file"))
    if fields.get("label_orientation") not in (None, "stored", "upright"):
        raise InputError(f"{origin}: 'label_orientation' is {fields['label_orientation']!r}; it must be "
                         + WANTED["label_orientation"])
    for key in ("classes", "flip_pairs", "adjacency"):
        if fields.get(key) is not None and not isinstance(fields[key], (list, tuple)):
            raise InputError(f"{origin}: '{key}' is {fields[key]!r}; it must be a list")
    pairs = {key: None if fields.get(key) is None else tuple(tuple(p) if isinstance(p, (list, tuple)) else p
                                                             for p in fields[key]) for key in known[2:4]}
    flip_pairs, adjacency = pairs["flip_pairs"] or (), pairs["adjacency"]
    return LabelDomain(fields["name"], tuple(fields["classes"]), flip_pairs, adjacency,
                       fields.get("label_map"), fields.get("colours"), fields.get("aliases"),
                       str(origin))


WANTED = {"val": "a path relative to this file, or the share of the photos between 0 and 1 that validates",
          "image_suffix": 'what stands between an id and its ending, such as "_photo"',
          "label_suffix": 'what stands between an id and its ending, such as "_mask"',
          "label_orientation": '"stored" where labels lie as the photo is stored, or "upright" where they '
                               "lie as viewers show it"}


def is_share(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1


def check(domain):
    """Refuse a domain that contradicts itself, in one sentence."""
    where, classes = domain.origin, domain.classes
    if not isinstance(domain.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", domain.name):
        raise InputError(f"{where}: the domain's name is {domain.name!r}; use letters, digits, '-' and '_'")
    if hasattr(torch.nn.ModuleDict, domain.name) or domain.name in ("training", "seg", "aux"):
        raise InputError(f"{where}: '{domain.name}' is a word that PyTorch keeps for itself; give the domain "
                         "another name")
    if not 2 <= len(classes) <= IGNORE:  # a made-up file may claim millions
        raise InputError(f"{where}: {len(classes)} classes; a domain has 2 to {IGNORE} (id {IGNORE} means "
                         "ignored)")
    for name in classes:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise InputError(f"{where}: {name!r} is no class name; classes are non-empty strings without "
                             "control characters, the background first")
        if classes.count(name) > 1:
            raise InputError(f"{where}: class '{name}' is listed twice; every class needs a name of its own")
    for key in ("flip_pairs", "adjacency"):
        for pair in getattr(domain, key) or ():
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise InputError(f"{where}: {key} holds {pair!r}; every entry is a pair of class names")
            for name in pair:
                if name not in classes:
                    raise InputError(f"{where}: {key} names {name!r}, which is not a class; classes are "
                                     f"{', '.join(classes)}")
            if key == "flip_pairs" and classes[0] in pair:
                raise InputError(f"{where}: flip_pairs holds the background '{classes[0]}' (id 0), which has "
                                 "no side; remove that pair")
            if pair[0] == pair[1]:
                raise InputError(f"{where}: {key} pairs '{pair[0]}' with itself; remove that pair")
    paired = [name for pair in domain.flip_pairs for name in pair]
    for name in paired:
        if paired.count(name) > 1:
            raise InputError(f"{where}: '{name}' is in two flip_pairs; a class changes places with one other "
                             "class only")
    if domain.label_map is not None:
        check_label_map(domain)
    if domain.colours is not None:
        check_colours(domain)
    if domain.aliases is not None:
        check_aliases(domain)


def check_label_map(domain):
    where = domain.origin
    if (not isinstance(domain.label_map, dict)
            or not all(isinstance(raws, (list, tuple)) for raws in domain.label_map.values())):
        raise InputError(f'{where}: label_map must map every class to a list of raw labels, {{"class": [raw, '
                         f'...]}}')
    for name in domain.label_map:
        if name not in domain.classes and name != "ignore":
            raise InputError(f"{where}: label_map names '{name}', which is not a class; classes are "
                             f"{', '.join(domain.classes)}")
    for name in domain.classes:
        if name not in domain.label_map:
            raise InputError(f"{where}: label_map lacks class '{name}'; list its raw labels ([] if no file "
                             "holds it)")
    owner = {}
    for name, raws in domain.label_map.items():
        for raw in raws:
            whole = isinstance(raw, int) and not isinstance(raw, bool)
            if not isinstance(raw, str) and not (whole and 0 <= raw <= 255):
                raise InputError(f"{where}: raw label {raw!r} of class '{name}' is neither a tag name nor an "
                                 "integer from 0 to 255")
            if raw in owner:
                raise InputError(f"{where}: raw label {raw!r} is listed twice, in class '{owner[raw]}' and "
                                 f"in class '{name}'; keep one")
            owner[raw] = name
    if len({type(raw) for raw in owner}) > 1:
        raise InputError(f"{where}: label_map mixes tag names and integers; use the kind that the label "
                         "files hold")


def check_colours(domain):
    where, owner = domain.origin, {}
    if domain.label_map is not None:
        raise InputError(f"{where}: holds label_map and colours; labels are numbers or colours, keep one")
    if not isinstance(domain.colours, dict):
        raise InputError(f'{where}: colours must map every class to its colour, {{"class": [r, g, b]}}')
    for name in [*domain.colours, *domain.classes]:
        if name not in domain.classes and name != "ignore":
            raise InputError(f"{where}: colours names '{name}', which is not a class; classes are "
                             f"{', '.join(domain.classes)}")
        if name not in domain.colours:
            raise InputError(f"{where}: colours lacks class '{name}'; every class needs one")
        for colour in colours_of(domain, name):
            if not (isinstance(colour, (list, tuple)) and len(colour) == 3
                    and all(type(v) is int and 0 <= v <= 255 for v in colour)):
                raise InputError(f"{where}: the colour of '{name}' is {colour!r}; write [red, green, blue], "
                                 "each from 0 to 255")
            if owner.setdefault(tuple(colour), name) != name:
                raise InputError(f"{where}: '{name}' has the colour of '{owner[tuple(colour)]}', "
                                 f"{list(colour)}; every class needs one of its own")


def colours_of(domain, name):
    """The colours of a class, or those that are ignored, in a list."""
    value = domain.colours[name]
    several = name == "ignore" and isinstance(value, (list, tuple)) and all(
        isinstance(v, (list, tuple)) for v in value)
    return value if several else [value]


def check_aliases(domain):
    where = domain.origin
    if not isinstance(domain.aliases, dict):
        raise InputError(f'{where}: aliases must map class names to English words, {{"Kopf": "head"}}')
    for name, word in domain.aliases.items():
        if name not in domain.classes:
            raise InputError(f"{where}: aliases names '{name}', which is not a class; classes are "
                             f"{', '.join(domain.classes)}")
        if not isinstance(word, str) or normalised(word) not in vocabulary():
            raise InputError(f"{where}: the alias of '{name}' is {word!r}, which has no word vector; take "
                             "one of the words of tools/make_label_vectors.py")


def read_class_map(file, head, domain):
    """(P,) int64: the id in `domain` of each class of the label domain `head`, or Z for none.

    file: a JSON object {"class of head": "class of domain" or null, ...} with every class of head.
    Raises InputError.
    """
    names = read_object(file, f"write one JSON object that gives every class of {head.name} a class of "
                              f"{domain.name}, or null")
    for name in [*names, *head.classes]:
        if name not in head.classes:
            raise InputError(f"{file}: maps '{name}', which is no class of {head.name}; classes are "
                             f"{', '.join(head.classes)}")
        if name not in names:
            raise InputError(f"{file}: lacks '{name}'; every class of {head.name} needs a class of "
                             f"{domain.name}, or null for none")
        if names[name] is not None and names[name] not in domain.classes:
            raise InputError(f"{file}: maps '{name}' to {names[name]!r}, which is no class of {domain.name}; "
                             f"use null or one of {', '.join(domain.classes)}")
    to = [names[name] for name in head.classes]
    return np.array([domain.num_classes if name is None else domain.index(name) for name in to])


def read_masks(file, domains, others=()):
    """Matrices of one's own for Eq. 6 and 8: {name: M_intra (Z, Z)}, {(name_1, name_2): M_static (Z_2, Z_1)}.

    file: JSON, {"intra": {"NAME": [[0 or 1]]}, "static": {"NAME_1:NAME_2": [[number]]}}. One may be missing.
    domains: LabelDomains whose matrices are read. others: names that the file may hold too.
    Raises InputError for unknown names, wrong shapes and wrong values.
    """
    fields = read_object(file, 'write {"intra": {"NAME": [[...]]}, "static": {"NAME_1:NAME_2": [[...]]}}')
    for key, entries in fields.items():
        if key not in ("intra", "static") or not isinstance(entries, dict):
            raise InputError(f"{file}: holds '{key}'; it may hold two objects, 'intra' and 'static', with a "
                             "matrix for each name")
    known = {d.name: d for d in domains}
    allowed = [*known, *others]
    intra, static = {}, {}
    for name, rows in fields.get("intra", {}).items():
        if name not in allowed:
            raise InputError(f"{file}: intra names '{name}'; the run's label domains are "
                             f"{', '.join(allowed)}")
        if name in known:
            Z = known[name].num_classes
            intra[name] = as_matrix(rows, (Z, Z), f"{file}: intra of '{name}'")
            for value in intra[name].unique():
                if value not in (0, 1):
                    raise InputError(f"{file}: intra of '{name}' holds {value:g}; M_intra holds 0 and 1 only")
    for pair, rows in fields.get("static", {}).items():
        one, _, two = pair.partition(":")
        if one not in allowed or two not in allowed or one == two:
            raise InputError(f"{file}: static names '{pair}'; write NAME_1:NAME_2 with two of the run's "
                             f"label domains, {', '.join(allowed)}")
        if (two, one) in static:
            raise InputError(f"{file}: static holds both {two}:{one} and {pair}; keep one, its transpose is "
                             f"the other")
        if one in known and two in known:
            shape = known[two].num_classes, known[one].num_classes
            static[one, two] = as_matrix(rows, shape, f"{file}: static of '{pair}'")
    return intra, static


def as_matrix(rows, shape, where):
    """Lists of numbers -> a tensor of that shape, float32, finite; raises InputError."""
    try:
        matrix = torch.tensor(rows, dtype=torch.float32)
    except (TypeError, ValueError):  # rows of different lengths, or no numbers
        matrix = None
    if matrix is None or tuple(matrix.shape) != shape or not matrix.isfinite().all():
        found = "no matrix of finite numbers" if matrix is None or tuple(matrix.shape) == shape else (
            f"shape {' x '.join(map(str, matrix.shape))}")
        raise InputError(f"{where}: {found}; write {shape[0]} rows of {shape[1]} numbers, classes in id "
                         "order")
    return matrix


def read_object(file, wanted):
    """The JSON object in a file; raises InputError that says what is wanted."""
    try:
        fields = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({' '.join(str(error).split())}); {wanted}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{file}: found {type(fields).__name__}; {wanted}")
    return fields


def numbering(spec, domains):
    """"DOMAIN=FILE" -> (domain's name, (Z,) uint8: the number of each of its classes in another repository).

    FILE holds {class: number from 0 to 255} for every class, or is the name of one that is built in. domains:
    {name: LabelDomain}. Raises InputError.
    """
    name, _, file = spec.partition("=")
    shipped = {path.stem: path for path in sorted((HERE / "builtin/numberings").glob("*.json"))}
    if name not in domains or not file:
        raise InputError(f"--numbering {spec}: write DOMAIN=FILE, DOMAIN being one of {', '.join(domains)}; "
                         f"built in are {', '.join(shipped)}")
    path, classes = shipped.get(file, Path(file)), domains[name].classes
    try:
        numbers = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({' '.join(str(error).split())}); give {{class: "
                         f"number}}, or one of {', '.join(shipped)}") from None
    if not isinstance(numbers, dict) or set(numbers) != set(classes):
        wrong = sorted(set(numbers) ^ set(classes)) if isinstance(numbers, dict) else ["no object"]
        raise InputError(f"{path}: does not number the classes of '{name}': {', '.join(wrong)}; every class "
                         "of it needs a number, and nothing else has one")
    for c, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= 255:
            raise InputError(f"{path}: '{c}' has the number {number!r}; give whole numbers from 0 to 255")
    return name, np.array([numbers[c] for c in classes], np.uint8)


@cache
def builtin_domain(name):
    """The built-in domain of that name; raises InputError with the list of names."""
    if name not in BUILTIN:
        raise InputError(f"unknown label domain '{name}'; built in are {', '.join(BUILTIN)}, and any other "
                         "NAME needs a folder with a domain.json: NAME=FOLDER")
    path = HERE / "builtin" / f"{name}.json"
    return from_dict(json.loads(path.read_text()), f"built-in domain {name}")


def normalised(name):
    """A class name as the vocabulary and the colour table spell it: lower case, single spaces."""
    return re.sub(r"[-_\s]+", " ", name.lower()).strip()


@cache
def vocabulary():
    """{normalised name: (384,) float32 unit vector} from sst/label_vectors.npz (made by
    tools/make_label_vectors.py)."""
    with np.load(HERE / "label_vectors.npz") as file:
        vectors = file["vectors"].astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return dict(zip(file["names"].tolist(), vectors))


def vector(domain, name):
    """The word vector of a class, (384,), or None."""
    return vocabulary().get(normalised((domain.aliases or {}).get(name, name)))


def word_similarity(a, b):
    """M_static of Eq. 8: (Z_a, Z_b) float32, cosine similarity of the class names' word embeddings.

    Raises InputError for a name outside the vocabulary.
    """
    def embed(domain):
        rows = []
        for name in domain.classes:
            row = vector(domain, name)
            if row is None:
                raise InputError(f"{domain.origin}: class '{name}' has no word vector; name a word that has "
                                 f'one, "aliases": {{"{name}": "hat"}}, or train with --lam 0 --cross 0, or '
                                 "give a matrix of your own: --masks FILE.json")
            rows.append(row)
        return torch.from_numpy(np.stack(rows))
    return embed(a) @ embed(b).T


@cache
def colours():
    """{normalised class name: RGB} of the names that we know."""
    table = json.loads((HERE / "builtin" / "colours.json").read_text())
    return {name: tuple(int(code[i:i + 2], 16) for i in (1, 3, 5)) for name, code in table.items()}


def hue(index):
    """The index-th of an endless series of distinct colours."""
    # golden ratio: neighbours in the series are far apart on the colour wheel
    turn = index * 0.61803398875 % 1
    saturation, value = 0.55 + 0.35 * (index % 2), 0.95 - 0.25 * (index % 3)
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(turn, saturation, value))
