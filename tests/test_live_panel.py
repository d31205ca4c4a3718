"""What the live panel is given: how events accumulate, how numbers read, what an update weighs on the wire."""

from __future__ import annotations

import json
import random

import pytest
from gradio.utils import diff as gradio_diff

from llmq.errors import BadChoice
from llmq.events import Failed, Finished, Freed, Loaded, Loading, Memory, Planned, Prefilled, Step, Waiting
from llmq.formatting import MISSING, format_bytes, format_count, format_number, format_seconds, format_speed
from llmq.ui.parts.live_state import FULL_RATE, SPACING_SECONDS, SPEED_WINDOW, LiveState

THREE = {"fp16": "fp16 × fp16", "bnb-int8": "int8 × int8 + fp16 outliers", "llm-int8@3.5": "int8 × int8"}
ENVELOPE_BYTES = 330  # what Gradio wraps around one update, measured


def step(name: str, index: int, seconds: float = 0.02) -> Step:
    return Step(contestant=name, index=index, token_id=index, text="a", seconds=seconds, logprob=-1.0)


def ledger(count: int) -> dict[str, int]:
    return {"weights": count, "scales": 0, "kv": 0, "workspace": 0}


def memory(at: float, **figures) -> Memory:
    return Memory(at=at, **figures)


def gpu_memory(at: float, names=THREE) -> Memory:
    count = int(13.4e9 + at * 5e6)
    figures = {"device_bytes": count * 2, "device_process_bytes": count + 10**9, "allocated_bytes": count}
    return memory(at, process_bytes=2 * 10**9, ledger={name: ledger(count) for name in names}, **figures)


def column(value: dict, key: str) -> list:
    position = [entry["key"] for entry in value["columns"]].index(key) + 1
    return [row[position] if position < len(row) else None for row in value["samples"]]


def scripted_run(tokens: int = 512):
    """Three contestants side by side, sampled ten times a second, as (seconds since the start, event)."""
    noise, now, sampled = random.Random(0), 0.0, 0.0
    yield now, Planned(schedule="", reason="", prompt_tokens=9, predicted_bytes={}, free_bytes=1, device="cuda:0")
    for name in THREE:
        yield now, Loading(contestant=name, message="reading weights")
        yield now, Loaded(contestant=name, weight_bytes=7 * 10**9, seconds=3.0)
    for name in THREE:
        yield now, Prefilled(contestant=name, prompt_tokens=9, seconds=0.2)
        yield now, step(name, 0, 0.0)
    for index in range(1, tokens):
        for name in THREE:
            seconds = 0.02 + noise.random() / 100
            now += seconds
            yield now, step(name, index, seconds)
            while sampled < now:
                sampled += 0.1
                yield now, gpu_memory(sampled)
    for name in THREE:
        yield now, Finished(contestant=name, reason="length", peak_bytes=14 * 10**9)


def test_updates_stay_small_and_points_are_never_rewritten():
    state, sent, last, sizes = LiveState(THREE, run="1"), None, 0.0, []
    for now, event in scripted_run():
        state.add(event)
        if now - last >= 0.2:
            last, value = now, state.value()
            edits = gradio_diff(sent, value) if sent else []
            assert all(operation == "add" for operation, path, _ in edits if path[0] == "samples")
            sizes.append(len(json.dumps(edits, separators=(",", ":"), ensure_ascii=False).encode()))
            sent = value
    assert len(sizes) > 150
    assert max(sizes) + ENVELOPE_BYTES < 2000


def test_a_snapshot_does_not_change_afterwards():
    state = LiveState(THREE, run="1")
    state.add(gpu_memory(0.0))
    before = state.value()
    copy = json.loads(json.dumps(before))
    for _, event in scripted_run(20):
        state.add(event)
    assert before == copy and state.value() != copy


def test_decode_speed_is_tokens_over_summed_step_seconds_without_the_prefill_token():
    state = LiveState({"fp16": ""}, run="1")
    state.add(Prefilled(contestant="fp16", prompt_tokens=3, seconds=1.5))
    for index, seconds in enumerate([0.0, 0.1, 0.3, 0.4]):
        state.add(step("fp16", index, seconds))
    card = state.value()["cards"][0]
    assert card["speed"] == format_speed(3 / 0.8)
    assert (card["first_token"], card["tokens"], card["state"]) == ("1.50 s", "4", "decoding")


def test_the_speed_curve_follows_the_last_steps_only():
    state = LiveState({"fp16": ""}, run="1")
    state.add(Prefilled(contestant="fp16", prompt_tokens=3, seconds=1.5))
    for index in range(1, 101):
        state.add(step("fp16", index, 1.0))
    for index in range(101, 101 + SPEED_WINDOW):
        state.add(step("fp16", index, 0.1))
    state.add(memory(9.0, process_bytes=10**9))
    assert column(state.value(), "speed0") == [10.0]


def test_a_slow_contestant_keeps_its_speed_between_steps_and_loses_it_when_finished():
    state = LiveState({"fp16": ""}, run="1")
    state.add(Prefilled(contestant="fp16", prompt_tokens=3, seconds=1.5))
    state.add(memory(0.0))
    state.add(step("fp16", 1, 2.0))
    for at in (1.0, 2.0):
        state.add(memory(at))
    state.add(Finished(contestant="fp16", reason="eos"))
    state.add(memory(3.0))
    assert column(state.value(), "speed0") == [None, 0.5, 0.5, None]


