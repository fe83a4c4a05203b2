"""Training, validation and test splits, decided by hashes instead of random numbers.

An image keeps its split when others are added, and on every machine.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

# A group's hash, as a number in [0, 1), falls into one of these intervals.
INTERVALS = {"train": (0.0, 0.90), "validation": (0.90, 0.95), "test": (0.95, 1.0)}

_Group = tuple[bool, str]  # (False, a person's name) or (True, the hash of an image of no person)


def person_names(paths: Sequence[str]) -> list[str]:
    """Return the person that each image shows: the folder it lies in, if there are two or more.

    An image outside of every folder shows no known person: "".
    """
    folders = [str(PurePosixPath(path).parent) for path in paths]
    if len(set(folders)) < 2:
        return [""] * len(folders)
    return ["" if folder == "." else folder for folder in folders]


def assign_splits(hashes: Sequence[str], persons: Sequence[str]) -> list[str]:
    """Assign each image to a split: 90 % train, 5 % validation, 5 % test.

    All images of a person get the same split, by the hash of the name; an image of no person gets
    its own, by its hash. Duplicates never straddle splits: persons that share an image are one
    group, which gets the split of its first member. With fewer than three groups, every image is a
    group of its own.

    With three groups or more, no split is empty: an empty one takes the group that is nearest to
    its interval from a split that has several.
    """
    groups = _join_groups(hashes, persons)
    if len(set(groups)) < len(INTERVALS):
        groups = [(True, digest) for digest in hashes]
    positions = {group: _position(group) for group in groups}
    split_of = {group: _interval(position) for group, position in positions.items()}
    split_of = _fill_empty_splits(split_of, positions)
    return [split_of[group] for group in groups]


def _join_groups(hashes: Sequence[str], persons: Sequence[str]) -> list[_Group]:
    """Return each image's group: the first of all groups that are connected by shared images.

    A union-find over persons and hashes.
    """
    parent: dict[_Group, _Group] = {}

    def root(group: _Group) -> _Group:
        while (above := parent.setdefault(group, group)) != group:
            parent[group] = parent[above]  # halves the path for later calls
            group = above
        return group

    for digest, person in zip(hashes, persons, strict=True):
        first, second = sorted([root((True, digest)), root((not person, person or digest))])
        parent[second] = first
    return [root((True, digest)) for digest in hashes]


def _position(group: _Group) -> float:
    """Return a group's number in [0, 1)."""
    is_hash, name = group
    digest = name if is_hash else hashlib.sha256(name.encode()).hexdigest()
    return int(digest[:13], 16) / 16**13  # 52 bits: exact in a float, and below 1


def _interval(position: float) -> str:
    return next(name for name, (_, end) in INTERVALS.items() if position < end)


def _fill_empty_splits(
    split_of: dict[_Group, str], positions: dict[_Group, float]
) -> dict[_Group, str]:
    """Move groups so that no split is empty, as long as another split has several groups."""
    for name, (start, end) in INTERVALS.items():
        members: dict[str, list[_Group]] = defaultdict(list)
        for group, split in split_of.items():
            members[split].append(group)
        spare = [group for groups in members.values() if len(groups) > 1 for group in groups]
        if name in members or not spare:
            continue
        distance = {g: max(start - positions[g], positions[g] - end) for g in spare}
        nearest = min(spare, key=lambda g: (distance[g], g))
        split_of = {**split_of, nearest: name}
    return split_of
