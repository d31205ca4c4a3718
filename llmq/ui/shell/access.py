"""What whoever opens the page may do: the models, the sizes, the downloads. No gradio.

Names come in here and nowhere else: whatever the page or an endpoint opens, it opens with `Access`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmq.engine.sampling import MAX_NEW_TOKENS
from llmq.errors import BadChoice, unknown
from llmq.models import opening
from llmq.models.hub import Fetching
from llmq.models.opening import Model
from llmq.models.presets import PRESETS
from llmq.servers.reach import ANYWHERE, Reach

LOOPBACK = ("127.", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a visitor may do; the default is the owner's own machine, where everything goes.

    `models`: the names that may be opened, None for any; `fetching`: what may come from the hub for them;
    `random_weights`: whether a preset's shape may be filled with them; `reach`: the servers that may be asked;
    `most_tokens`: of one answer; `upload_bytes`: of one file.
    """

    models: tuple[str, ...] | None = None
    fetching: Fetching = Fetching()
    random_weights: bool = True
    reach: Reach = ANYWHERE
    most_tokens: int = MAX_NEW_TOKENS
    upload_bytes: int = 32_000_000

    @classmethod
    def of_strangers(
        cls, models: tuple[str, ...] = (), download_bytes: int = 0, servers: tuple[str, ...] = ()
    ) -> Access:
        """Presets that nobody has to sign for, `models` of the owner's, and `download_bytes` at most for one of them,
        without the owner's token; `servers` of the owner's, by host."""
        free = tuple(name for name, preset in PRESETS.items() if not preset.gated)
        return cls(
            models=tuple(dict.fromkeys((*free, *models))), fetching=Fetching(download_bytes, token=False),
            random_weights=False, reach=Reach(frozenset(servers)), most_tokens=1024, upload_bytes=16_000_000,
        )  # fmt: skip

    @property
    def public(self) -> bool:
        return self.models is not None

    @property
    def offered(self) -> tuple[str, ...]:
        """The names to choose from."""
        return self.models or tuple(PRESETS)

    def open_model(self, name: str, *, random_weights: bool = False) -> Model:
        """As `opening.open_model`. Raises BadChoice, in the same words whatever else a name might mean here."""
        if random_weights and not self.random_weights:
            raise BadChoice("this server opens no random weights; choose a model with its own")
        self._check(name, self.models)
        return self._held(opening.open_model(name, random_weights=random_weights))

    def describe_model(self, name: str) -> Model:
        """As `opening.describe_model`, where every preset's shape may be counted."""
        self._check(name, self.models and tuple(dict.fromkeys((*PRESETS, *self.models))))
        return self._held(opening.describe_model(name))

    def check_tokens(self, count: int) -> int:
        """`count`. Raises BadChoice for a longer answer than a visitor may ask for."""
        if count > self.most_tokens:
            raise BadChoice(f"max_new_tokens is {count}; choose a whole number from 1 to {self.most_tokens} here")
        return count

    def _check(self, name: object, names: tuple[str, ...] | None) -> None:
        if names is not None and (not isinstance(name, str) or name.strip() not in names):
            raise unknown("model", str(name)[:80], names)

    def _held(self, model: Model) -> Model:
        return replace(model, source=replace(model.source, fetching=self.fetching))


ANYBODY = Access()


def is_open(host: str, *, share: bool, hosted: bool) -> bool:
    """Whether others than this machine's own people can reach the page; `hosted`: a Space or a notebook's machine."""
    return share or hosted or not host.strip("[]").startswith(LOOPBACK)
