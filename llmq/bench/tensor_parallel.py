"""Decode and prefill of one model on several numbers of GPUs by tensor parallelism, which transformers has:
`python -m llmq.bench.tensor_parallel --gpus 1,2,4 --model llama-2-7b-chat --random-weights [--save FILE]`.

Each count is a run of its own, a process for each GPU (torchrun); on a machine without any the processes share the CPU.
Every matrix is parted among the GPUs by the model's own plan, and their sums are exchanged twice a layer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from llmq.bench.rounds import spread
from llmq.engine.hf import HFEngine
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice, UserError
from llmq.files import write_text
from llmq.formatting import format_bytes, format_seconds
from llmq.methods import METHODS
from llmq.scores import first_divergence

PROMPT_TOKENS, NEW_TOKENS, REPEATS, WARM_UPS = 64, 64, 5, 2
FIRST_ID = 5  # of a prompt of tokens that are no end of text in any of the presets
WORKER = "--worker"


def main(arguments: list[str]) -> int:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(prog="python -m llmq.bench.tensor_parallel", description=__doc__.partition(":")[0])
    parser.add_argument("--gpus", default="1,2", help="how many, comma-separated (default: 1,2)")
    parser.add_argument("--model", default="demo", help="a preset, a hub id or a local folder (default: demo)")
    parser.add_argument("--random-weights", action="store_true", help="a preset's shape with random weights")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the result")
    options = parser.parse_args(arguments)
    try:
        result = measure(counts_in(options.gpus), options.model, random_weights=options.random_weights)
    except UserError as error:
        print(f"llmq: {error}", file=sys.stderr)
        return 1
    for row in result["results"]:
        print(
            f"{row['gpus']} GPU{'s' if row['gpus'] > 1 else ' '}  {row['tokens_per_second']:7.2f} tok/s "
            f"({row['tokens_per_second_min']:.2f} to {row['tokens_per_second_max']:.2f}), "
            f"{row['over_fewest']:.2f} times the fewest; first token {format_seconds(row['prefill_seconds'])}; "
            f"{format_bytes(max(row['peak_bytes']))} at most on one; "
            f"{row['same_tokens']} of {NEW_TOKENS} tokens as on these"
        )
    if options.save:
        write_text(options.save, json.dumps(result, indent=1) + "\n")
    return 0


def counts_in(text: str) -> list[int]:
    """Return how many GPUs, the fewest first: what the others are compared with. Raises BadChoice for no such list."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise BadChoice(f"--gpus is {text!r}; give numbers such as 1,2,4")
    return sorted(set(map(int, parts)))


def measure(counts: list[int], model: str, *, random_weights: bool = False) -> dict:
    """Return a result for each of `counts`, in the form of a stored one. Raises UserError where a run fails."""
    import torch

    from llmq.environment import default_device, describe
    from llmq.models.opening import open_model

    have = torch.cuda.device_count()
    if have and max(counts) > have:
        raise BadChoice(f"--gpus asks for {max(counts)} and there are {have}")
    opened = open_model(model, random_weights=random_weights)
    for _ in opened.prepare():
        pass
    with tempfile.TemporaryDirectory(prefix="llmq-parallel-") as folder:
        rows = [_run(count, _checkpoint(opened, Path(folder)), Path(folder)) for count in counts]
    fewest, texts = rows[0], [row.pop("tokens") for row in rows]
    for row, text in zip(rows, texts, strict=True):
        row["over_fewest"] = row["tokens_per_second"] / fewest["tokens_per_second"]
        parting = first_divergence(text, texts[0])
        row["same_tokens"] = NEW_TOKENS if parting is None else parting
    asked = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "repeats": REPEATS}
    conditions = asked | {"random_weights": random_weights} | describe(default_device(), opened.source)
    conditions["command"] = " ".join(["python -m llmq.bench.tensor_parallel", *sys.argv[1:]])
    return {"kind": "tensor-parallel", "model": model, "conditions": conditions, "results": rows}


def _checkpoint(opened, folder: Path) -> Path:
    """Where the model's files are; random weights are written once."""
    from llmq.models.loading import folder_of, load_model

    if opened.source.kind != "random":
        return folder_of(opened.source)
    if not (written := folder / "model").exists():
        from llmq.environment import default_device
        from llmq.machine.pool import reclaim

        load_model(opened.source, METHODS["fp16"], default_device()).save_pretrained(written)
        reclaim(default_device())  # for the processes to come
    return written


def _run(count: int, checkpoint: Path, folder: Path) -> dict:
    """One count of GPUs: as many processes, of which the first writes what it measured."""
    out = folder / f"{count}.json"
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run(
        [*run, "-m", "llmq.bench.tensor_parallel", WORKER, str(checkpoint), str(out)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )  # fmt: skip
    if not out.exists():
        said = [line for line in done.stderr.splitlines() if "Error" in line]
        raise UserError(f"on {count} GPUs: {said[-1].strip() if said else f'the run ended with {done.returncode}'}")
    return json.loads(out.read_text())


def work(checkpoint: str, out: str) -> int:
    """Be one of the processes: load this one's part, generate with all the others, and tell what was measured."""
    import torch
    from torch import distributed
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from llmq.models.loading import quiet_libraries

    quiet_libraries()
    rank, count = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    where = {"distributed_config": DistributedConfig(tp_plan="auto")} if count > 1 else {"device_map": {"": device}}
    dtype = torch.float16 if device != "cpu" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, local_files_only=True, **where).eval()
    engine, turns = HFEngine(model, METHODS["fp16"], device), []
    size = model.config.get_text_config().vocab_size
    ids = [FIRST_ID + i * 37 % (size - FIRST_ID) for i in range(PROMPT_TOKENS)]
    for _ in range(REPEATS + WARM_UPS):
        with closing(engine.start(ids, SamplingSettings(max_new_tokens=NEW_TOKENS))) as generation:
            first = generation.prefill()
            steps = [generation.step() for _ in range(NEW_TOKENS - 1)]
            turns.append((first, steps, generation.allocator_peak_bytes))
    peak, peaks = max(turn[2] for turn in turns), [None] * count
    if count > 1:
        distributed.all_gather_object(peaks, peak)
    if rank == 0:
        write_text(Path(out), json.dumps(_told(turns[WARM_UPS:], peaks if count > 1 else [peak])))
    if count > 1:
        distributed.destroy_process_group()
    return 0


def _told(turns: list[tuple], peaks: list[int]) -> dict:
    speeds = [len(steps) / sum(token.seconds for token in steps) for _, steps, _ in turns]
    return {
        "gpus": len(peaks),
        **spread("tokens_per_second", speeds),
        **spread("prefill_seconds", [first.seconds for first, _, _ in turns]),
        "peak_bytes": peaks,
        "tokens": [token.token_id for token in (turns[0][0], *turns[0][1])],
    }


if __name__ == "__main__":
    words = sys.argv[1:]
    raise SystemExit(work(*words[1:]) if words[:1] == [WORKER] else main(words))
