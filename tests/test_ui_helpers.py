"""The page's plain helpers: a link carries a run's settings and breaks no page; jobs stop by their owner's name."""

from __future__ import annotations

import threading

import pytest

from llmq.contestant import Contestant
from llmq.engine.sampling import MAX_TEMPERATURE, SamplingSettings
from llmq.labs.compare import Comparison
from llmq.labs.outliers import Inspection
from llmq.machine.door import Machine
from llmq.ui.shell.link import query_of, wishes_of
from llmq.ui.shell.state import KEPT_FINDINGS, AppState, Jobs

PROMPT = "Où est l'été ? <b>&amp;</b> 日本 👩‍👧 a=b&c+d%20\n\tend"


def comparison(**changes) -> Comparison:
    settings = {
        "prompt": PROMPT,
        "model": "tinyllama-1.1b-chat",
        "contestants": (Contestant.parse("bf16"), Contestant.parse("bnb-int8@3.5"), Contestant.parse("bnb-int8@0")),
        "sampling": SamplingSettings(max_new_tokens=77, temperature=0.65, top_k=40, top_p=0.92, seed=2**40),
        "schedule": "in-turn",
    }
    return Comparison(**(settings | changes))


def test_a_recorded_run_fills_the_form_with_every_setting():
    assert wishes_of(query_of(comparison().settings())) == {
        "prompt": PROMPT,
        "model": "tinyllama-1.1b-chat",
        "methods": ["bf16", "bnb-int8@3.5", "bnb-int8@0"],
        "schedule": "in-turn",
        "max_new_tokens": 77,
        "temperature": 0.65,
        "top_k": 40,
        "top_p": 0.92,
        "seed": 2**40,
    }


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, {}),
        ({"prompt": "", "model": "", "methods": "", "schedule": ""}, {}),
        ({"unknown": "x", "__class__": "y"}, {}),
        ({"schedule": "sideways"}, {}),
        ({"methods": "int3,fp16"}, {"methods": ["fp16"]}),
        ({"methods": "fp16,bf16,fp32,bnb-int8"}, {"methods": ["fp16", "bf16", "fp32"]}),
        ({"methods": "bnb-int8@nan,bnb-int8@6,bnb-int8@1e9"}, {"methods": ["bnb-int8"], "threshold": 6.0}),
        ({"methods": "<script>,../../etc,@"}, {"methods": []}),
        ({"methods": "fp16,fp16"}, {"methods": ["fp16"]}),
        ({"temperature": "nan", "top_p": "inf", "top_k": "-1"}, {}),
        ({"temperature": "0.5"}, {"temperature": 0.5}),
        ({"max_new_tokens": "1e3", "seed": "0x10", "top_k": "4.0"}, {}),
        ({"max_new_tokens": "99999", "seed": "9" * 400, "top_k": "9" * 5000}, {}),
        ({"max_new_tokens": "12; drop", "temperature": "", "seed": " 7 "}, {"seed": 7}),
        ({"top_p": "0", "temperature": "-0.0"}, {"temperature": 0.0}),
        ({"threshold": "3"}, {"threshold": 3.0}),
        ({"threshold": "hot"}, {}),
        ({"threshold": "-1"}, {}),
        # One threshold in a link is the form's; two, or one beside the form's, belong to their methods.
        ({"methods": "fp16,llm-int8@3"}, {"methods": ["fp16", "llm-int8"], "threshold": 3.0}),
        ({"methods": "llm-int8@3,bnb-int8@3"}, {"methods": ["llm-int8", "bnb-int8"], "threshold": 3.0}),
        ({"methods": "llm-int8@3,llm-int8"}, {"methods": ["llm-int8@3", "llm-int8"]}),
        ({"methods": "fp16,llm-int8@3", "threshold": "5"}, {"methods": ["fp16", "llm-int8@3"], "threshold": 5.0}),
        ({"prompt": "<img src=x onerror=alert(1)>"}, {"prompt": "<img src=x onerror=alert(1)>"}),
    ],
)
def test_a_hostile_link_is_only_a_wish(query, expected):
    assert wishes_of(query) == expected


@pytest.fixture
def jobs(monkeypatch):
    """Jobs whose runs count until they are told to stop."""

    def counting(self, job, stop, address):
        number = 0
        while not stop.is_set():
            yield number
            number += 1

    monkeypatch.setattr(Machine, "run", counting)
    return Jobs(Machine())


