"""What a server makes for every visitor of its page: a copy of the page's description, which is his alone to change."""

from __future__ import annotations

import pytest

pytest.importorskip("gradio")

from gradio.blocks import BlocksConfig
from gradio.state_holder import SessionState

from llmq.ui.layout import build
from llmq.ui.shell.endpoints import describe_once
from llmq.ui.shell.state import AppState


@pytest.fixture(scope="module")
def page():
    return build(AppState(run=None, stop=None, device="cpu", device_label="a CPU"))


def test_a_page_is_described_once_for_all_visitors_and_as_gradio_does(page, monkeypatch):
    gradios, described, whole = SessionState(page).config_values, [], BlocksConfig.config_for_block

    def counting(number, *given):
        described.append(number)
        return whole(number, *given)

    monkeypatch.setattr(BlocksConfig, "config_for_block", staticmethod(counting))
    describe_once(page)
    assert [SessionState(page).config_values for _ in range(3)] == [gradios] * 3
    assert sorted(described) == sorted(gradios)


def test_what_one_visitor_changes_no_other_sees(page):
    describe_once(page)
    number = next(number for number, block in page.blocks.items() if getattr(block, "elem_id", "") == "prompt")
    first, second = SessionState(page), SessionState(page)
    first._update_value_in_config(number, "mine")
    changed = type(page.blocks[number])(label="Another", render=False)
    first[number] = changed
    first._update_config(number)
    assert first.config_values[number]["props"]["label"] == "Another"
    for other in (second, SessionState(page)):
        assert other.config_values[number]["props"]["label"] == "Prompt" and other[number] is page.blocks[number]
        assert other.config_values[number]["props"]["value"] != "mine"


def test_a_visitor_costs_no_copy_of_the_page(page):
    describe_once(page)
    first, second = SessionState(page).config_values, SessionState(page).config_values
    assert all(first[number] is second[number] for number in first)
