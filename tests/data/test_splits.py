"""Splits follow from hashes, for good, and no image or person is in two of them."""

import hashlib
import random
from collections import Counter
from itertools import pairwise

import pytest

from vaejax.data.splits import (
    LEFT_OUT,
    Facts,
    assign_splits,
    doubtful_persons,
    go_by_persons,
    image_ids,
    keep_splits,
    person_depth,
    person_id,
    person_names,
)

NAMES = ["train", "validation", "test"]


def assign(hashes: list[str], persons: list[str], pixels: list[str] | None = None) -> list[str]:
    """The splits of images whose pixels are equal if their files are, unless they are given."""
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


def test_the_person_is_the_first_folder_that_not_all_images_share():
    paths = ["all/alice/2019/1.png", "all/alice/2020/2.png", "all/Alice/3.png", "all/bob/4.png"]
    assert person_depth(paths) == 2
    assert person_names(paths) == ["Alice", "Alice", "Alice", "bob"]
    assert person_names([*paths, "5.png"]) == ["all"] * 4 + [""]
    assert person_names(paths, depth=3) == ["2019", "2020", "", ""]
    assert person_names(paths, depth=0) == [""] * 4
    composed, decomposed = "Zo\u00eb/1.png", "Zoe\u0308/2.png"  # as Windows and macOS name it
    assert len(set(person_names([composed, decomposed, "bob/3.png"]))) == 2
    assert person_depth([]) == 0
    assert person_names([]) == []


def test_folders_of_splits_and_few_persons_are_doubted():
    assert "the folders Test, train2017 are taken for persons" in doubtful_persons(
        ["train2017", "Test", "Anna", ""]
    )
    assert "only 2 folders name persons (Anna, Bert)" in doubtful_persons(["Bert", "Anna", "Bert"])
    assert doubtful_persons(["Anna", "Bert", "Val"]) == ""
    assert doubtful_persons(["", ""]) == ""


def position(text: str) -> str:
    """The split of a hash, by hand."""
    share = int(text[:13], 16) / 16**13
    return "train" if share < 0.9 else "validation" if share < 0.95 else "test"


def test_images_and_persons_without_duplicates_have_the_splits_that_they_have_always_had():
    own = hashes(2000)
    assert assign(own, nobody(2000)) == [position(digest) for digest in own]
    folders = [f"wrapped/Person {i % 300}" for i in range(2000)]
    persons = person_names([f"{folder}/{i}.png" for i, folder in enumerate(folders)])
    assert persons[0] == "Person 0"
    columns = zip(own, own, persons, folders, strict=True)
    by_path = [position(hashlib.sha256(folder.encode()).hexdigest()) for folder in folders]
    assert assign_splits([Facts(*row) for row in columns]) == by_path


def test_files_with_the_same_pixels_are_in_one_split_only():
    own, pixels = hashes(2000), hashes(1000, start=5000) * 2
    for of in (nobody(2000), people(2000, 2)):  # of two persons, every image counts by itself
        assigned = assign(own, of, pixels)
        assert len(set(zip(pixels, assigned, strict=True))) == 1000
    assert len(set(zip(pixels, assign(own, nobody(2000)), strict=True))) > 1000


# A run whose images change


def facts(image: int, person: str, *, pixels: int | None = None) -> Facts:
    own, shown = hashes(1, start=image)[0], hashes(1, start=image if pixels is None else pixels)[0]
    return Facts(own, f"pixels {shown}", person, person)


def known_of(images: list[Facts], splits: list[str]) -> dict[bytes, str]:
    """What a run knows that had these images."""
    known = {key: s for i, s in zip(images, splits, strict=True) for key in image_ids(i)}
    if go_by_persons(images, {}):
        known |= {person_id(i.person): s for i, s in zip(images, splits, strict=True) if i.person}
    return known


BEFORE = [facts(i, "ABC"[i % 3]) for i in range(9)]
KNOWN = known_of(BEFORE, ["train", "validation", "test"] * 3)


def kept(*added: Facts, before: list[Facts] = BEFORE) -> list[str]:
    """The splits of new images, beside those of before."""
    images = [*before, *added]
    splits = keep_splits(images, assign_splits(images), KNOWN)
    assert splits[: len(before)] == [KNOWN[image_ids(image)[0]] for image in before]
    return splits[len(before) :]


def test_a_new_image_gets_the_split_of_its_person():
    new = [facts(100, "A"), facts(101, "b"), facts(102, "C"), facts(103, "C", pixels=102)]
    assert kept(*new) == ["train", "validation", "test", "test"]
    assert kept(facts(100, "C"), before=BEFORE[:2]) == ["test"]  # whose images are gone
    new = [facts(100 + i, f"new {i}") for i in range(30)]
    assert kept(*new) == assign_splits([*BEFORE, *new])[9:]


def test_a_copy_in_the_folder_of_a_person_of_another_split_is_left_out_and_its_person_stays():
    a_copy_of_a = facts(0, "C")
    assert kept(a_copy_of_a, facts(100, "C"), facts(101, "A")) == [LEFT_OUT, "test", "train"]
    same_pixels = facts(200, "C", pixels=0)
    assert kept(same_pixels, facts(100, "C")) == [LEFT_OUT, "test"]
    assert kept(facts(0, "A")) == ["train"]  # a copy among its own
    twins = facts(100, "A"), facts(101, "C", pixels=100)  # new ones, of two persons
    assert kept(*twins) == [LEFT_OUT] * 2


def test_a_new_person_with_copies_of_two_splits_is_left_out():
    copies = [facts(0, "new"), facts(2, "new")]
    assert kept(*copies, facts(100, "new")) == ["train", "test", LEFT_OUT]
    assert kept(copies[1], facts(100, "new")) == ["test", "test"]


def test_images_that_were_moved_to_another_person_keep_their_splits():
    swap = {"A": "C", "C": "A", "B": "B"}
    swapped = [image._replace(person=swap[image.person]) for image in BEFORE]
    assert kept(facts(100, "A"), facts(101, "B"), before=swapped) == [LEFT_OUT, "validation"]


def test_nothing_is_learned_from_and_held_out_whatever_changes():
    chance = random.Random(0)
    for _ in range(80):
        names = [f"person {i}" for i in range(chance.randint(1, 8))] + [""]
        images = [
            facts(i, chance.choice(names), pixels=chance.randrange(i + 1) if i % 3 else i)
            for i in range(chance.randint(3, 40))
        ]
        images = [image._replace(sha256=hashes(1, start=i)[0]) for i, image in enumerate(images)]
        first = chance.sample(images, chance.randint(1, len(images)))
        splits = assign_splits(first)
        known = known_of(first, splits)
        by_persons = go_by_persons(first, {})
        again = chance.sample(images, chance.randint(1, len(images)))
        for image in chance.sample(again, len(again) // 4):
            again.append(image._replace(person=chance.choice(names)))
        assigned = list(zip(again, keep_splits(again, assign_splits(again), known), strict=True))
        learned = {image.pixels for image, s in zip(first, splits, strict=True) if s == "train"}
        learned |= {image.pixels for image, split in assigned if split == "train"}
        persons = {image.person for image, split in assigned if split == "train"} - {""}
        for image, split in assigned:
            if split in ("validation", "test"):
                assert image.pixels not in learned
                is_new = not any(key in known for key in image_ids(image))
                assert not (by_persons and is_new and image.person in persons)
