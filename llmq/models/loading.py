"""From a name to a model on a device: presets, hub ids, local folders; `safetensors` only, never remote code."""

from __future__ import annotations

import json
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import BadChoice, ModelUnavailable, NoModel, UserError, first_line, is_allocation_failure, unknown
from llmq.events import Progress
from llmq.models import hub
from llmq.models.checkpoint import CheckpointTensors, require_model, require_scales, require_whole, stamps
from llmq.models.config import PlainConfig, generation_settings, plain_config, quantization_of
from llmq.models.demo import GGUF_SHA256, REQUIREMENT, demo_folder, prepare_demo
from llmq.models.edits import Edit, EditedTensors, edit_model_
from llmq.models.presets import PRESETS

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmq.methods import Method
    from llmq.models.random_weights import RandomTensors

_QUIETING = threading.Lock()
ROUND_TRIP = "hello world how are you today"  # what a tokenizer must give back, whatever it does to spaces and capitals
GENERAL_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # transformers' names for one class


@dataclass(frozen=True)
class Source:
    """Where a model comes from. `kind`: 'demo', 'hub', 'folder' or 'random' (a preset's shape, no checkpoint).
    `edit`: what is done to its weights on their way (`edits`). `revision`: of a hub's repository, None for its main.
    `window`: tokens that the attention of a random shape sees, as Mistral's; None for all.
    `fetching`: what may come from there, which says nothing about the model."""

    name: str
    kind: str
    location: str
    edit: Edit | None = None
    revision: str | None = None
    window: int | None = None
    fetching: hub.Fetching = field(default=hub.ANYTHING, compare=False, repr=False)


def resolve(name: str, *, random_weights: bool = False) -> Source:
    """Tell what `name` means: a preset, a local folder, or a hub id, '@revision' and all. Raises BadChoice naming the
    choices."""
    name = str(name or "").strip()
    if random_weights:
        if name not in PRESETS:
            raise unknown("preset", name, PRESETS)
        return Source(name, "random", name)
    if preset := PRESETS.get(name):
        return Source(name, "hub", preset.hub_id) if preset.hub_id else Source(name, "demo", str(demo_folder()))
    if path := _local_path(name):
        if path.is_dir():
            return Source(name, "folder", str(path))
        raise BadChoice(f"{name!r} is a file, and a model has several: give the folder {str(path.parent)!r}")
    if address := hub.address_of(name):
        repo, revision = address
        return Source(f"{repo}@{revision}" if revision else repo, "hub", repo, revision=revision)
    raise unknown("model", name, [*PRESETS, "a hub id such as owner/name", "a local folder"])


