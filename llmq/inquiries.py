"""What the commands that look inside a model do: outliers, agreement, the cause of a token, experiments."""

from __future__ import annotations

import json
from pathlib import Path

from llmq.actions import answer, device_of
from llmq.errors import BadChoice
from llmq.files import read_text, write_text
from llmq.formatting import plain_json
from llmq.reporting import outlier_lines


def run_outliers(options) -> int:
    from llmq.contestant import Contestant
    from llmq.inspect.emergence import emergence
    from llmq.inspect.run import Inspection
    from llmq.inspect.wording import account_line, emergence_line

    if options.sweep:
        return _run_sweep(options)
    if options.prompt is None:
        raise BadChoice("no prompt is given; give one, or --sweep MODEL,MODEL")
    inspection = Inspection(
        prompt=options.prompt,
        model=options.model,
        contestant=Contestant.parse(options.method, options.threshold),
        new_tokens=options.new_tokens,
        device=device_of(options),
    )
    report = answer(inspection)
    if options.html:
        from llmq.figures.pages import outliers_page

        write_text(options.html, outliers_page(report, options.threshold))
    if options.json:
        print(json.dumps(report.to_json(options.threshold), allow_nan=False))
        return 0
    print("\n".join(outlier_lines(report, options.threshold)))
    print("\n" + account_line(report, options.threshold))
    print(_plain(emergence_line(emergence(report))))
    return 0


def _run_sweep(options) -> int:
    from llmq.experiments.sweep import Sweep

    names = tuple(name.strip() for name in options.sweep.split(","))
    return _print_experiment(answer(Sweep(models=names, device=device_of(options))).result, options)


def run_agreement(options) -> int:
    from llmq.inspect.wording import agreement_json, drift_line, summary_of

    read = _read(options)
    if options.html:
        from llmq.figures.pages import agreement_page

        write_text(options.html, agreement_page(read))
    if options.json:
        print(json.dumps(plain_json(agreement_json(read)), allow_nan=False))
        return 0
    print(summary_of(read))
    if drift := drift_line(read):
        print(drift)
    print(f"\n{'token':>6}  {'text':<20}  {'KL (nats)':>10}  {'rank':>5}  first choices")
    for token in read.agreement.diverging:
        first = [repr(read.text_of(side[0].token_id)) for side in (token.baseline, token.other)]
        text = repr(read.texts[token.position])
        print(f"{token.position:>6}  {text:<20}  {token.kl:>10.4g}  {token.rank:>5}  {first[0]} against {first[1]}")
    return 0


def run_explain(options) -> int:
    from llmq.inspect.explaining import Explanation
    from llmq.inspect.wording import cause_json, cause_line, patch_rows
    from llmq.machine.door import Machine

    machine = Machine()
    read = _read(options, machine)
    position = options.token
    if position is None:
        diverging = read.agreement.diverging
        position = (diverging or sorted(read.agreement.tokens, key=lambda token: -token.kl))[0].position
    explanation = Explanation(
        token_ids=read.agreement.token_ids,
        position=position,
        model=options.model,
        baseline=read.reading.baseline,
        contestant=read.reading.contestant,
        patch=not options.no_patch,
        device=read.reading.device,
    )
    cause = answer(explanation, machine)
    if options.html:
        from llmq.figures.pages import cause_page

        write_text(options.html, cause_page(cause, read))
    if options.json:
        print(json.dumps(plain_json(cause_json(cause, read)), allow_nan=False))
        return 0
    print(cause_line(cause, read))
    print(f"\n{'layer':>6}  {'off by':>8}  {'SQNR (dB)':>9}  outliers at the token")
    for entry in cause.layers:
        named = ", ".join(f"{kind} {channel} ({value:.4g})" for kind, channel, value in entry.outliers)
        more = f" and {entry.outlier_count - len(entry.outliers)} more" * (entry.outlier_count > len(entry.outliers))
        print(f"{entry.layer:>6}  {entry.relative:>8.2%}  {entry.sqnr_db:>9.1f}  {named}{more}")
    for row in patch_rows(cause, read):
        print(f"{row[0]:<40}  margin {row[1]:>8}  {row[2]:<16}  {'repaired' if row[3] == 'yes' else ''}")
    return 0


def _read(options, machine=None):
    from llmq.contestant import Contestant
    from llmq.inspect.reading import Read, Reading

    if (options.text is None) == (options.file is None):
        raise BadChoice("give either a text or --file FILE")
    reading = Reading(
        prompt=options.text if options.file is None else read_text(options.file),
        text=options.read,
        model=options.model,
        baseline=Contestant.parse(options.baseline, options.threshold),
        contestant=Contestant.parse(options.method, options.threshold),
        new_tokens=options.new_tokens,
        device=device_of(options),
    )
    read = answer(reading, machine)
    assert isinstance(read, Read), "a reading that nobody stops ends with a Read"
    return read


def run_experiment(options) -> int:
    return _print_experiment(answer(_experiment(options)).result, options)


