"""`python -m llmq`: the same core as the page, for people at a terminal and for scripts.

Every command prints for people; with `--json` the last line on standard output is one JSON object. Progress goes to
standard error. A wrong value exits 2 with one line and no traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from llmq import actions
from llmq.cards import CARDS
from llmq.errors import UserError
from llmq.fields import Field, Switch, Text, fields_of
from llmq.labs import Lab, lab_classes
from llmq.terminal import accept_any_output, as_typed

EXIT_USAGE = 2
OPTIONS = {  # that several commands have
    "--json": {"action": "store_true", "help": "print one JSON object as the last line"},
    "--model": {"default": "demo", "help": "a preset, a hub id or a local folder (default: demo)"},
    "--device": {"help": "cpu, cuda or cuda:N (default: a GPU where there is one)"},
    "--threshold": {"type": float, "default": 6.0, "help": "outlier threshold; 0 is off (default: 6.0)"},
    "--methods": {"default": "fp16,bnb-int8", "help": "comma-separated; bnb-int8@0 sets a threshold"},
    "--engine": {"default": "auto", "help": "auto, hf (transformers) or lean (our own loop)"},
    "--random-weights": {"action": "store_true", "help": "a preset's shape with random weights"},
    "--html": {"type": Path, "metavar": "OUT.html", "help": "write a page that needs nothing else"},
    "--save": {"type": Path, "metavar": "FILE", "help": "keep it for `replay`"},
}
MODEL, FILES = ("--model", "--device", "--threshold"), ("--html", "--save")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the return value is the exit status."""
    return guarded(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    options = as_typed(build_parser().parse_args(arguments))
    if "threshold" in options:  # refused also where no method that was asked for has one
        from llmq.methods.base import THRESHOLD

        THRESHOLD.check("threshold", options.threshold)
    return options.run(options)


def guarded(command: Callable[[], int]) -> int:
    """The exit status of `command`. What it raises for people is one line; no output ends it in a traceback."""
    accept_any_output()
    try:
        status = command()
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"llmq: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("llmq: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 141


class Parser(argparse.ArgumentParser):
    """Refuses in one line, without the usage in front of it. `fill` adds its options when it is first asked for: those
    of all commands take a quarter of the time of one that needs none of them."""

    def __init__(self, *given, fill: Callable[[argparse.ArgumentParser], None] | None = None, **named):
        super().__init__(*given, **named)
        self._fill = fill

    def fill(self) -> None:
        fill, self._fill = self._fill, None
        if fill:
            fill(self)

    def parse_known_args(self, args=None, namespace=None):
        self.fill()
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    parser = Parser(prog="llmq", description="What 8-bit quantization does to a LLaMA.")
    commands = parser.add_subparsers(metavar="COMMAND")
    parser.set_defaults(run=lambda _: parser.error(f"give a COMMAND; choose from {', '.join(commands.choices)}"))
    _command(commands, "compare", actions.run_compare, "one prompt through two or three methods", _compare)
    _command(commands, "replay", actions.run_replay, "show a saved run or answer again", _replay)
    _add_labs(commands)
    repeatable = "repeatable speed and memory figures, in rounds in which everybody has a turn"
    _command(commands, "bench", actions.run_bench, repeatable, _bench)
    swept = "quality, speed or outliers of many models, a file for each cell, to be resumed at any time"
    _command(commands, "sweep", actions.run_sweep, swept, _sweep)
    answered = "tasks with right answers, through lm-eval (pip install '.[tasks]')"
    _command(commands, "tasks", actions.run_tasks, answered, _tasks)
    written = "quantize a model and write it as a checkpoint that transformers and llmq open"
    _command(commands, "quantize", actions.run_quantize, written, _quantize)
    predicted = "predicted bytes before anything is loaded, and whether they fit"
    _command(commands, "memory", actions.run_memory, predicted, _memory)
    advised = "should I quantize? what fits, how fast and how good each method is, and a recommendation"
    _command(commands, "advise", actions.run_advise, advised, _advise)
    taught = "the lesson: its steps, written as files that open without Python, or its recordings made anew"
    _command(commands, "lesson", actions.run_lesson, taught, _lesson)
    _command(commands, "models", actions.run_models, "the models that have names, and the methods", _models)
    return parser


def _command(commands, name: str, run, summary: str, add_options: Callable[[argparse.ArgumentParser], None]) -> None:
    def fill(parser: argparse.ArgumentParser) -> None:
        _add(parser, "--json")
        add_options(parser)

    commands.add_parser(name, help=summary, description=summary, fill=fill).set_defaults(run=run)


def _add(parser: argparse.ArgumentParser, *options: str) -> None:
    for option in options:
        parser.add_argument(option, **OPTIONS[option])


def _compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt")
    several = "or several GPUs to spread each model over, such as cuda:0,cuda:1"
    parser.add_argument("--device", help=f"cpu, cuda, cuda:N, {several} (default: a GPU where there is one)")
    _add(parser, "--model", "--threshold", "--methods")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default); 2 at most")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--schedule",
        default="interleave",
        help="interleave, in-turn, or parallel: servers meanwhile, and each method on one of several GPUs",
    )
    parser.add_argument("--sent", default="messages", help="to servers: messages (default), or the text read here")
    _add(parser, "--engine", "--random-weights", *FILES)