def _local_path(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if name and not name.endswith(".gguf") and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # no such home, a name too long, a zero byte: nothing
        return None


def prepare(source: Source) -> Iterator[Progress]:
    """Download or convert whatever `source` still needs, yielding progress. Afterwards `folder_of(source)` exists."""
    if source.kind in ("demo", "random"):  # random weights borrow the demo model's tokenizer
        yield from prepare_demo()
    elif source.kind == "hub":
        yield from hub.download(source.location, source.revision, source.fetching)


def folder_of(source: Source) -> Path:
    """Return the local folder of a prepared model. Raises ModelUnavailable when it holds no model llmq can open."""
    folder = hub.snapshot(source.location, source.revision) if source.kind == "hub" else Path(source.location)
    if source.kind == "demo" and not (folder / "config.json").exists():
        needed = "the demo model (random weights borrow its tokenizer)"
        raise ModelUnavailable(f"{needed} is not in {folder}; run `python -m llmq models --fetch demo`")
    try:
        require_model(folder, source.name)
    except OSError as error:
        raise ModelUnavailable(f"cannot read {folder}: {error.strerror or error}") from error
    return folder


def revision_of(source: Source) -> str:
    """Name the exact checkpoint: a hub commit, the demo's pinned hash, or what else identifies it."""
    if source.kind == "demo":
        return f"{REQUIREMENT}, sha256 {GGUF_SHA256[:12]}"
    if source.kind == "hub":
        return folder_of(source).name
    return "random weights; a borrowed tokenizer" if source.kind == "random" else "local folder"


def load_config(source: Source) -> PretrainedConfig | PlainConfig:
    """Return the model's configuration; read without transformers where the lean loop can compute the model. Raises
    ModelUnavailable for unknown architectures."""
    if source.kind != "random" and (plain := plain_config(folder_of(source))):
        return plain
    return transformers_config(source)


def transformers_config(source: Source) -> PretrainedConfig:
    """Return the configuration that transformers makes models from. Raises ModelUnavailable as `load_config`."""
    from transformers import LlamaConfig, MistralConfig

    if source.kind == "random":
        shape = asdict(PRESETS[source.location].shape)
        rope = {"rope_theta": shape.pop("rope_theta"), **(shape.pop("rope_scaling") or {"rope_type": "default"})}
        kind, windowed = (MistralConfig, {"sliding_window": source.window}) if source.window else (LlamaConfig, {})
        return kind(**shape, **windowed, rope_parameters=rope, dtype="float16", borrowed_tokenizer=True)
    return config_in(folder_of(source), source)


def config_in(folder: Path, source: Source) -> PretrainedConfig:
    """Return transformers' configuration of a folder. Raises ModelUnavailable for what writes no text."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    with blamed_on(source, "read the configuration"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelUnavailable(f"{source.name} is a {config.model_type!r} model, which does not write text by itself")
    return config


def range_note(config: PretrainedConfig | PlainConfig, method: Method) -> str:
    """Return a note on the range of a BF16 checkpoint under an FP16 method; '' otherwise."""
    if str(getattr(config, "dtype", None)).removeprefix("torch.") != "bfloat16" or method.dtype != "float16":
        return ""
    return "a BF16 checkpoint in FP16, which ends at 65,504: beyond that a run is stopped, and bf16 would go on"


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, chat template included. Random weights borrow the demo model's tokenizer."""
    folder = folder_of(resolve("demo") if source.kind == "random" else source)
    return _open_tokenizer(source, folder, _tokenizer_stamps(folder))


def _tokenizer_stamps(folder: Path) -> tuple:
    files = sorted(path for path in folder.glob("*.json") if path.name not in ("config.json", "generation_config.json"))
    return stamps([*files, *folder.glob("*.jinja"), *folder.glob("tokenizer.model")])


@lru_cache(maxsize=4)
def _open_tokenizer(source: Source, folder: Path, stamped: tuple) -> PreTrainedTokenizerBase:
    with blamed_on(source, "open the tokenizer"):
        import transformers

        kind = transformers.PreTrainedTokenizerFast if _names_no_family(folder) else transformers.AutoTokenizer
        tokenizer = kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        ids = tokenizer(ROUND_TRIP, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids)
    if tokenizer.unk_token_id not in ids and back.lower().split() != ROUND_TRIP.split():
        raise ModelUnavailable(f"the tokenizer of {source.name} loses text: {ROUND_TRIP!r} becomes {back!r}")
    return tokenizer


def _names_no_family(folder: Path) -> bool:
    """Whether the tokenizer is all in its `tokenizer.json`: then it needs nothing of its model's family, whose code
    takes seconds to import."""
    try:
        named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        return False
    return named in GENERAL_TOKENIZERS and (folder / "tokenizer.json").is_file()


def ids_within(config: PretrainedConfig | PlainConfig, ids: list[int]) -> list[int]:
    """Return token ids that the model's embedding has. Raises ModelUnavailable for one that it has not; only those of a
    borrowed tokenizer, for random weights whose text means nothing, are folded into the vocabulary."""
    size = config.get_text_config().vocab_size
    if getattr(config, "borrowed_tokenizer", False):
        return [i % size for i in ids]
    if beyond := [i for i in ids if not 0 <= i < size]:
        raise ModelUnavailable(f"token {beyond[0]} is beyond the model's {size:,}: its tokenizer is another model's")
    return ids


def load_model(
    source: Source, method: Method, device: str, statistics: Mapping[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """Return the model under one method on one device, in eval mode, without gradients.

    `device`: 'cpu', 'cuda:N', or several GPUs to spread it over; `statistics`: of the layers' inputs,
    for a calibrated method. bitsandbytes silently takes another path in training mode, so eval is not optional.
    """
    from llmq.models.quantized import open_quantized
    from llmq.models.spread import device_map

    places = device_map(transformers_config(source), device)
    if source.kind == "random":
        from llmq.models.random_weights import random_llama

        model = random_llama(transformers_config(source), places)
    elif held := open_quantized(source, method, device):
        return held.requires_grad_(False).eval()
    else:
        arguments = {"dtype": method.dtype} if source.edit else method.load_arguments(device)
        model = open_checkpoint(source, arguments | {"device_map": places})
    if source.edit:
        model = edit_model_(model, source.edit)
    return method.quantize_(model, device, statistics).requires_grad_(False).eval()


def open_checkpoint(source: Source, arguments: dict, kind: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """Open the checkpoint as transformers does; with `kind`, a model of that class from the `state_dict` among the
    `arguments`. Raises ModelUnavailable where weights are missing or of another size."""
    from transformers import AutoModelForCausalLM

    with blamed_on(source, "open the weights"):
        model, found = (kind or AutoModelForCausalLM).from_pretrained(
            None if kind else folder_of(source),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, in one line
            **arguments,
        )
    require_whole(source.name, model, found)
    model.generation_config.eos_token_id = sorted(eos_ids_of(source, model.config)) or None
    return model


def open_tensors(source: Source) -> CheckpointTensors | RandomTensors | EditedTensors:
    """Return the model's tensors, one at a time, by their names in the checkpoint."""
    if source.edit:
        return EditedTensors(open_tensors(replace(source, edit=None)), source.edit)
    if source.kind == "random":
        from llmq.models.random_weights import RandomTensors

        return RandomTensors(load_config(source))
    with blamed_on(source, "open the weights"):
        tensors = CheckpointTensors(folder_of(source), source.name)
    stated = quantization_of(load_config(source)).get("load_in_8bit")  # then all of a LLaMA's layers but the head
    layers = {name.removesuffix(".weight") for name in tensors.names() if stated and name.endswith("_proj.weight")}
    require_scales(source.name, layers, tensors.names())
    return tensors


def eos_ids_of(source: Source, config: PretrainedConfig | PlainConfig) -> frozenset[int]:
    """Return the tokens that end a text: those of the generation settings, of the configuration and of the tokenizer,
    because each of the three is wrong somewhere."""
    ends = [getattr(config.get_text_config(), "eos_token_id", None)]
    if source.kind != "random":
        with blamed_on(source, "read the generation settings"):
            ends.append(generation_settings(folder_of(source)).get("eos_token_id"))
        ends.append(load_tokenizer(source).eos_token_id)
    lists = (end if isinstance(end, list | tuple) else [end] for end in ends)
    return frozenset(i for ids in lists for i in ids if isinstance(i, int))


def quiet_libraries() -> None:
    """Keep what the libraries tell their own users off the terminal: progress bars, what their next versions change,
    packages that would help a method llmq does not have. Errors still show; llmq reports progress itself.

    It imports transformers, which two threads cannot import at once, as that replaces its own module: who comes later
    waits."""
    with _QUIETING:
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging as transformers_logging

        disable_progress_bars()
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
        warnings.simplefilter("ignore", FutureWarning)


@contextmanager
def blamed_on(source: Source, attempt: str) -> Iterator[None]:
    """Turn what a library raises while it reads a model's files into one line that names those files."""
    import torch

    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if is_allocation_failure(error):
            raise
        raise NoModel(f"cannot {attempt} of {source.name}: {first_line(error)}") from error
