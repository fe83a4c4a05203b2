"""Splits follow from hashes, for good, and no image or person is in two of them."""

import hashlib
import random
from collections import Counter
from itertools import pairwise

import pytest

from vaejax.data.splits import Facts, assign_splits, person_names

NAMES = ["train", "validation", "test"]


def assign(hashes: list[str], persons: list[str], pixels: list[str] | None = None) -> list[str]:
    """The splits of images that are duplicates if their files are, unless their pixels are given."""
    columns = hashes, pixels or hashes, persons, persons
    return assign_splits([Facts(*row) for row in zip(*columns, strict=True)])


def hashes(n: int, *, start: int = 0) -> list[str]:
    return [hashlib.sha256(f"{i}".encode()).hexdigest() for i in range(start, start + n)]


def nobody(n: int) -> list[str]:
    return [""] * n


def people(images: int, n: int) -> list[str]:
    return [f"person {i % n}" for i in range(images)]


def test_90_5_and_5_percent():
    shares = Counter(assign(hashes(20_000), nobody(20_000)))
    assert list(shares) == NAMES
    assert abs(shares["train"] - 18_000) < 150  # a little over 3 standard deviations
    assert abs(shares["validation"] - 1_000) < 100
    assert abs(shares["test"] - 1_000) < 100


def test_of_many_persons_90_5_and_5_percent():
    of = dict(zip(people(9000, 3000), assign(hashes(9000), people(9000, 3000)), strict=True))
    shares = Counter(of.values())
    assert abs(shares["train"] - 2700) < 50
    assert abs(shares["validation"] - 150) < 40


def test_added_images_leave_the_others_in_their_splits():
    before = assign(hashes(1000), nobody(1000))
    assert assign(hashes(3000), nobody(3000))[:1000] == before
    before = assign(hashes(1000), people(1000, 100))
    added = people(1000, 100) + people(2000, 250)  # more of the same persons, and new ones
    assert assign(hashes(3000), added)[:1000] == before


def test_the_splits_do_not_depend_on_the_order_of_the_images():
    own, of = hashes(300), people(300, 40)
    own += own[:30]  # duplicates, most of them of other persons
    of += of[7:37]
    expected = dict(zip(zip(own, of, strict=True), assign(own, of), strict=True))
    for seed in range(5):
        order = random.Random(seed).sample(range(330), 330)
        assigned = assign([own[i] for i in order], [of[i] for i in order])
        assert assigned == [expected[own[i], of[i]] for i in order]


def test_a_person_is_in_one_split_only():
    of = people(1000, 49)
    assigned = set(zip(of, assign(hashes(1000), of), strict=True))
    assert len(assigned) == 49
    assert {split for _, split in assigned} == set(NAMES)


def test_duplicates_are_in_one_split_only_even_of_two_persons():
    own, of = hashes(1000), people(1000, 50)
    own += own[:10]
    of += of[1:11]  # an image of person i is one of person i + 1 too, for ten of them
    assigned = assign(own, of)
    assert len(set(zip(own, assigned, strict=True))) == 1000
    assert len(set(zip(of, assigned, strict=True))) == 50
    assert (
        len({split for person, split in zip(of, assigned, strict=True) if person in of[:11]}) == 1
    )


def test_a_chain_of_persons_with_common_images_is_one_group_in_any_order():
    links = [(f"{i:03}", a) for i, pair in enumerate(pairwise("abcdefgh")) for a in pair]
    alone = [(own, own) for own in hashes(40)]
    for seed in range(20):
        images = random.Random(seed).sample(links + alone, len(links) + len(alone))
        assigned = assign(
            [hashlib.sha256(own.encode()).hexdigest() for own, _ in images],
            [person if person in "abcdefgh" else "" for _, person in images],
        )
        of_chain = {
            s for s, (_, person) in zip(assigned, images, strict=True) if person in "abcdefgh"
        }
        assert len(of_chain) == 1


def test_a_duplicate_outside_of_folders_gets_the_split_of_the_person():
    own, of = hashes(200), people(200, 20)
    with_duplicates = assign(own + own, of + nobody(200))
    assert with_duplicates == assign(own, of) * 2


@pytest.mark.parametrize("groups", [3, 4, 7, 20])
@pytest.mark.parametrize("of_persons", [True, False])
def test_no_split_is_empty_where_there_are_three_groups(groups: int, of_persons: bool):
    for start in range(0, 2000, 50):
        own = hashes(groups * 2 if of_persons else groups, start=start)
        of = [f"{start} {i % groups}" if of_persons else "" for i in range(len(own))]
        assigned = assign(own, of)
        assert set(assigned) == set(NAMES)
        assert len(set(zip(of, assigned, strict=True))) == (groups if of_persons else 3)
        if groups == 20:
            assert Counter(assigned)["train"] >= len(own) // 2


def test_with_two_persons_images_are_held_out():
    assigned = assign(hashes(1000), people(1000, 2))
    assert assigned == assign(hashes(1000), nobody(1000))


def test_folders_name_persons_if_there_are_two():
    assert person_names(["Anna/1.png", "Anna/2.png", "Bert/1.png"]) == ["Anna", "Anna", "Bert"]
    assert person_names(["lfw/Anna/1.png", "lfw/Bert/1.png"]) == ["Anna", "Bert"]
    assert person_names(["Anna/1.png", "2.png"]) == ["Anna", ""]
    assert person_names(["faces/1.png", "faces/2.png"]) == ["", ""]
    assert person_names(["1.png", "2.png"]) == ["", ""]