def _replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE")
    _add(parser, *FILES)


def _add_labs(commands) -> None:
    """A command for every lab that has one; those of several words share the first as a command of commands."""
    groups = {(): commands}
    for cls in lab_classes().values():
        *first, name = cls.command or ("",)
        if not name:
            continue
        if tuple(first) not in groups:
            group = commands.add_parser(first[0], help="change one thing and measure again")
            groups[tuple(first)] = group.add_subparsers(metavar="WHAT", required=True)
        run, summary = partial(actions.run_lab, cls), cls.about or cls.title
        _command(groups[tuple(first)], name, run, summary, partial(_lab, cls))


def _lab(cls: type[Lab], parser: argparse.ArgumentParser) -> None:
    for field in fields_of(cls):
        _add_field(parser, field)
    _add(parser, *MODEL, *FILES)


def _add_field(parser: argparse.ArgumentParser, field: Field) -> None:
    """The option of one annotated field; values are read by its kind, so that every refusal has its words."""
    kind, shown = field.kind, field.kind.spell(field.default) if field.default is not None else ""
    told = (kind.help or field.named) + (f" (default: {shown})" if shown else "")
    if isinstance(kind, Text) and kind.file:
        about = "take it from a file" if kind.positional or not kind.help else kind.help
        parser.add_argument(kind.file, type=Path, dest=f"{field.name}_file", metavar="FILE", help=about)
    if isinstance(kind, Text) and kind.positional:
        parser.add_argument(field.name, nargs="?", help=kind.help)
    elif isinstance(kind, Switch):
        parser.add_argument(f"--no-{field.name}", dest=field.name, action="store_false", help=kind.help)
    elif not (isinstance(kind, Text) and kind.file):
        parser.add_argument(field.flag, dest=field.name, metavar=field.name.upper(), help=told)


def _bench(parser: argparse.ArgumentParser) -> None:
    """An option that is not given is not there: each kind has its own defaults, and refuses what it does not have."""
    kinds = ("decode", "prefill", "load", "peers", "hooks", "transformers", "stages", "batch", "energy", "memory")
    parser.add_argument("what", choices=kinds)
    _add(parser, "--device", "--threshold", "--methods")
    parser.add_argument("--save", type=Path, metavar="RESULT.json")
    whole, rows = {"type": int, "metavar": "N"}, "1,2,4,8,16,32,64"
    for flag, more in {
        "--model": OPTIONS["--model"],
        "--engine": OPTIONS["--engine"],
        "--random-weights": OPTIONS["--random-weights"],
        "--prompt-tokens": whole | {"help": "of the prompt (default: 64; energy: 512)"},
        "--new-tokens": whole | {"help": "of the answer (default: 64; peers: 128, energy: 512)"},
        "--repeats": whole | {"help": "rounds that count (default: 5; energy: 3, memory: 1)"},
        "--busy": {"action": "store_true", "help": "peers: while another process takes a core"},
        "--modes": {"help": "transformers, batch: eager, compiled"},
        "--batches": {"help": f"batch: sequences decoded together (default: {rows})"},
        "--shapes": {"help": "stages: outputs x inputs of a layer (default: 4096x4096,11008x4096)"},
        "--rows": {"help": f"stages: how many tokens a call has (default: {rows})"},
        "--outliers": whole | {"help": "stages: columns of outliers in half of the cases (default: 4)"},
        "--layers": whole | {"help": "stages: different layers that are called in turn (default: 8)"},
        "--window": whole | {"help": "memory: tokens of a sliding window, of random weights (default: 0, none)"},
        "--seconds": whole | {"help": "energy: how long each stretch takes at least (default: 3)"},
    }.items():
        parser.add_argument(flag, **more | {"default": argparse.SUPPRESS})


