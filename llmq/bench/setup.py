"""What every speed benchmark shares: what is measured, the fixed prompt, the loops, the machine's own read speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmq.contestants import Contestant
from llmq.engine.choice import choose_engines
from llmq.engine.residents import Key
from llmq.environment import describe
from llmq.errors import BadChoice
from llmq.models.loading import Source, ids_within, load_config, load_tokenizer, prepare, resolve

BANDWIDTH_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
BANDWIDTH_REPEATS = 9


@dataclass(frozen=True)
class Setup:
    """A benchmark ready to run: each contestant with what it is loaded as."""

    source: Source
    prompt_ids: list[int]
    entries: list[tuple[Contestant, Key]]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to measure. The prompt is `prompt_tokens` tokens of a fixed text, fed as they are."""

    model: str = "demo"
    contestants: tuple[Contestant, ...]
    device: str = "cpu"
    random_weights: bool = False
    prompt_tokens: int = 64
    repeats: int = 5
    engine: str = "auto"

    def __post_init__(self):
        for name in ("prompt_tokens", "repeats"):
            require_whole(name, getattr(self, name), 1)

    def prepare(self, report: Callable[[str], None], *, positions: int = 0) -> Setup:
        """Make the model ready and choose the loops. `positions`: of prompt and answer, where there is an answer.

        One contestant after the other and each labelled with its loop: each takes the best it has, also where there are
        two. Raises BadChoice for more tokens than the model reads.
        """
        source = resolve(self.model, random_weights=self.random_weights)
        for progress in prepare(source):
            report(progress.message)
        config = load_config(source)
        needed = max(positions, self.prompt_tokens + 1)
        if needed > (context := int(getattr(config, "max_position_embeddings", 2**31))):
            raise BadChoice(f"prompt and answer are {needed:,} tokens and {self.model} reads {context:,}; choose fewer")
        prompt_ids = ids_within(config, fixed_prompt(load_tokenizer(source), self.prompt_tokens))
        entries = []
        for contestant in self.contestants:
            loop = choose_engines(self.engine, [contestant.method], config.to_dict(), self.device)[0]
            entries.append((contestant, Key(source, contestant.label, contestant.method, self.device, loop)))
        return Setup(source, prompt_ids, entries)

    def result(self, kind: str, setup: Setup, results: list[dict], **conditions) -> dict:
        """The stable keys around a benchmark's rows."""
        return {
            "kind": kind,
            "device": self.device,
            "model": self.model,
            "conditions": {
                "random_weights": self.random_weights,
                "prompt_tokens": self.prompt_tokens,
                "repeats": self.repeats,
                "batch": 1,
                **conditions,
                **describe(self.device, setup.source),
            },
            "results": results,
        }


def require_whole(name: str, value, lowest: int) -> None:
    if not isinstance(value, int) or value < lowest:
        raise BadChoice(f"{name} is {value!r}; choose a whole number of at least {lowest}")


def fixed_prompt(tokenizer, tokens: int) -> list[int]:
    """The first `tokens` token ids of the reference text."""
    from llmq.bench.quality import reference_text

    ids = tokenizer(reference_text()[: 20 * tokens + 200], add_special_tokens=False)["input_ids"]
    if len(ids) < tokens:
        raise BadChoice(f"prompt_tokens is {tokens}; the reference text gives {len(ids)}")
    return ids[:tokens]


def read_bandwidth(device: str) -> float:
    """Bytes per second this device reads from memory: the median time to sum a tensor much larger than its caches."""
    import torch

    cuda = device.startswith("cuda")
    data = torch.ones(BANDWIDTH_BYTES["cuda" if cuda else "cpu"] // 4, dtype=torch.float32, device=device)
    return data.nbytes / statistics.median(list(_sum_seconds(data, cuda))[2:])


def _sum_seconds(data, cuda: bool) -> Iterator[float]:
    import torch

    for _ in range(BANDWIDTH_REPEATS + 2):  # the first two warm up
        if cuda:
            torch.cuda.synchronize(data.device)
        started = time.perf_counter()
        data.sum().item()
        yield time.perf_counter() - started