@pytest.mark.parametrize("job", [comparison(), Inspection(prompt="Hi")], ids=["compare", "outliers"])
def test_a_stop_ends_the_owners_job_and_a_second_is_harmless(job, jobs):
    run = jobs.run(job, "ann")
    assert [next(run), next(run)] == [0, 1]
    assert [jobs.stop("ann"), jobs.stop("ann")] == [1, 1]
    assert list(run) == []
    assert jobs.stop("ann") == 0


def test_a_stop_before_anything_ran_is_harmless(jobs):
    assert jobs.stop("nobody") == 0


def test_owners_stop_only_their_own(jobs):
    ann, bob = jobs.run(comparison(), "ann"), jobs.run(comparison(), "bob")
    assert (next(ann), next(bob)) == (0, 0)
    assert jobs.stop("ann") == 1
    assert list(ann) == []
    assert next(bob) == 1
    assert jobs.stop("bob") == 1 and list(bob) == []


def test_a_stop_does_not_reach_the_next_run(jobs):
    run = jobs.run(comparison(), "ann")
    next(run)
    jobs.stop("ann")
    assert list(run) == []
    following = jobs.run(comparison(), "ann")
    assert [next(following), next(following)] == [0, 1]
    following.close()


@pytest.mark.parametrize("end", ["close", "throw"])
def test_a_job_that_ends_early_is_forgotten(end, jobs):
    run = jobs.run(comparison(), "ann")
    next(run)
    if end == "close":
        run.close()
    else:
        with pytest.raises(RuntimeError, match="lost"):
            run.throw(RuntimeError("lost"))
    assert jobs.stop("ann") == 0


def test_jobs_of_many_threads_are_all_stopped(jobs):
    started = threading.Barrier(9)

    def work(number: int):
        run = jobs.run(comparison(), f"owner {number}")
        next(run)
        started.wait(10)
        for _ in run:
            pass

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    started.wait(10)
    assert [jobs.stop(f"owner {number}") for number in range(8)] == [1] * 8
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert list(jobs) == []


@pytest.fixture
def plain_state() -> AppState:
    return AppState(run=lambda job, owner: iter(()), stop=lambda owner: 0, device="cpu", device_label="a CPU")


def test_run_names_never_repeat(plain_state):
    assert len({plain_state.next_run() for _ in range(50)}) == 50


def test_downloads_go_to_a_folder_of_their_own(plain_state):
    path = plain_state.download_path("run.jsonl")
    assert path.parent.is_dir() and path.name == "run.jsonl" and path.parent.name.startswith("llmq-server-")


def test_only_the_latest_reports_are_kept(plain_state):
    keys = [plain_state.keep(number) for number in range(KEPT_FINDINGS + 3)]
    assert [plain_state.kept(key) for key in keys] == [None] * 3 + list(range(3, KEPT_FINDINGS + 3))
    assert plain_state.kept(None) is None


def test_the_page_and_the_command_line_have_one_range_of_temperatures(plain_state):
    from llmq.ui.layout import build

    parts = build(plain_state).config["components"]
    (slider,) = (part["props"] for part in parts if part["props"].get("elem_id") == "temperature")
    assert (slider["minimum"], slider["maximum"]) == (0, MAX_TEMPERATURE)


@pytest.mark.parametrize("fails", [False, True])
def test_the_first_click_waits_for_the_libraries_and_is_answered_where_there_are_none(fails, caplog):
    import asyncio

    from llmq.machine.jobs import Listeners
    from llmq.ui.shell.listening import Ears

    happened = []

    def needed() -> None:
        happened.append("imported")
        if fails:
            raise OSError("libtorch.so is broken")

    async def page(scope, receive, send) -> None:
        happened.append(scope["method"])

    nobody = dict.fromkeys(("left", "uploaded", "heard"), lambda *_: None)
    ears = Ears(page, Listeners(), opened=lambda: happened.append("opened"), needed=needed, **nobody)
    for method in ("GET", "POST", "POST"):
        scope = {"type": "http", "method": method, "path": "/gradio_api/queue/join", "query_string": b"", "headers": []}
        asyncio.run(ears(scope, None, None))
    assert happened == ["GET", "opened", "imported", "POST", "POST"]
    assert [record.exc_info[1].args for record in caplog.records] == [("libtorch.so is broken",)] * fails
