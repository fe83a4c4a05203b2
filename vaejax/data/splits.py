"""Which images are learned from, and which are held out: decided by hashes, not by chance.

An image keeps its split when others are added, and on every machine.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

# A hash, read as a number in [0, 1), falls into one of these.
INTERVALS = {"train": (0.0, 0.90), "validation": (0.90, 0.95), "test": (0.95, 1.0)}

_Group = tuple[bool, str]  # (False, a person) or (True, the hash of an image of nobody)


def persons(paths: Sequence[str]) -> list[str]:
    """The folder that an image lies in names the person, if there are two folders or more.

    An image in none of them is of nobody in particular: "".
    """
    folders = [str(PurePosixPath(path).parent) for path in paths]
    if len(set(folders)) < 2:
        return [""] * len(folders)
    return ["" if folder == "." else folder for folder in folders]


def splits(hashes: Sequence[str], people: Sequence[str]) -> list[str]:
    """The split of each image, 90 % train, 5 % validation, 5 % test.

    All images of a person go the same way, by the hash of the name, and an image of nobody by its
    own. Copies never straddle: persons who have an image in common are one group, which goes the
    way of the first of them. Where that leaves fewer than three groups, every image is one.

    No split is empty, if there are three groups: one that would be takes the group that lies
    nearest to its interval, from a split that has more than one.
    """
    groups = _joined(hashes, people)
    if len(set(groups)) < len(INTERVALS):
        groups = [(True, own) for own in hashes]
    places = {group: _place(group) for group in groups}
    split_of = _filled({group: _interval(place) for group, place in places.items()}, places)
    return [split_of[group] for group in groups]


def _joined(hashes: Sequence[str], people: Sequence[str]) -> list[_Group]:
    """Each image's group: the first of all that common images tie together."""
    leader: dict[_Group, _Group] = {}

    def first(group: _Group) -> _Group:
        while (before := leader.setdefault(group, group)) != group:
            leader[group] = leader[before]  # half the way for whoever asks next
            group = before
        return group

    for own, person in zip(hashes, people, strict=True):
        one, other = sorted([first((True, own)), first((not person, person or own))])
        leader[other] = one
    return [first((True, own)) for own in hashes]


def _place(group: _Group) -> float:
    is_hash, name = group
    digest = name if is_hash else hashlib.sha256(name.encode()).hexdigest()
    return int(digest[:13], 16) / 16**13  # 52 bits: exact in a float, and below 1


def _interval(place: float) -> str:
    return next(name for name, (_, end) in INTERVALS.items() if place < end)


def _filled(split_of: dict[_Group, str], places: dict[_Group, float]) -> dict[_Group, str]:
    """The same, with no split empty as long as there are groups enough."""
    for name, (start, end) in INTERVALS.items():
        members: dict[str, list[_Group]] = defaultdict(list)
        for group, split in split_of.items():
            members[split].append(group)
        spare = [group for groups in members.values() if len(groups) > 1 for group in groups]
        if name in members or not spare:
            continue
        distance = {g: max(start - places[g], places[g] - end) for g in spare}
        nearest = min(spare, key=lambda g: (distance[g], g))
        split_of = {**split_of, nearest: name}
    return split_of
