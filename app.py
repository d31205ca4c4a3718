"""Composition root: flags, model, device, page. The entry of a Space: `python app.py` is all there is to run."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from llmq.cli import Parser, guarded  # noqa: E402
from llmq.errors import ModelUnavailable, UserError  # noqa: E402
from llmq.machine.door import Machine  # noqa: E402
from llmq.machine.thread import ComputeThread  # noqa: E402
from llmq.terminal import as_typed, leave, show_progress  # noqa: E402
from llmq.ui.shell.access import ANYBODY, Access, is_open  # noqa: E402
from llmq.ui.shell.address import DEFAULT_PORTS, free_address  # noqa: E402
from llmq.ui.shell.state import AppState, Jobs  # noqa: E402

RUNS = Path(__file__).parent / "assets" / "runs"
ANSWERS = Path(__file__).parent / "assets" / "lesson"
NICENESS = 10  # of what computes: a click that needs no device goes before it
JOBS = Jobs(Machine(thread=ComputeThread(niceness=NICENESS)))
UNOPENED = 30.0  # seconds until what the first run needs is imported though nobody has opened the page
AFTER_THE_PAGE = 2.0  # seconds left to the page before more is imported, which takes 3 while it is read
HOSTS = ("SPACE_ID", "COLAB_RELEASE_TAG")  # somebody's machine for a while, with a public address by itself
MCP_ADVICE = "install it with: pip install 'gradio[mcp]>=6.31,<7'"


def run_job(job, owner: str):
    """Run `job` for `owner`, in this process or where the host lends its GPU."""
    yield from JOBS.run(job, owner)


def gpu_is_lent() -> bool:
    """Tell whether this is a Space whose host lends a GPU for a call at a time (ZeroGPU)."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def lend(function, seconds):
    """Return `function` as it runs in a fork with a GPU of the host's, asked for as long as `seconds` says; what the
    host refuses is a UserError. Until the first call torch has a GPU in this process by name only."""
    import spaces
    from gradio import Error

    borrowed = spaces.GPU(duration=seconds)(function)

    def ask(*arguments):
        try:
            yield from borrowed(*arguments)
        except Error as refusal:
            raise UserError(f"the host of the GPU says: {refusal.message}") from refusal

    return ask


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="FP16 and int8 LLaMA side by side, in a browser.")
    parser.add_argument("--model", help="a preset, a hub id or a local folder (default: chosen for this machine)")
    parser.add_argument(
        "--methods", help="two or three, comma-separated (default: fp16,llm-int8; on a GPU also bnb-int8)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:N or cuda:N,cuda:M (default: a GPU where there is one)")
    host = os.environ.get("GRADIO_SERVER_NAME") or ("0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1")
    port = os.environ.get("GRADIO_SERVER_PORT") or None
    ports = f"{DEFAULT_PORTS[0]} to {DEFAULT_PORTS[-1]}"
    parser.add_argument("--host", default=host, help="0.0.0.0: every network (default: GRADIO_SERVER_NAME, 127.0.0.1)")
    parser.add_argument(
        "--port", default=port, help=f"0: any free one (default: GRADIO_SERVER_PORT, the first free one of {ports})"
    )
    parser.add_argument("--share", action="store_true", help="also open a public link (Colab does so by itself)")
    parser.add_argument(
        "--auth", metavar="USER:PASSWORD", default=os.environ.get("LLMQ_AUTH"),
        help="ask visitors for a name and a password (default: LLMQ_AUTH, which no list of processes shows)",
    )  # fmt: skip
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--public", action="store_true",
        help="let visitors open named models only (by itself with --share, on a Space, where others reach the host)",
    )  # fmt: skip
    mode.add_argument("--private", action="store_true", help="let visitors open whatever you can")
    parser.add_argument(
        "--allow-models", metavar="NAMES", default="",
        help="what visitors may open besides the presets, comma-separated: hub ids, folders",
    )  # fmt: skip
    parser.add_argument(
        "--allow-downloads", metavar="SIZE", default="0",
        help="the most that one model may take from the hub for a visitor, such as 3GB (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-servers", metavar="HOSTS", default="",
        help="servers that visitors may compare with, comma-separated: gpu.example:8000 (public addresses only)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-frames", metavar="SITES", default="",
        help="sites that may show the page in a frame, comma-separated: https://school.example",
    )  # fmt: skip
    parser.add_argument(
        "--max-memory", metavar="SIZE", help="most that loaded models may take, 8GB (default: a share of what is free)"
    )
    parser.add_argument(
        "--class", dest="classes", action="store_true", default=os.environ.get("LLMQ_CLASS", "") not in ("", "0"),
        help="let teachers lead classes through the lesson, whose students vote (also: LLMQ_CLASS=1)",
    )  # fmt: skip
    parser.add_argument(
        "--class-file", metavar="FILE",
        help="as --class, with the classes in FILE (default: classes.sqlite3 in the cache folder)",
    )  # fmt: skip
    parser.add_argument("--mcp", action="store_true", help="offer the questions as tools to MCP clients, too")
    parser.epilog = "Behind a proxy that serves the page below a path, GRADIO_ROOT_PATH names the path."
    return parser.parse_args(arguments)


