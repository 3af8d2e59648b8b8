from __future__ import annotations

from dataclasses import replace

import pytest
from families import tiny

from motet.core.errors import UserError
from motet.models.counts import parameters_non_embedding
from motet.models.family.base import member_problems
from motet.models.family.pick import nearest_slice, slice_by_spec
from motet.models.family.space import SliceError, member_of, members_by_size
from motet.models.member import Member

WHOLE = tiny(n_layers=5, d_model=64, d_ffn=192)
HALF = member_of(WHOLE, "half", {"d_ffn": 96})
SHORT = member_of(WHOLE, "short", {"d_ffn": 96, "n_layers": 2})


def size(member: Member | None) -> int:
    return parameters_non_embedding(WHOLE if member is None else member.config)


def test_a_member_or_the_whole_model_is_taken_where_it_is_as_near_as_anything() -> None:
    for member in (None, HALF, SHORT):
        for about in (1.0, 1.004, 0.996):
            found = nearest_slice(WHOLE, [HALF, SHORT], round(size(member) * about), "x")
            assert found.member == member
            assert found.parameters == size(member)
            assert found.gap == pytest.approx(1 / about - 1, abs=1e-4)


def test_between_members_lie_slices_of_their_axes_and_mixtures_of_their_widths() -> None:
    seen = set()
    for target in range(size(HALF), size(None), 997):
        found = nearest_slice(WHOLE, [HALF], target, "x")
        assert abs(found.gap) < 0.07  # half of a step in width, and what is as near
        if found.member in (None, HALF):
            continue
        assert found.member is not None
        config = found.member.config
        assert member_problems(WHOLE, [found.member]) == []
        # Only the hidden width was ever smaller in training.
        assert (config.d_model, config.n_kv_heads, config.n_layers) == (64, 2, 5)
        widths = [config.ffn_width(at) for at in range(5)]
        assert widths == sorted(widths)
        assert min(widths) >= 96
        seen.add(config.layer_ffn is None)
    assert seen == {True, False}


def test_what_is_smaller_than_the_smallest_member_is_near_to_none() -> None:
    with pytest.raises(SliceError, match=r"9k: no slice is near; the nearest have"):
        nearest_slice(WHOLE, [HALF, SHORT], "9k", "x")
    with pytest.raises(ValueError, match="is no size"):
        nearest_slice(WHOLE, [HALF], "some", "x")


def test_all_that_is_wrong_with_a_spec_is_told_at_once() -> None:
    assert slice_by_spec(WHOLE, "half", {"d_ffn": 0.5}, 1) == HALF
    with pytest.raises(UserError, match=r"2 problems(.|\n)*--spec.d_fn(.|\n)*--spec.depth"):
        slice_by_spec(WHOLE, "x", {"d_fn": 1, "depth": 2}, 1)
    with pytest.raises(UserError, match="cannot be cut in 2 equal groups"):
        slice_by_spec(WHOLE, "x", {"d_ffn": 95}, 2)


def test_heads_that_no_class_of_transformers_holds_are_refused_before_training() -> None:
    whole = replace(WHOLE, n_heads=6, n_kv_heads=6, head_dim=16, d_model=96)
    uneven = member_of(whole, "uneven", {"d_model": 64})
    (why,) = member_problems(whole, [uneven])
    assert "use d_model=60 or 66, or n_kv_heads=1 or 2 or 4; it could not be exported" in why
    # Another class holds them, and so does nothing where the whole model has none either.
    assert member_problems(*both(replace(whole, qk_norm="head"), uneven)) == []
    assert member_problems(*both(replace(whole, d_model=100), uneven)) == []
    # A search by size never comes to one.
    for member in members_by_size(whole, ["150k", "100k"], ["d_model", "n_kv_heads"]):
        assert member.config.d_model % member.config.n_heads == 0


def both(whole, member):  # type: ignore[no-untyped-def]
    config = replace(member.config, qk_norm=whole.qk_norm)
    return whole, [replace(member, config=config)]


def test_a_depth_between_members_of_groups_of_layers_keeps_equally_many_of_each() -> None:
    deep = replace(WHOLE, n_layers=8)
    short = member_of(deep, "short", {"n_layers": 4}, 1, 2)
    more = replace(short.config, n_layers=6)
    found = nearest_slice(deep, [short], parameters_non_embedding(more), "x").member
    assert found is not None
    assert found.layers == (0, 2, 3, 4, 5, 7)
