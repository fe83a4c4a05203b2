"""Training, validation and test splits, decided by hashes instead of random numbers.

An image without duplicates has the same split on every machine, and keeps it when others are added,
as long as its person, if known, shares no image with another. A run that goes on with changed
images keeps the split of every image it has had: `keep_splits`.
"""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

# A group's hash, as a number in [0, 1), falls into one of these intervals.
INTERVALS = {"train": (0.0, 0.90), "validation": (0.90, 0.95), "test": (0.95, 1.0)}
LEFT_OUT = "left_out"  # an image that would tie two splits together

# Folders of these names hold splits, and no persons.
_NAMES_OF_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_NAMES_OF_SPLITS |= {"dev", "evaluation", "holdout", "heldout"}

# What images have in common: ranked, because a group is named after its first.
_Node = tuple[int, str]
_FOLDER, _FILE, _PIXELS, _PERSON = range(4)


# Persons ------------------------------------------------------------------------------------------


def person_names(paths: Sequence[str], *, depth: int | None = None) -> list[str]:
    """Return the person that each image shows; "" for no known person.

    It is the first folder below those that all images share, such as a zip's only folder; with
    `depth`, the folder at this place of the path, of which the outermost is 1; with 0, nobody.
    Names that differ in upper and lower case only, or in how Unicode composes their letters, are
    one person, who has the first of these spellings.
    """
    depth = person_depth(paths) if depth is None else depth
    folders = [PurePosixPath(path).parts[:-1] for path in paths]
    names = [parts[depth - 1] if 0 < depth <= len(parts) else "" for parts in folders]
    spelling: dict[str, str] = {}
    for name in sorted(set(names)):
        spelling.setdefault(_fold(name), name)
    return [spelling[_fold(name)] for name in names]


def person_depth(paths: Sequence[str]) -> int:
    """Return the place in the paths of the first folder that not all images share; 0 if none."""
    folders = [PurePosixPath(path).parts[:-1] for path in paths]
    if not folders:
        return 0
    first, last = min(folders), max(folders)
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return 0 if shared == len(last) else shared + 1


def doubtful_persons(persons: Sequence[str]) -> str:
    """Say why folders may not name persons: their names, or their number; "" if nothing is odd."""
    names = sorted(set(persons) - {""})
    like_splits = [n for n in names if re.sub(r"[^a-z]", "", n.lower()) in _NAMES_OF_SPLITS]
    if len(like_splits) > 1:
        return f"the folders {', '.join(like_splits[:3])} are taken for persons"
    if 0 < len(names) < len(INTERVALS):
        return (
            f"only {len(names)} {'folders name' if len(names) > 1 else 'folder names'} persons "
            f"({', '.join(names)}), so that a person may be in several splits"
        )
    return ""


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


# The splits of a data set -------------------------------------------------------------------------


class Facts(NamedTuple):
    """What decides on the split of an image."""

    sha256: str  # of the file, in hex
    pixels: str  # hash of the prepared pixels, in hex
    person: str  # "" if unknown
    folder: str  # the path of the folder that the file lies in

    def nodes(self) -> list[_Node]:
        """Return what the image may share with others."""
        image = [(_FILE, self.sha256), (_PIXELS, self.pixels)]
        known = [(_FOLDER, self.folder), (_PERSON, _fold(self.person))]
        return image + known if self.person else image


def assign_splits(images: Sequence[Facts]) -> list[str]:
    """Assign each image to a split: 90 % train, 5 % validation, 5 % test.

    All images of a person get the same split, by the hash of the path of the folder; an image of no
    person gets its own, by the hash of its file. Duplicates never straddle splits, be it of the
    file or of the pixels: persons that share an image are one group, which gets the split of its
    first folder. With fewer than three groups, only duplicates are together.

    With three groups or more, no split is empty: an empty one takes the group that is nearest to
    its interval from a split that has several.
    """
    groups = _groups(images)
    positions = {group: _position(group) for group in groups}
    split_of = {group: _interval(position) for group, position in positions.items()}
    split_of = _fill_empty_splits(split_of, positions)
    return [split_of[group] for group in groups]


def _groups(images: Sequence[Facts]) -> list[_Node]:
    """Return each image's group, by its first folder or file; of persons if there are three."""
    groups = _join([image.nodes() for image in images])
    if len(set(groups)) < len(INTERVALS):
        groups = _join([image._replace(person="").nodes() for image in images])
    return groups


def _join(nodes_of: Sequence[Sequence[_Node]]) -> list[_Node]:
    """Return each image's group: the first of all nodes that are connected by images.

    A union-find.
    """
    parent: dict[_Node, _Node] = {}

    def root(node: _Node) -> _Node:
        while (above := parent.setdefault(node, node)) != node:
            parent[node] = parent[above]  # halves the path for later calls
            node = above
        return node

    for first, *others in nodes_of:
        for other in others:
            one, two = sorted([root(first), root(other)])
            parent[two] = one
    return [root(nodes[0]) for nodes in nodes_of]


def _position(group: _Node) -> float:
    """Return a group's number in [0, 1)."""
    rank, name = group
    digest = name if rank == _FILE else hashlib.sha256(name.encode()).hexdigest()
    return int(digest[:13], 16) / 16**13  # 52 bits: exact in a float, and below 1