def is_hosted() -> bool:
    return any(name in os.environ for name in HOSTS)


def access_for(options: argparse.Namespace, model: str) -> Access:
    """What visitors may do: all that the owner may, unless others than the owner's own can be visitors."""
    reached = is_open(options.host, share=options.share, hosted=is_hosted())
    if options.private or not (options.public or reached):
        return ANYBODY
    from llmq.cards import device_bytes

    named = [name.strip() for name in f"{model},{options.allow_models}".split(",")]
    size = options.allow_downloads
    most = 0 if size == "0" else int(device_bytes(size, "--allow-downloads"))
    servers = tuple(filter(None, (host.strip() for host in options.allow_servers.split(","))))
    return Access.of_strangers(tuple(filter(None, named)), most, servers)


def make_state(options: argparse.Namespace, run=run_job) -> AppState:
    """What the page works with; raises UserError for a wrong device, method or model."""
    from llmq.cards import device_bytes
    from llmq.contestant import Contestant
    from llmq.devices import first
    from llmq.environment import device_label, device_named
    from llmq.models.choice import choose_model
    from llmq.models.loading import quiet_libraries
    from llmq.models.opening import open_model
    from llmq.servers.reach import keys_of_environment
    from llmq.ui.shell.guard import sites_in
    from llmq.ui.shell.teaching import open_classes

    if gpu_is_lent():
        quiet_libraries()  # the host's library has to be asked for GPUs before anybody else asks torch
    device = device_named(options.device, several=True)
    choice = choose_model(options.model, device, hosted=is_hosted())
    methods = options.methods or default_methods(device)
    access = access_for(options, choice.model)
    access = replace(access, reach=access.reach.with_keys(keys_of_environment()))
    for name in (choice.model, *(access.models or ())):
        open_model(name)
    JOBS.machine.open, JOBS.machine.reach = access.open_model, access.reach
    if options.max_memory:
        JOBS.machine.pool.most_bytes = int(device_bytes(options.max_memory, "--max-memory"))
    return AppState(
        run=run,
        stop=JOBS.stop,
        jobs=JOBS,
        access=access,
        frames=sites_in(options.allow_frames),
        classes=open_classes(options.class_file) if options.classes or options.class_file else None,
        device=first(device),
        devices=device,
        device_label=device_label(device),
        model=choice.model,
        model_reason=choice.reason,
        methods=tuple(Contestant.parse(name).label for name in methods.split(",")),
        recorded_runs={path.stem: path for path in sorted(RUNS.glob("*.jsonl"))},
        recorded_answers={path.stem: path for path in sorted(ANSWERS.glob("*.json"))},
    )