@pytest.mark.parametrize("sample, label, key", [
    (memory(0.0, process_bytes=10**9), "Process memory", "process"),
    (gpu_memory(0.0), "VRAM", "device"),
    (memory(0.0, process_bytes=10**9, allocated_bytes=5), "VRAM", "allocated"),
])  # fmt: skip
def test_memory_is_named_for_what_was_measured(sample, label, key):
    state = LiveState(THREE, run="1")
    state.add(sample)
    value = state.value()
    keys = [entry["key"] for entry in value["columns"]]
    assert value["memory"] == label and key in keys
    assert ("process" in keys) == (label == "Process memory")


def test_a_column_that_comes_late_leaves_earlier_rows_alone():
    state = LiveState({"fp16": ""}, run="1")
    state.add(memory(0.0, device_bytes=2 * 10**6))
    early = state.value()["samples"][0]
    state.add(memory(1.0, device_bytes=2 * 10**6, allocated_bytes=10**6))
    value = state.value()
    assert value["samples"][0] == early
    assert column(value, "allocated") == [None, 1.0]


def test_a_kept_sample_carries_the_peak_of_the_samples_it_stands_for():
    state = LiveState({"fp16": ""}, run="1")
    for at, count in [(0.0, 1), (0.05, 9), (0.1, 2), (0.2, 3), (5.0, 4)]:
        state.add(memory(at, process_bytes=count * 10**6))
    assert column(state.value(), "process") == [1.0, 9.0, 4.0]


def test_the_last_sample_before_a_finish_is_kept():
    state = LiveState({"fp16": ""}, run="1")
    state.add(memory(0.0, process_bytes=10**6))
    state.add(memory(SPACING_SECONDS / 2, process_bytes=5 * 10**6))
    state.add(Finished(contestant="fp16", reason="eos"))
    assert column(state.value(), "process") == [1.0, 5.0]


def test_an_hour_of_samples_stays_drawable():
    state = LiveState({"fp16": ""}, run="1")
    for tick in range(36_000):
        state.add(memory(tick / 10, process_bytes=10**9))
    times = [row[0] for row in state.value()["samples"]]
    assert FULL_RATE < len(times) < 3000
    assert times == sorted(set(times)) and times[-1] > 3500


def test_states_and_notes_of_a_card():
    state = LiveState({"fp16": "", "nf4": ""}, run="1")

    def cards(event):
        state.add(event)
        return [(card["state"], card["state_text"], card["note"]) for card in state.value()["cards"]]

    assert cards(Waiting(seconds=1.0))[0] == ("waiting", "Waiting", "another run holds the device")
    assert cards(Waiting(seconds=2.0, position=2))[1][2] == "runs in front of this one: 2"
    assert cards(Loading(contestant="nf4", message="shard 1 of 2"))[1] == ("loading", "Loading", "shard 1 of 2")
    assert cards(Loaded(contestant="nf4", weight_bytes=1, seconds=0.0))[1] == ("prefill", "Reading", "")
    assert cards(Finished(contestant="nf4", reason="length"))[1] == ("finished", "Finished: token limit", "")
    assert cards(Freed(contestant="nf4", expected_bytes=10**9, freed_bytes=10**8, verified=False))[1][2] == (
        "only 100 MB of 1.00 GB came back"
    )
    assert cards(Failed(contestant="fp16", message="<b>no memory</b>"))[0] == ("failed", "Failed", "<b>no memory</b>")
    assert cards(Freed(contestant="fp16", expected_bytes=1, freed_bytes=1, verified=True))[0][2] == "<b>no memory</b>"


def test_peak_memory_is_the_highest_ledger_or_what_the_engine_reports():
    state = LiveState({"fp16": ""}, run="1")
    for count in (5, 9, 7):
        state.add(memory(0.0, ledger={"fp16": ledger(count * 10**6)}))
    assert state.value()["cards"][0]["peak"] == "9.00 MB"
    state.add(Finished(contestant="fp16", reason="eos", peak_bytes=12 * 10**6))
    assert state.value()["cards"][0]["peak"] == "12.0 MB"


def test_a_contestant_of_another_run_is_named():
    with pytest.raises(BadChoice, match="'awq'.*fp16"):
        LiveState({"fp16": ""}, run="1").add(step("awq", 0))


@pytest.mark.parametrize("count, text", [
    (None, MISSING), (float("nan"), MISSING), (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (269.06e6, "269 MB"),
    (999.4e6, "999 MB"), (999.6e6, "1.00 GB"), (13.476e9, "13.5 GB"), (80e9, "80.0 GB"), (-1.5e9, "-1.50 GB"),
])  # fmt: skip
def test_bytes_are_decimal(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize("seconds, text", [
    (None, MISSING), (0.0012, "1.20 ms"), (0.1234, "123 ms"), (0.9999, "1.00 s"), (12.34, "12.3 s"),
    (59.7, "1 min 0 s"), (83, "1 min 23 s"),
])  # fmt: skip
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    "value, text",
    [(12594.4, "12,594"), (17.53, "17.53"), (0.01234, "0.01234"), (-2000, "-2,000"), (20221021.0, "20,220,000")],
)
def test_figures_are_written_as_people_read_them(value, text):
    assert format_number(value) == text


def test_speed_and_counts():
    assert [format_speed(speed) for speed in (None, 0.456, 34.21, 162.4)] == [
        MISSING, "0.46 tok/s", "34.2 tok/s", "162 tok/s",
    ]  # fmt: skip
    assert (format_count(4096), format_count(None)) == ("4,096", MISSING)
