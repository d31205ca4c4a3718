"""Short draws of `fuzz_server.py`: the script itself makes 2,200 calls."""

from __future__ import annotations

from fuzz_server import Report, fuzz, fuzzed_app

SEEDS = (3, 8)  # of draws in which nobody asks for the whole of a lab, which the demo model takes minutes for


def test_malformed_calls_are_answered_in_words(tiny_folder):
    with fuzzed_app("--host", "0.0.0.0", "--model", str(tiny_folder), "--methods", "fp16,bnb-int8") as (address, lines):
        for seed in SEEDS:
            report = fuzz(address, calls=120, seed=seed, known=str(tiny_folder))
            assert report.clean, str(report)
            assert report.calls == 120 and len(report.statuses) > 4, "the draw reached something"
        report.log_lines = lines()
        assert report.clean, str(report)


def test_the_report_sees_what_it_counts():
    report = Report()
    report.look("get", "GET /x", 500, "Internal Server Error")
    report.look("get", "GET /etc/passwd", 404, "no /etc/passwd")
    assert (len(report.fives), report.paths, report.stacks, report.clean) == (1, [], [], False)
    report.look("get", "GET /x", 404, 'File "/opt/venv/x.py", line 5, in f')
    assert len(report.paths) == len(report.stacks) == 1 and "answers 500 | 1" in str(report)