def _sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("quality", "outliers", "speed"))
    families = "comma-separated; pythia, opt, llama, smollm2 and qwen2.5 are families"
    parser.add_argument("--models", default="demo", help=f"{families} (default: demo)")
    parser.add_argument("--methods", default="llm-int8,nf4", help="each beside FP16, comma-separated; not for outliers")
    parser.add_argument("--tokens", type=int, metavar="N", help="of the text (default: 4096), of a speed's answer (64)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where every cell's file is kept")
    parser.add_argument("--devices", help="cells run on each at a time, comma-separated (default: every GPU, or cpu)")
    parser.add_argument("--ray", action="store_true", help="on a Ray cluster (RAY_ADDRESS) instead of this machine")
    parser.add_argument("--again", action="store_true", help="try the cells that failed once more")
    parser.add_argument("--html", type=Path, metavar="OUT.html", help="write a page that needs nothing else")


def _tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tasks", metavar="TASKS", help="names of lm-eval's tasks, with commas between them")
    _add(parser, *MODEL, "--methods")
    parser.add_argument("--include", metavar="FOLDER", help="of further tasks, as lm-eval describes them")
    parser.add_argument("--limit", type=int, metavar="N", help="items of each task (default: all)")
    parser.add_argument("--shots", type=int, metavar="N", help="solved examples in front of each item")


def _quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a preset, a hub id or a local folder")
    parser.add_argument("--method", required=True, help="such as gptq@bits=4:group=128")
    parser.add_argument("--save", type=Path, metavar="FOLDER", required=True, help="a folder that does not exist")
    parser.add_argument("--format", default="", help="gptq, compressed-tensors or bitsandbytes (default: the method's)")
    parser.add_argument("--no-statistics", dest="statistics", action="store_false", help="leave out the calibration's")
    _add(parser, "--device")


def _memory(parser: argparse.ArgumentParser) -> None:
    _fit(parser)
    told = "of the context, tokens that are written and not read in one call (default: 0, which needs most)"
    parser.add_argument("--new-tokens", type=int, default=0, help=told)


def _fit(parser: argparse.ArgumentParser) -> None:
    _add(parser, "--model", "--methods")
    parser.add_argument("--threshold", type=float, default=6.0, help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, default=2048, help="tokens, prompt and answer (default: 2048)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--device-memory",
        metavar="AMOUNT",
        help=f"memory to fit into: a number of GB (1e9), 16GiB with its unit, or a card: {', '.join(CARDS)}",
    )


def _advise(parser: argparse.ArgumentParser) -> None:
    _fit(parser)
    parser.set_defaults(methods="fp16,llm-int8,int8-weight-only,bnb-int8,nf4")
    parser.add_argument("--measure", action="store_true", help="measure the speed of what fits, here and now")
    _add(parser, "--device", *FILES)


def _lesson(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--static", type=Path, metavar="FOLDER", help="write it for a web server or a USB stick")
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="ask everything again (minutes), into a folder")


def _models(parser: argparse.ArgumentParser) -> None:
    about = "write a model with int8 weights, as bitsandbytes stores them"
    parser.add_argument("--save-int8", nargs=2, metavar=("M", "FOLDER"), help=about)
    parser.add_argument("--fetch", metavar="M", help="make this model ready, so that later starts need no network")