def _experiment(options):
    from llmq.contestant import Contestant
    from llmq.experiments.ablation import Ablation
    from llmq.experiments.channels import Amplifying, Silencing
    from llmq.experiments.thresholds import Thresholds

    shared = {"model": options.model, "device": device_of(options), "windows": options.windows}
    channels = numbers("channel", options.channels, int) if options.channels else None
    match options.what:
        case "ablation":
            return Ablation(**shared)
        case "silencing":
            counts, contestant = numbers("count", options.counts, int), Contestant.parse("fp16")
            return Silencing(
                **shared, prompt=options.prompt or "", counts=counts, draws=options.draws, contestant=contestant
            )
        case "amplifying":
            return Amplifying(**shared, factors=numbers("factor", options.factors, float), channels=channels)
        case _:
            thresholds = numbers("threshold", options.thresholds, float)
            return Thresholds(**shared, thresholds=thresholds, method=options.method)


def numbers(name: str, text: str, kind: type) -> tuple:
    """'1,2' as numbers. Raises BadChoice naming what is none."""
    found = []
    for part in text.split(","):
        try:
            found.append(kind(part.strip()))
        except ValueError:
            raise BadChoice(f"{name} is {part.strip()!r}; write numbers with commas between them") from None
    return tuple(found)


def _print_experiment(result: dict, options) -> int:
    from llmq.experiments.tables import HEADERS, finding, rows_of

    stored = plain_json(result)
    if options.save:
        write_text(options.save, json.dumps(stored, indent=1, allow_nan=False) + "\n")
    if options.html:
        from llmq.figures.pages import experiment_page

        write_text(options.html, experiment_page(result))
    if options.json:
        print(json.dumps(stored, allow_nan=False))
        return 0
    rows = [HEADERS[result["kind"]], *rows_of(result)]
    widths = [min(40, max(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{cell[:width]:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    for name, reason in result.get("missing", {}).items():
        print(f"{name}: not measured: {reason}")
    if said := finding(result):
        print("\n" + said)
    return 0


def _plain(markdown: str) -> str:
    return markdown.replace("**", "")


def add_commands(command, commands, add_model) -> None:
    """The options of these commands. `command` makes one, `add_model` adds model, device and threshold."""
    parser = command(commands, "outliers", run_outliers, "which columns reach the threshold, layer by layer")
    parser.add_argument("prompt", nargs="?")
    add_model(parser)
    parser.add_argument("--method", default="bnb-int8")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens to generate and watch (default: 8)")
    parser.add_argument("--sweep", metavar="A,B,…", help="the paper's figures of several models, instead of a prompt")
    _add_files(parser)
    parser = command(commands, "agreement", run_agreement, "two methods read the same text: KL, first choices, drift")
    _add_reading(parser, add_model)
    parser = command(commands, "explain-token", run_explain, "why one token came out differently, and what repairs it")
    _add_reading(parser, add_model)
    parser.add_argument("--token", type=int, help="its position in the text (default: the largest KL that diverges)")
    parser.add_argument("--no-patch", action="store_true", help="errors only; do not try modules in 16 bit")
    _add_experiment(command(commands, "experiment", run_experiment, "change one thing and measure again"), add_model)


def _add_reading(parser, add_model) -> None:
    parser.add_argument("text", nargs="?", help="a prompt, or with --read text a text")
    parser.add_argument("--file", type=Path, help="take it from a file instead")
    parser.add_argument("--read", default="continuation", help="continuation, prompt or text (default: continuation)")
    add_model(parser)
    parser.add_argument("--baseline", default="fp16")
    parser.add_argument("--method", default="bnb-int8")
    parser.add_argument("--new-tokens", type=int, default=32, help="of the continuation (default: 32)")
    parser.add_argument("--html", type=Path, metavar="OUT.html", help="write a page that needs nothing else")


def _add_files(parser) -> None:
    parser.add_argument("--html", type=Path, metavar="OUT.html", help="write a page that needs nothing else")
    parser.add_argument("--save", type=Path, metavar="RESULT.json", help="keep the figures")


def _add_experiment(parser, add_model) -> None:
    parser.add_argument("what", choices=["ablation", "silencing", "amplifying", "thresholds"])
    add_model(parser)
    parser.add_argument("--windows", type=int, default=1, help="of 512 tokens of the reference text (default: 1)")
    parser.add_argument("--prompt", help="silencing: how the model goes on after it")
    parser.add_argument("--counts", default="1,2,4,8", help="silencing: how many channels (default: 1,2,4,8)")
    parser.add_argument("--draws", type=int, default=3, help="silencing: random sets of each size (default: 3)")
    parser.add_argument("--factors", default="1,4,16,64", help="amplifying: s, from 1 to 64 (default: 1,4,16,64)")
    parser.add_argument("--channels", help="amplifying: such as 7,19 (default: three, spread evenly)")
    parser.add_argument("--thresholds", default="0,2,4,6,8,inf", help="thresholds: 0 is off (default: 0,2,4,6,8,inf)")
    parser.add_argument("--method", default="llm-int8", help="thresholds: which method (default: llm-int8)")
    _add_files(parser)
