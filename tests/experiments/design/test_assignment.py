"""Assignment: balanced, blocked, clustered, and dependent on names only."""

from __future__ import annotations

import hashlib
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.experiments.design.assignment import (
    Design,
    assign,
    assign_many,
    assign_timing,
    assignment_key,
    make_design,
    permute_within_blocks,
)
from motet.experiments.design.clusters import near_duplicate_clusters, quantile_bins
from motet.experiments.design.places import sorted_places
from motet.experiments.design.spec import Arm
from motet.experiments.design.wording import Wording
from motet.experiments.design.words import WORD
from motet.experiments.stream.random import name_key, philox_grid
from motet.experiments.types import Unit

DRAWS_OF_0_1_0 = {
    60: ["c2a67cabc35c0a7d", "93927be3f0cb442d"],
    3000: ["afa420a088225e39", "a67293af305640c4"],
}
ARMS = (Arm("a", 0), Arm("b", 1), Arm("c", 4))


def units_of(n: int, n_blocks: int = 1, cluster_size: int = 1) -> list[Unit]:
    return [
        Unit(
            f"u{i}",
            ("x",),
            (),
            cluster=f"c{i // cluster_size}",
            block=f"b{i // cluster_size % n_blocks}",
        )
        for i in range(n)
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 60), st.integers(1, 7), st.integers(1, 3), st.randoms(), st.integers(0, 2**60)
)
def test_the_order_of_units_changes_no_assignment(n, blocks, size, random, key) -> None:  # type: ignore[no-untyped-def]
    units = units_of(n, blocks, size)
    shuffled = list(units)
    random.shuffle(shuffled)
    one = dict(
        zip([u.id for u in units], assign(make_design(units, ARMS), key).tolist(), strict=True)
    )
    other = assign(make_design(shuffled, ARMS), key)
    assert one == dict(zip([u.id for u in shuffled], other.tolist(), strict=True))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 80),
    st.integers(1, 6),
    st.lists(st.integers(1, 3), min_size=2, max_size=4),
    st.integers(0, 2**60),
)
def test_arms_are_balanced_in_every_block_and_overall(n, blocks, weights, key) -> None:  # type: ignore[no-untyped-def]
    arms = tuple(Arm(f"a{i}", i, weight=w) for i, w in enumerate(weights))
    units = units_of(n, blocks)
    design = make_design(units, arms)
    labels = assign_many(design, key, 5)
    whole = np.gcd.reduce(weights)
    shares = np.array(weights) // whole
    width = int(shares.sum())
    for draw in labels:
        counts = np.bincount(draw, minlength=len(arms))
        assert np.all(np.abs(counts - n * shares / width) <= shares)
        for block in range(design.n_blocks):
            here = np.bincount(
                draw[design.block_of_cluster[design.cluster_of_unit] == block], minlength=len(arms)
            )
            rounds = here.sum() // width
            assert np.all(here >= rounds * shares)


def test_leftovers_of_small_blocks_are_balanced_over_the_experiment() -> None:
    units = units_of(60, 30)
    labels = assign_many(make_design(units, tuple(Arm(f"a{i}", i) for i in range(4))), 3, 200)
    counts = np.array([np.bincount(draw, minlength=4) for draw in labels])
    assert np.all(counts == 15)


def test_units_of_a_cluster_move_together() -> None:
    units = units_of(90, 2, 3)
    for draw in assign_many(make_design(units, ARMS), 5, 50):
        assert all(len(set(draw[i : i + 3].tolist())) == 1 for i in range(0, 90, 3))


def test_every_unit_gets_every_arm_in_proportion_to_its_weight() -> None:
    units = units_of(11, 3)
    arms = (Arm("a", 0, weight=2), Arm("b", 1), Arm("c", 2))
    draws = assign_many(make_design(units, arms), 9, 20_000)
    for arm, share in enumerate((0.5, 0.25, 0.25)):
        rates = (draws == arm).mean(axis=0)
        assert np.all(np.abs(rates - share) < 0.02)


def test_the_actual_assignment_is_draw_zero_and_draws_do_not_depend_on_their_number() -> None:
    design = make_design(units_of(40, 3), ARMS)
    many = assign_many(design, 77, 300)
    assert np.array_equal(assign(design, 77), many[0])
    assert np.array_equal(assign_many(design, 77, 100), many[:100])
    assert len({draw.tobytes() for draw in many}) == 300


def test_another_experiment_or_seed_is_another_assignment() -> None:
    design = make_design(units_of(60), ARMS)
    keys = [assignment_key(seed, name) for seed in (0, 1) for name in ("x", "y")]
    found = {assign(design, key).tobytes() for key in keys}
    assert len(found) == 4


def test_more_arms_than_clusters_leaves_arms_empty_and_stays_fair() -> None:
    arms = tuple(Arm(f"a{i}", i) for i in range(5))
    draws = assign_many(make_design(units_of(2), arms), 1, 10_000)
    assert np.all(draws[:, 0] != draws[:, 1])
    assert np.all(np.abs(np.bincount(draws[:, 0], minlength=5) / 10_000 - 0.2) < 0.02)


