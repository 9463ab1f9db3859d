"""Masks by name: "cihp: upper-clothes & pascal: lower arms" is where both label sets agree on a sleeve.

A set of classes is written "DOMAIN: class, class"; a comma means either. Between sets, with a space on both
sides, stand | (either), & (both) and - (the first without the second). They are read from left to right,
and parentheses come first.
"""

import difflib
import re

import numpy as np

try:
    from .errors import InputError
except ImportError:  # this file was copied out
    InputError = ValueError

TOKEN = re.compile(r"\s+[|&-]\s+|[()]")
OPERATORS = {"|": np.logical_or, "&": np.logical_and, "-": lambda a, b: a & ~b}


def evaluate(text, masks, domains):
    """The pixels that an expression means, (h, w) bool.

    masks: {name: (h, w) uint8 class ids}. domains: {name: its classes in id order}. Raises InputError with
    the nearest names for a domain or class that there is not, and for what cannot be read.
    """
    tokens = split(text)
    found = union(tokens, text, masks, domains)
    if tokens:
        raise InputError(f"'{text}': a closing parenthesis too many")
    return found


def names_in(text):
    """The label domains that an expression names, and "" for a set that names none."""
    return {token.partition(":")[0].strip() if ":" in token else ""
            for token in split(text) if token not in ("(", ")", *OPERATORS)}


def split(text):
    """The parentheses, operators and sets of an expression, in reverse: `pop()` takes the next."""
    text = f" {text} "
    tokens, start = [], 0
    for match in TOKEN.finditer(text):
        tokens += [text[start:match.start()], match.group()]
        start = match.end()
    return [token.strip() for token in (*tokens, text[start:]) if token.strip()][::-1]


def union(tokens, text, masks, domains):
    """A row of sets and the operators between them, up to the end or a closing parenthesis."""
    found = operand(tokens, text, masks, domains)
    while tokens and tokens[-1] != ")":
        operator = tokens.pop()
        if operator not in OPERATORS:
            raise InputError(f"'{text}': '{operator}' follows a set without |, & or - before it")
        found = OPERATORS[operator](found, operand(tokens, text, masks, domains))
    return found


def operand(tokens, text, masks, domains):
    """A set of classes, or an expression in parentheses."""
    token = tokens.pop() if tokens else ""
    if token == "(":
        found = union(tokens, text, masks, domains)
        if not tokens:
            raise InputError(f"'{text}': a parenthesis is not closed")
        tokens.pop()
        return found
    if not token or token == ")" or token in OPERATORS:
        raise InputError(f"'{text}': a set is missing; write DOMAIN: class, class with |, & or - between "
                         "sets, spaces around them")
    name, colon, classes = token.rpartition(":")
    name = name.strip() if colon else next(iter(domains)) if len(domains) == 1 else ""
    if name not in domains:
        said = f"'{name}' is none of" if name else f"'{token}' does not say which of"
        raise InputError(f"'{text}': {said} the label domains {', '.join(domains)}; write "
                         f"{next(iter(domains))}: class")
    if name not in masks:
        raise InputError(f"'{text}': the label maps given have no '{name}'; they have {', '.join(masks)}")
    known = list(domains[name])
    ids = [known.index(c) if c in known else unknown(c, name, domains, text)
           for c in (part.strip() for part in classes.split(","))]
    return np.isin(masks[name], ids)


def unknown(found, name, domains, text):
    """Raise InputError with the names that are nearest to what was found."""
    near = difflib.get_close_matches(found, domains[name], 3, 0.5) or domains[name]
    others = [other for other, classes in domains.items() if found in classes]
    where = f"; {', '.join(others)} has it" if others else ""
    raise InputError(f"'{text}': '{found}' is no class of {name}, which has {', '.join(near)}{where}")
