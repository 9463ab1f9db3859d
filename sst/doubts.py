"""What looks right in label maps and is wrong: nearly all ignored, one class alone, ids exchanged."""

import json

import numpy as np

from .domains import IGNORE
from .errors import InputError

SAMPLE = 300  # label maps that training and evaluation look at before they begin
MOSTLY = 0.9  # more of a list's pixels than this are ignored: one class may be missing from label_map
LEAST = 1.5  # pairs of classes that an exchange of ids must set right before it is named
FEWEST = 10  # photos that hold two classes, before the share in which they touch says anything


def doubts(dataset, training, most=SAMPLE):
    """Sentences about label maps that can be read but may not mean what their user thinks.

    training: it is a training list, which should hold every class. Looks at up to `most` of them, evenly
    spread. Figures have none.
    """
    if not hasattr(getattr(dataset, "dataset", dataset), "label") or not len(dataset):
        return []
    chosen = range(0, len(dataset), -(-len(dataset) // most))
    pixels = np.zeros(256, np.int64)
    for i in chosen:
        try:
            pixels += np.bincount(dataset.label(i).ravel(), minlength=256)
        except InputError:  # said where it is read to be used
            continue
    looked = "its" if len(chosen) == len(dataset) else f"{len(chosen)} of its {len(dataset)}"
    return doubts_of(dataset.domain, pixels, f"{looked} label maps", training)


def doubts_of(domain, pixels, where, training):
    """Sentences about the number of pixels (256,) of each id in some label maps, `where` in words."""
    found, said = pixels[:domain.num_classes], []
    if not pixels.sum():
        return []
    if pixels[IGNORE] > MOSTLY * pixels.sum():
        said.append(f"{pixels[IGNORE] / pixels.sum():.0%} of the pixels of {where} are ignored (255); if 255 "
                    'is a class there, give the domain a label_map, {"background": [0], "person": [255]}')
    never = [name for name, n in zip(domain.classes, found) if not n]
    only = [name for name, n in zip(domain.classes, found) if n]
    if len(only) == 1:
        said.append(f"{where} hold one class alone, '{only[0]}'; the mIoU of one class says nothing: look at "
                    "the numbers that the files hold, and give the domain a label_map")
    elif never and training:
        said.append(f"{where} never hold {', '.join(never)}")
    return [f"domain '{domain.name}': {sentence}" for sentence in said]


def exchanged(domain, tally):
    """Sentences about classes whose ids are exchanged, as the body's neighbourhoods show.

    The shares of photos in which pairs of classes touch are compared with the domain's adjacency, as the ids
    are and with those of two classes exchanged. An exchange is named that sets LEAST pairs right; beside it
    any that helps and is of the same words: who exchanged upper and lower legs did so with the arms.
    """
    if domain.adjacency is None:
        return []
    Z, names, M = domain.num_classes, domain.classes, domain.intra_mask().numpy()
    share = tally.touching / np.maximum(tally.together, 1)
    share[tally.together < FEWEST] = np.nan  # which says nothing

    def gain(order, other):
        """By how much shares are nearer to the adjacency, over pairs, if class k has the id other[k]."""
        was, would = (np.abs(share[np.ix_(ids, ids)] - M)[1:, 1:] for ids in (order, other))
        return np.nansum(np.triu(was - would, 1))  # without the background, which touches anything

    def exchange(order, a, b):
        return [order[{a: b, b: a}.get(k, k)] for k in range(Z)]

    order, found, sentences = list(range(Z)), [], []
    while True:
        gains = [(gain(order, exchange(order, a, b)), a, b) for a in range(1, Z) for b in range(a + 1, Z)]
        kin = [g for g in gains if differing(names, *g[1:]) in [differing(names, *pair) for pair in found]]
        most, a, b = max(gains, default=(0, 0, 0))
        if most < LEAST:
            most, a, b = max(kin, default=(0, 0, 0))
            if most <= 0.1:
                break
        order, found = exchange(order, a, b), [*found, (a, b)]
    for a, b in found:
        # The class that touches one of them on the body and not the other, and in the labels the other.
        c = max((c for c in range(1, Z) if c not in (a, b)), default=0,
                key=lambda c: np.nan_to_num((M[c, a] - M[c, b]) * (share[c, b] - share[c, a])))
        near, far = (a, b) if M[c, a] else (b, a)
        sentences.append(f"ids {a} and {b} may be exchanged: {names[c]} touches {names[far]} in "
                         f"{share[c, far]:.0%} of the photos that hold both, and {names[near]} in "
                         f"{share[c, near]:.0%}")
    if found:
        proposal = {name: [order[k]] for k, name in enumerate(names)}
        sentences[-1] += f'; if so, give the domain "label_map": {json.dumps(proposal, ensure_ascii=False)}'
    return sentences


def differing(names, a, b):
    """The words in which two class names differ: upper, lower for upper legs, lower legs."""
    return set(names[a].split()) ^ set(names[b].split())