def test_timing_is_balanced_and_apart_from_the_arms() -> None:
    design = make_design(units_of(80, 2), ARMS)
    timing = assign_timing(design, 4)
    assert timing.sum() == 40
    arms = assign_many(design, 5, 400)
    late_share = [timing[draw == 1].mean() for draw in arms]
    assert abs(np.mean(late_share) - 0.5) < 0.02


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), st.integers(0, 2**60))
def test_shuffled_labels_keep_the_counts_of_every_block(blocks: list[int], key: int) -> None:
    block = np.array(blocks)
    labels = (np.arange(len(blocks)) % 2).astype(np.int8)
    for draw in permute_within_blocks(labels, block, key, 20):
        for number in set(blocks):
            assert draw[block == number].sum() == labels[block == number].sum()


def test_near_duplicates_are_one_cluster_and_a_chain_of_them_too() -> None:
    base = [f"word{k}" for k in range(19)]
    changed = [list(base) for _ in range(4)]
    for number, words in enumerate(changed):
        words[: number + 1] = [f"w{number}{k}" for k in range(number + 1)]
    texts = [" ".join(words) for words in changed]
    other = ["an entirely different sentence about rivers and mountains of the north", "short", ""]
    labels = near_duplicate_clusters([*texts, *other, texts[0].upper() + "!"], 0.5)
    assert len(set(labels[:4].tolist())) == 1
    assert len(set(labels[:7].tolist())) == 4
    assert labels[-1] == labels[0]


def test_prefix_filtering_finds_exactly_the_pairs_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    vocabulary = [f"v{k}" for k in range(12)]
    texts = [" ".join(rng.choice(vocabulary, size=rng.integers(2, 14))) for _ in range(120)]
    texts += [text + " " + str(rng.choice(vocabulary)) for text in texts[:60]]

    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        width = min(3, len(words))
        return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)}

    sets = [shingles(text) for text in texts]
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i in range(len(texts)):
        for j in range(i):
            if len(sets[i] & sets[j]) >= 0.4 * len(sets[i] | sets[j]):
                parent[root(i)] = root(j)
    expected = [root(i) for i in range(len(texts))]
    found = near_duplicate_clusters(texts, 0.4).tolist()

    def same(labels: list[int]) -> set[tuple[int, int]]:
        return {(i, j) for i in range(len(texts)) for j in range(i) if labels[i] == labels[j]}

    assert same(found) == same(expected)
    assert same(expected)


def test_many_copies_with_small_changes_are_still_one_cluster() -> None:
    text = " ".join(f"word{k}" for k in range(60))
    texts = [f"{text} tail{i} end{i}" for i in range(400)]
    assert len(set(near_duplicate_clusters(texts).tolist())) == 1


def test_a_long_instruction_before_every_text_makes_no_two_alike() -> None:
    instruction = "Answer the following question as shortly as you can and give no reasons at all. "
    texts = [
        f"{instruction}Who is the mayor of Town{n} in Land{n} by Lake{n} today? Mayor{n} Name{n}"
        for n in range(20)
    ]
    again = [text.replace("Who is", "Tell me who is") for text in texts[:3]]
    assert near_duplicate_clusters(texts + again).tolist() == [*range(20), 0, 1, 2]


SPACELESS = {
    "Chinese": ("山水火木金土日月風雲石田川林竹花草鳥魚虫馬牛羊犬", "国的首都是哪里？答案是"),
    "Japanese": (
        "あいうえおかきくけこさしすせそたちつてとなにぬねの",
        "の首都はどこですか。答えは",
    ),
    "Thai": ("กขคงจชซญดตถทธนบปผพฟมยรลว", "เมืองหลวงของประเทศคือที่ใดคำตอบ"),
    "Lao": ("ກຂຄງຈສຊຍດຕຖທນບປຜຝພຟມຢຣລວ", "ນະຄອນຫຼວງຂອງປະເທດແມ່ນໃສ"),
    "Khmer": ("កខគឃងចឆជឈញដឋឌឍណតថទធនបផពភ", "រាជធានីនៃប្រទេសគឺនៅឯណា"),
    "Burmese": ("ကခဂဃငစဆဇဈညဋဌဍဎဏတထဒဓနပဖဗဘ", "မြို့တော်သည်ဘယ်မှာလဲ"),
}


@pytest.mark.parametrize("script", SPACELESS)
def test_scripts_without_spaces_are_compared_by_their_signs(script: str) -> None:
    signs, template = SPACELESS[script]
    rng = np.random.default_rng(0)
    rows = ["".join(rng.choice(list(signs), size=24)) for _ in range(30)]
    changed = [row[:12] + signs[0] + row[13:] for row in rows[:5]]
    labels = near_duplicate_clusters([*rows, *changed]).tolist()
    assert labels == [*range(30), *range(5)], "one sign of 24 is another"
    asked = [row[:8] + template + row[8:16] for row in rows]
    assert len(set(near_duplicate_clusters(asked).tolist())) == 30, "a form makes no two alike"
    told, again = (Wording.of(texts).grams(3) for texts in (rows[:5], changed))
    shared = [len(np.intersect1d(*(k[t == n] for k, t in (told, again)))) for n in range(5)]
    assert min(shared) >= 19, "experiments are compared by the same rule"


