"""Quantize a model and keep it: the question behind `llmq quantize`: load, calibrate, write a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.contestant import Contestant
from llmq.engine.loading import Key, needs_statistics, statistics_file
from llmq.errors import BadChoice
from llmq.events import Event, Progress
from llmq.methods import Method
from llmq.methods.calibrate import FOLDER

if TYPE_CHECKING:
    from llmq.machine.door import Lease
    from llmq.models.formats.base import Format
    from llmq.models.opening import Model


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Write `model` under `method` to `folder`, which does not exist yet. `format`: one that holds the method, '' for
    its own. `statistics`: whether those of a calibration go with it."""

    model: str
    method: Method
    folder: Path
    device: str
    format: str = ""
    statistics: bool = True
    patient: bool = True

    def run(self, lease: Lease) -> Iterator[Event | Progress | dict]:
        """Yield what happens, and at last what was written, under the keys of `quantize --json`. Raises BadChoice for
        what no checkpoint holds, before anything is loaded where that can be told."""
        if self.method.dense:
            raise BadChoice(f"{self.method.spelled} quantizes nothing: choose another method")
        model = yield from lease.open(self.model)
        int8 = self._is_int8
        for event in self._save_int8(model) if int8 else self._save(model, lease):
            lease.check()
            yield event
        statistics = self.folder / FOLDER
        yield {
            "model": self.model,
            "method": self.method.spelled,
            "folder": str(self.folder),
            "format": "bitsandbytes" if int8 else self._form.name,
            "weight_bytes": sum(path.stat().st_size for path in self.folder.glob("*.safetensors")),
            "calibration": str(statistics) if statistics.exists() else None,
        }

    @property
    def _is_int8(self) -> bool:
        """Whether the method starts from bitsandbytes' int8 codes, which are written without loading the model, and is
        what reads them there."""
        own = self.method.int8_head or self.method.by_row
        return self.method.opens_int8 and not own and self.format in ("", "bitsandbytes")

    @property
    def _form(self) -> Format:
        from llmq.models.formats import format_for

        return format_for(self.method, self.format)

    def _save_int8(self, model: Model) -> Iterator[Progress]:
        from llmq.models.int8_checkpoint import save_int8

        threshold = {} if self.method.threshold is None else {"threshold": self.method.threshold}
        return save_int8(model.source, self.folder, **threshold)

    def _save(self, model: Model, lease: Lease) -> Iterator[Event | Progress]:
        from llmq.models.saving import require_savable, save_model

        form, key = self._form, Key.of(model, self.method, self.device)
        require_savable(model.source, self.folder)
        engine = yield from lease.load(key, Contestant(self.method))
        statistics = statistics_file(key) if self.statistics and needs_statistics(key) else None
        yield from save_model(engine.model, self.method, model.source, self.folder, form, statistics)