def _interval(position: float) -> str:
    return next(name for name, (_, end) in INTERVALS.items() if position < end)


def _fill_empty_splits(
    split_of: dict[_Node, str], positions: dict[_Node, float]
) -> dict[_Node, str]:
    """Move groups so that no split is empty, as long as another split has several groups."""
    for name, (start, end) in INTERVALS.items():
        members: dict[str, list[_Node]] = defaultdict(list)
        for group, split in split_of.items():
            members[split].append(group)
        spare = [group for groups in members.values() if len(groups) > 1 for group in groups]
        if name in members or not spare:
            continue
        distance = {g: max(start - positions[g], positions[g] - end) for g in spare}
        nearest = min(spare, key=lambda g: (distance[g], g))
        split_of = {**split_of, nearest: name}
    return split_of


# The splits of a run whose images have changed ----------------------------------------------------

MIXED = "mixed"  # of a person whose images are in several splits; new ones of her are left out

Known = Mapping[bytes, str]  # the split of each image, and of each person or `MIXED`, by its id


def image_ids(image: Facts) -> tuple[bytes, bytes]:
    """Return the ids by which an image is known: those of its file and of its pixels."""
    return _id((_FILE, image.sha256)), _id((_PIXELS, image.pixels))


def person_id(person: str) -> bytes:
    """Return the id by which a person is known."""
    return _id((_PERSON, _fold(person)))


def _id(node: _Node) -> bytes:
    """Return 16 bytes: names of persons are in no file of a run, and the ids take little space."""
    rank, name = node
    return hashlib.blake2b(f"{rank} {name}".encode(), digest_size=16).digest()


def go_by_persons(images: Sequence[Facts], known: Known) -> bool:
    """Tell whether persons decide on the splits: there are three groups, or they did so before."""
    if any(image.person and person_id(image.person) in known for image in images):
        return True
    return len(set(_join([image.nodes() for image in images]))) >= len(INTERVALS)


def keep_splits(images: Sequence[Facts], splits: Sequence[str], known: Known) -> list[str]:
    """Return the splits of images for a run that has had some of them before.

    An image that is known keeps its split, and a new one gets that of its person. `LEFT_OUT` is
    what would tie different splits: a copy of a known image in the folder of a person of another
    split, and a new image of persons of several splits. Images that have nothing to do with known
    ones keep the split that they have in `splits`.
    """
    if not go_by_persons(images, known):
        images = [image._replace(person="") for image in images]
    split_of_pixels = {
        image.pixels: split
        for image in images
        for split in [next((known[i] for i in image_ids(image) if i in known), None)]
        if split is not None
    }
    split_of_person = {image.person: known.get(person_id(image.person)) for image in images}
    split_of_person[""] = None
    intruders = _intruders(images, split_of_pixels, split_of_person)
    ties = _ties(images, split_of_pixels, split_of_person, intruders)

    def decide(i: int, image: Facts) -> str:
        if intruders[i]:
            return LEFT_OUT
        if image.pixels in split_of_pixels:
            return split_of_pixels[image.pixels]
        tied = ties(image)
        if not tied:
            return splits[i]
        return LEFT_OUT if len(tied) > 1 or MIXED in tied else next(iter(tied))

    return [decide(i, image) for i, image in enumerate(images)]


def _intruders(
    images: Sequence[Facts],
    split_of_pixels: Mapping[str, str],
    split_of_person: Mapping[str, str | None],
) -> list[bool]:
    """Tell of each image whether it is a copy of one of another split, in a known person's folder.

    Without another copy where it belongs, it is the known image, and was moved.
    """

    def belongs(image: Facts) -> bool:
        person = split_of_person[image.person]
        return person in (None, MIXED) or person == split_of_pixels.get(image.pixels, person)

    at_home = {image.pixels for image in images if belongs(image)}
    return [not belongs(image) and image.pixels in at_home for image in images]


def _ties(
    images: Sequence[Facts],
    split_of_pixels: Mapping[str, str],
    split_of_person: Mapping[str, str | None],
    intruders: Sequence[bool],
) -> Callable[[Facts], set[str]]:
    """Return a function that tells the known splits that a new image is tied to.

    It is tied to those of its person, of her or his known images, and of every new person and image
    that it is connected with by new ones.
    """
    present = [image for image, out in zip(images, intruders, strict=True) if not out]
    of_person: dict[str, set[str]] = defaultdict(set)
    for image in present:
        split = split_of_person[image.person]
        of_person[image.person] |= {split} if split else set()
        if image.person and image.pixels in split_of_pixels:
            of_person[image.person].add(split_of_pixels[image.pixels])

    def nodes(image: Facts) -> list[_Node]:
        """Return what new images are connected by: their pixels, and a new person."""
        new = bool(image.person) and split_of_person[image.person] is None
        return [(_PIXELS, image.pixels)] + ([(_PERSON, image.person)] if new else [])

    unknown = [image for image in present if image.pixels not in split_of_pixels]
    groups = dict(zip(unknown, _join([nodes(image) for image in unknown]), strict=True))
    tied: dict[_Node, set[str]] = defaultdict(set)
    for image, group in groups.items():
        tied[group] |= of_person[image.person]
    return lambda image: tied[groups[image]]