def default_methods(device: str) -> str:
    """The quickest pair, on a GPU of one's own with bitsandbytes between them."""
    from llmq.kernels.cpu.build import why_not_native

    if device.startswith("cuda"):
        return "fp16,llm-int8" if gpu_is_lent() else "fp16,bnb-int8,llm-int8"
    return "fp16,bnb-int8" if why_not_native() else "fp16,llm-int8"


def main(arguments: list[str] | None = None) -> int:
    return guarded(lambda: run(arguments))


def run(arguments: list[str] | None) -> int:
    """Check every option, make the first model ready, and serve the page."""
    options = as_typed(parse(arguments))
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"):
        os.environ.pop(name, None)  # they are read; Gradio would try them as well where a flag says otherwise
    host, port = free_address(options.host, options.port)
    auth = parse_auth(options.auth)
    if options.mcp:
        require_mcp(auth)
    if gpu_is_lent():
        from llmq.machine.lent import LentMachine

        JOBS.machine = LentMachine(lend)
    state = make_state(options)
    try:
        fetch(state)
    except ModelUnavailable as error:
        if options.model:
            raise
        state.unable = str(error)  # what is recorded can be shown all the same, the whole lesson among it
        print(f"llmq: {error}\nllmq: nothing can run now; the page shows what is recorded", file=sys.stderr)
    serve(state, host=host, port=port, share=options.share, auth=auth, mcp=options.mcp)
    return 0


def serve(state: AppState, *, host: str, port: int, **options) -> None:
    """Serve the page until the process is interrupted. Raises UserError where the address cannot be had."""
    from llmq.ui.shell.quick_import import without_stub_files

    with without_stub_files():
        from llmq.ui.launch import launch

    try:
        launch(state, host=host, port=port, **options)
    except OSError as error:  # it was free before the model was fetched
        raise UserError(f"cannot serve at {host}:{port}: {error.strerror or error}") from error


def fetch(state: AppState) -> None:
    """Make the first model ready before the page opens, with a bar in the terminal; then warm the libraries. Where runs
    are forks of this process that is over before the first: one made during an import would wait for its end for ever.
    """
    from llmq.models.opening import open_model

    show_progress(open_model(state.model).prepare())
    if gpu_is_lent():
        import_everything()
        open_model(state.model).read_ahead()
    else:
        threading.Thread(target=warm_up, args=(state,), name="warm-up", daemon=True).start()


def warm_up(state: AppState) -> None:
    """Import and open what the first run needs (seconds) while the visitor reads the page: earlier it would hold up the
    imports of the page itself."""
    from llmq.models.loading import quiet_libraries
    from llmq.models.opening import open_model

    state.opened.wait(UNOPENED)
    quiet_libraries()
    with suppress(UserError):  # the first run says it where it is read
        open_model(state.model).tokenizer  # noqa: B018
    if not any(method.startswith("bnb-") for method in state.methods):
        from llmq.engine import llama_cpu  # noqa: F401

        time.sleep(AFTER_THE_PAGE)
    import_everything()


def import_everything() -> None:
    """Import what any run may need: whatever looks into a model, and bitsandbytes, goes through transformers."""
    import bitsandbytes  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    from llmq.engine import llama_cpu, llama_cuda  # noqa: F401

    gc.collect()
    gc.freeze()  # half a million objects of libraries, which every collection would look at (0.5 s with the GIL held)


def require_mcp(auth: tuple[str, str] | None) -> None:
    """Raise UserError where there can be no MCP server: Gradio's asks nobody for a password, and can then ask itself
    nothing either."""
    if not find_spec("mcp"):
        raise UserError(f"--mcp needs the package mcp; {MCP_ADVICE}")
    if auth:
        raise UserError("--mcp cannot be had with --auth: MCP clients have no way to give the password")


def parse_auth(text: str | None) -> tuple[str, str] | None:
    """'user:password' as a pair; None when not given."""
    if not text:
        return None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise UserError("--auth, or LLMQ_AUTH, must be USER:PASSWORD")
    return user, password


if __name__ == "__main__":
    leave(main())
