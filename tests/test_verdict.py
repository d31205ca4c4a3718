"""What a run showed, in sentences whose every figure can be checked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmq.events import Event, Failed, Finished, Loaded, Planned, Prefilled, Step
from llmq.methods import METHODS
from llmq.summary import Summary
from llmq.ui.parts.difference import difference
from llmq.ui.parts.verdict import USUAL, WHY_OURS_CPU, WHY_SLOWER_CPU, WHY_SLOWER_GPU, Verdict, verdict

MB = 10**6
SAME = [5, 6, 7, 8]


def planned(*names: str, device: str = "cpu") -> Planned:
    sizes = dict.fromkeys(names, 1)
    return Planned(schedule="in-turn", reason="", prompt_tokens=3, predicted_bytes=sizes, free_bytes=9, device=device)


def lane(
    name: str, *, speed: float = 10.0, megabytes: int = 200, ids=SAME, failed: str = "", engine: str = "hf", best=None
) -> list[Event]:
    events: list[Event] = [
        Loaded(contestant=name, weight_bytes=megabytes * MB, seconds=1.0, engine=engine),
        Prefilled(contestant=name, prompt_tokens=3, seconds=0.5),
    ]
    for index, token_id in enumerate(ids):
        found = {"token_id": token_id, "text": f" x{token_id}", "seconds": 1 / speed if index else 0.0}
        events.append(Step(contestant=name, index=index, logprob=-1.0, best=best or {}, **found))
    end = Failed(contestant=name, message=failed) if failed else Finished(contestant=name, reason="length")
    return [*events, end]


def judged(*lanes: list[Event], device: str = "cpu") -> Verdict:
    names = [events[0].contestant for events in lanes]
    return verdict(Summary([planned(*names, device=device), *sum(lanes, [])]))


def said(*lanes: list[Event], device: str = "cpu") -> str:
    """Everything that is told below the headline."""
    return "\n\n".join(judged(*lanes, device=device).details)


AGREED = "The two texts agree on all 4 tokens that both produced."


def test_a_slower_method_says_by_how_much_and_why():
    assert said(lane("fp16"), lane("bnb-int8", speed=4.0, megabytes=100)) == (
        "int8 · bitsandbytes holds 100 MB of weights where FP16 holds 200 MB: 50% less memory. "
        f"It decoded at 4.00 tok/s against 10.0 tok/s: 2.5 times slower in this run. {USUAL} {WHY_SLOWER_CPU}"
        f"\n\n{AGREED}"
    )


def test_a_faster_method_says_by_how_much():
    assert said(lane("fp32", megabytes=400), lane("fp16", speed=15.0)) == (
        "FP16 holds 200 MB of weights where FP32 holds 400 MB: 50% less memory. "
        f"It decoded at 15.0 tok/s against 10.0 tok/s: 1.5 times faster in this run.\n\n{AGREED}"
    )


def test_ours_says_why_it_is_slower_where_its_kernels_do_not_run():
    slower = [lane("fp16"), lane("llm-int8@3", speed=4.0)]
    assert WHY_OURS_CPU in said(*slower) and WHY_OURS_CPU not in said(*slower, device="cuda:0")
    assert WHY_OURS_CPU not in said(lane("fp16"), lane("llm-int8", speed=20.0))


def test_a_ratio_across_loops_says_so():
    text = said(lane("fp16", engine="lean"), lane("bnb-int8", speed=4.0), lane("llm-int8", speed=16.0, engine="lean"))
    assert "4.00 tok/s against 10.0 tok/s (in different loops: transformers and the lean loop): 2.5 times" in text
    assert "16.0 tok/s against 10.0 tok/s: 1.6 times faster in this run." in text


@pytest.mark.parametrize(
    ("speed", "words"),
    [
        (9.53, "about the same speed"),
        (9.51, "1.1 times slower"),
        (10.5, "about the same speed"),
        (10.6, "1.1 times faster"),
        (10.0, "about the same speed"),
    ],
)
def test_within_five_percent_the_speed_is_the_same(speed, words):
    lanes = lane("fp32"), lane("fp16", speed=speed)
    assert f"against 10.0 tok/s: {words} in this run." in said(*lanes)
    shown = difference(Summary([planned("fp32", "fp16"), *sum(lanes, [])]), 2)["speed"]["changes"][1]
    assert (shown == "the same") == (words == "about the same speed"), "the figure and the sentence agree"


@pytest.mark.parametrize(("device", "why"), [("cuda:0", WHY_SLOWER_GPU), ("cpu", WHY_SLOWER_CPU)])
def test_the_reason_is_that_of_the_device(device, why):
    text = said(lane("fp16"), lane("bnb-int8", speed=2.0), device=device)
    assert why in text and text.count(USUAL) == 1


def test_only_bitsandbytes_gets_its_reason():
    assert USUAL not in said(lane("fp16"), lane("fp32", speed=2.0))


@pytest.mark.parametrize(("megabytes", "words"), [(210, "5% more memory"), (190, "5% less memory"), (50, "75% less")])
def test_memory_is_compared_with_the_first(megabytes, words):
    assert words in said(lane("fp16"), lane("bf16", megabytes=megabytes))


def test_equal_memory_is_not_called_more():
    """FP16 and BF16 weigh the same."""
    text = said(lane("fp16"), lane("bf16"))
    assert "0%" not in text and "more memory" not in text and "less memory" not in text


def test_a_threshold_is_part_of_the_name():
    assert "int8 · bitsandbytes, threshold 3.5 holds" in said(lane("fp16"), lane("bnb-int8@3.5"))


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (SAME, "The two texts agree on all 4 tokens that both produced."),
        (SAME[:2], "The two texts agree on all 2 tokens that both produced."),
        (
            [9, 6, 7, 8],
            "The two texts differ from the first token on. There FP16 gave its own choice 37%, BF16 gave",
        ),
        ([5, 9, 7, 8], "The two texts are the same for 1 token and part at token 2. There"),
        ([5, 6, 7, 9], "The two texts are the same for 3 tokens and part at token 4. There"),
    ],
)
def test_agreement_is_counted_from_the_first_token(ids, sentence):
    assert said(lane("fp16"), lane("bf16", ids=ids)).split("\n\n")[-1].startswith(sentence)


def test_one_token_is_one_token():
    last = said(lane("fp16", ids=[5]), lane("bf16", ids=[5])).split("\n\n")[-1]
    assert "1 tokens" not in last


def test_one_token_is_no_speed():
    assert "too few tokens to state a speed" in said(lane("fp16"), lane("bf16", ids=[5]))


def test_a_method_that_fails_is_not_compared():
    found = judged(lane("fp16"), lane("bnb-int8", failed="out of memory"))
    assert found == Verdict("int8 · bitsandbytes did not finish, so there is nothing to compare.")


def test_what_the_others_did_is_compared_all_the_same():
    found = judged(lane("fp16"), lane("bnb-int8", failed="out of memory"), lane("bf16"))
    assert found.headline == (
        "int8 · bitsandbytes did not finish, so there is nothing to compare. "
        "BF16 needs as much memory and writes at about the same speed."
    )
    assert len(found.details) == 1, "the two texts are those of the first two"


def test_a_failed_baseline_is_said_once():
    found = judged(lane("fp32", failed="boom"), lane("fp16"), lane("bf16"))
    assert found == Verdict("FP32 did not finish, so there is nothing to compare.")


@pytest.mark.parametrize(
    ("lanes", "headline"),
    [
        ([lane("fp16"), lane("llm-int8", megabytes=122, speed=18.0, ids=[5, 6, 9, 9])],
         "int8 · ours needs 39% less memory and writes 1.8 times faster than FP16. After 2 equal tokens, "
         "FP16 took “x7” at 37%, int8 · ours “x9”."),
        ([lane("fp16"), lane("bnb-int8", megabytes=122, speed=4.0, ids=[9])],
         "int8 · bitsandbytes needs 39% less memory. At the first token, FP16 took “x5” at 37%, "
         "int8 · bitsandbytes “x9”."),
        ([lane("fp32", megabytes=400), lane("fp16"), lane("bf16", speed=5.0)],
         "FP16 needs 50% less memory and writes at about the same speed; the texts are the same. "
         "BF16 needs 50% less memory and writes 2.0 times slower than FP32."),
    ],
)  # fmt: skip
def test_the_headline_is_what_a_reader_takes_home(lanes, headline):
    assert judged(*lanes).headline == headline


def test_a_text_that_ended_is_the_same_as_far_as_it_goes():
    assert "the texts are the same for 2 tokens." in judged(lane("fp16"), lane("bf16", ids=SAME[:2])).headline


def test_where_texts_part_it_is_said_how_sure_each_model_was():
    sure = [Step(**(vars(e) | {"logprob": -0.1})) if isinstance(e, Step) else e for e in lane("fp16")]
    assert "FP16 gave its own choice 90%, BF16 gave its own choice 37%. All" in said(sure, lane("bf16", ids=[9]))
    assert "37%: little decided it. All" in said(lane("fp16"), lane("bf16", ids=[9]))
    forged = [Step(**(vars(e) | {"logprob": 1e300})) if isinstance(e, Step) else e for e in lane("fp16")]
    assert "FP16 gave its own choice 100%," in said(forged, lane("bf16", ids=[9])), "a file may hold any number"


def test_three_methods_are_each_held_against_the_first():
    text = said(lane("fp32", megabytes=400), lane("fp16"), lane("bf16", ids=[9]))
    assert [line.split(" holds")[0] for line in text.split("\n\n")] == ["FP16", "BF16", AGREED]
    assert text.count("where FP32 holds 400 MB") == 2


@pytest.mark.parametrize(
    "events", [[], [planned("fp16", "bf16")], [planned("fp16"), *lane("fp16")], lane("fp16")[:1]], ids=range(4)
)
def test_nothing_to_compare_is_nothing_said(events):
    assert verdict(Summary(events)) == Verdict()


def parted(best: dict[str, float], **changes) -> str:
    """The sentence about the first difference, at token 7 of FP16 and token 9 of the other."""
    lanes = [lane("fp16", best=best), lane("llm-int8", ids=[5, 6, 9, 9])]
    events = [replace(e, **changes) if isinstance(e, Step) else e for e in sum(lanes, [])]
    return Summary([planned("fp16", "llm-int8"), *events]).parting().sentence()


@pytest.mark.parametrize(
    ("best", "ending"),
    [
        ({"7": 0.37, "9": 0.3}, ", FP16's second at 30%: nearly a tie"),
        ({"7": 0.37, "1": 0.31, "9": 0.29}, ", FP16's third at 29%"),
        ({"7": 0.37, "1": 0.004}, ", to which FP16 gave under 0.4%"),
        ({"7": 0.37} | {str(n): 0.3 for n in range(20, 30)} | {"9": 0.1}, ", to which FP16 gave under 10%"),
        ({}, ""),
    ],
)
def test_where_texts_part_both_choices_stand_with_the_firsts_probabilities(best, ending):
    assert parted(best) == f"FP16 took “x7” at 37%, int8 · ours “x9”{ending}"


def test_a_token_that_was_drawn_is_not_called_the_likeliest():
    assert parted({"9": 0.6, "7": 0.37}) == "FP16 took “x7” at 37%, its second, int8 · ours “x9”, FP16's first at 60%"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("", "token 7"), (" ", "“␣”"), ("\n\n", "“⏎⏎”"), ("y" * 99, f"“{'y' * 30}…”"), ("<b>", "“<b>”")],
)
def test_a_token_is_quoted_so_that_it_can_be_read(text, shown):
    assert parted({}, text=text).startswith(f"FP16 took {shown} at 37%")


def test_a_text_that_ends_where_the_other_goes_on_chose_its_end():
    *events, end = lane("bf16", ids=[5, 6, 2])
    summary = Summary([planned("fp16", "bf16"), *lane("fp16"), *events, replace(end, reason="eos")])
    assert summary.parting().sentence() == "FP16 took “x7” at 37%, BF16 the end of its text"


def test_texts_that_agree_part_nowhere():
    assert Summary([planned("fp16", "bf16"), *lane("fp16"), *lane("bf16", ids=SAME[:2])]).parting() is None


def test_a_method_of_another_version_is_called_by_its_own_name():
    """A recording may hold methods that this version does not have."""
    assert "mystery-int4" in said(lane("fp16"), lane("mystery-int4", megabytes=50))


def test_the_reason_on_a_cpu_is_one_that_this_processor_has():
    """With AVX-512 bitsandbytes multiplies in int8: the reason for slowness elsewhere is none there."""
    lanes = [lane("fp16"), lane("bnb-int8", speed=4.0)]
    events = [planned("fp16", "bnb-int8", device="cpu"), *sum(lanes, [])]
    said = {cpu: "\n".join(verdict(Summary(events), cpu).details) for cpu in ("", "AVX2", "AVX512")}
    assert WHY_SLOWER_CPU in said["AVX2"] and said["AVX2"] == said[""]
    assert "times slower" in said["AVX512"] and "FP32" not in said["AVX512"] and USUAL not in said["AVX512"]
    told = {cpu: METHODS["bnb-int8"].arithmetic("cpu", "hf", cpu) for cpu in ("", "AVX2", "AVX512")}
    assert "FP32 matrix products" in told["AVX2"] and "int32" in told["AVX512"]
    assert "FP32" not in told[""] and "int32" not in told[""]