@given(st.text(st.characters(categories=["L", "M", "N", "P", "Z"], max_codepoint=0x0DFF)))
def test_scripts_with_spaces_keep_their_words(text: str) -> None:
    """Latin, Greek, Cyrillic, Hebrew, Arabic, Indian scripts: no cluster of theirs changes."""
    assert WORD.findall(text) == re.findall(r"\w+", text)
    assert WORD.findall("한국어 문장 둘") == ["한국어", "문장", "둘"]


def test_a_shared_template_is_no_duplicate() -> None:
    texts = [
        f"Question: Which river runs past the mills of Town{i} in Land{i}?\nAnswer: River{i}"
        for i in range(300)
    ]
    assert len(set(near_duplicate_clusters(texts).tolist())) == 300


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.integers(1, 5))
def test_quantile_bins_follow_the_order_of_values(values: list[float], n_bins: int) -> None:
    bins = quantile_bins(np.array(values), n_bins)
    assert bins.min() == 0
    assert bins.max() < n_bins
    ordered = sorted(zip(values, bins.tolist(), strict=True))
    assert all(low[1] <= high[1] for low, high in pairwise(ordered))


def test_a_value_that_is_not_finite_gets_a_bin_of_its_own() -> None:
    assert quantile_bins(np.array([1.0, np.nan, 2.0, 3.0, 4.0]), 2).tolist() == [0, -1, 0, 1, 1]


def test_places_are_those_of_a_stable_sort_also_where_keys_agree() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 64, 1000):
        keys = rng.integers(0, 2**64, size=(20, n), dtype=np.uint64)
        keys[5] = keys[5] % np.uint64(7)
        keys[6:9] >>= np.uint64(60)
        keys[9:12] &= np.uint64(7 << 40 | 3)
        for fixed_bits in (None, 0, 9):
            found = sorted_places(keys, fixed_bits)
            assert np.array_equal(found, np.argsort(keys, axis=1, kind="stable")), (n, fixed_bits)


def dealt_one_by_one(design: Design, key: int, draw: int) -> list[int]:
    """The algorithm as the module's first lines tell it, for one draw, cluster by cluster."""
    bits = philox_grid(key, design.cluster_keys, np.array([draw], np.uint64))[0]
    drop = max(1, (design.n_blocks - 1).bit_length())
    divisor = int(np.gcd.reduce(design.weights))
    one_round = [arm for arm, weight in enumerate(design.weights) for _ in range(weight // divisor)]
    width, left, arms = len(one_round), [], [-1] * design.n_clusters
    for block in range(design.n_blocks):
        members = np.flatnonzero(design.block_of_cluster == block).tolist()
        members.sort(key=lambda cluster: (int(bits[cluster]) >> drop, cluster))
        full = len(members) // width * width
        for place, cluster in enumerate(members[:full]):
            arms[cluster] = one_round[place % width]
        left += members[full:]
    names = np.arange(-(-len(left) // width) * width, dtype=np.uint64)
    words = philox_grid(name_key(key, "left over"), names, np.array([draw], np.uint64))[0]
    shuffled = [
        one_round[place]
        for row in words.reshape(-1, width)
        for place in np.argsort(row, kind="stable").tolist()
    ]
    for cluster, arm in zip(left, shuffled, strict=False):
        arms[cluster] = arm
    return [arms[cluster] for cluster in design.cluster_of_unit.tolist()]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.lists(st.integers(1, 3), min_size=2, max_size=5),
    st.integers(0, 2**60),
)
def test_blocks_of_any_size_are_dealt_as_the_algorithm_is_told(
    sizes: list[int], weights: list[int], key: int
) -> None:
    rng = np.random.default_rng(key)
    blocks = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    keys = np.sort(rng.integers(0, 2**64, size=len(blocks), dtype=np.uint64))
    units = rng.permutation(np.repeat(np.arange(len(blocks)), 2))
    design = Design(units, blocks, keys, tuple(weights))
    draws = assign_many(design, key, 3)
    for draw, arms in enumerate(draws.tolist()):
        assert arms == dealt_one_by_one(design, key, draw)


@pytest.mark.parametrize("size", [60, 3000])
def test_the_draws_of_a_key_never_change(size: int) -> None:
    """Hashes of version 0.1.0: a draw that moved would change answers that were given."""
    design = Design(
        np.arange(size),
        np.arange(size) % 7,
        np.arange(size).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15),
        (1, 2, 1),
    )
    draws = assign_many(design, 12345, 400)
    labels = (np.arange(size) % 3 == 0).astype(np.int8)
    shuffled = permute_within_blocks(labels, design.block_of_cluster, 99, 400)
    found = [hashlib.sha256(x.tobytes()).hexdigest()[:16] for x in (draws, shuffled)]
    assert found == DRAWS_OF_0_1_0[size]
