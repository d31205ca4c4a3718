"""Where two token sequences part, and what still agrees after that."""

from __future__ import annotations

import json

import pytest

from llmq.ui.parts.token_alignment import ALIGN_AT_MOST, diff_tokens


def tokens(ids) -> list[tuple[int, str]]:
    return [(token, f" {token}") for token in ids]


def kinds(ids_a, ids_b) -> tuple[int | None, str, str]:
    """The comparison with one letter a token: p(refix), s(ame), d(iff)."""
    found = diff_tokens(tokens(ids_a), tokens(ids_b))
    letters = ["".join(kind[0] * text.count(" ") for text, kind in pieces) for pieces in found["pieces"]]
    return found["first"], *letters


@pytest.mark.parametrize("ids_a, ids_b, expected", [
    ([1, 2, 3], [1, 2, 3], (None, "ppp", "ppp")),
    ([], [], (None, "", "")),
    ([1, 2, 3, 4], [1, 2, 9, 4], (2, "ppds", "ppds")),
    ([1, 2], [1, 2, 3], (2, "pp", "ppd")),
    ([1, 2, 3, 4, 5], [1, 4, 5], (1, "pddss", "pss")),
    ([7, 1], [8, 2], (0, "dd", "dd")),
])  # fmt: skip
def test_tokens_are_aligned_by_id(ids_a, ids_b, expected):
    assert kinds(ids_a, ids_b) == expected


def test_equal_text_from_different_tokens_differs():
    assert diff_tokens([(1, "ab")], [(2, "ab")])["first"] == 0


def test_long_texts_are_compared_up_to_the_first_difference_only():
    ids = list(range(ALIGN_AT_MOST + 1))
    found = diff_tokens(tokens(ids), tokens([*ids[:100], -1, *ids[100:]]))
    assert (found["first"], found["aligned"]) == (100, False)
    assert [kind for _, kind in found["pieces"][0]] == ["prefix", "diff"]


def test_the_comparison_travels_as_json_with_its_text_untouched():
    value = diff_tokens([(1, "<b>\n")], [(2, "</script>")])
    assert json.loads(json.dumps(value)) == value
    assert value["pieces"] == [[["<b>\n", "diff"]], [["</script>", "diff"]]]


def test_a_character_of_several_tokens_is_whole_and_differs_with_any_of_them():
    """Arabic is two tokens a letter here: the first has no text of its own, and no sign stands for it."""
    found = diff_tokens([(1, ""), (2, "ا"), (3, ""), (4, "ك")], [(1, ""), (2, "ا"), (9, ""), (4, "ت")])
    assert found["pieces"] == [[["ا", "prefix"], ["ك", "diff"]], [["ا", "prefix"], ["ت", "diff"]]]
    assert "".join(text for text, _ in found["pieces"][0]) == "اك"
