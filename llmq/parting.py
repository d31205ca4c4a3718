"""The first difference of two texts: what each model chose there, and how likely the first held both choices."""

from __future__ import annotations

from dataclasses import dataclass

from llmq.contestant import shown_name
from llmq.formatting import format_share, quoted

NEARLY = 0.8  # of the likelier one's probability: the other is then nearly as likely
ORDINALS = ("first", "second", "third", "fourth", "fifth")


@dataclass(frozen=True)
class Choice:
    """A token that `contestant` chose; `text` is '' for a part of a character, None for the end of the text.

    `probability` and `rank` (0: likeliest) are by the first contestant's distribution before temperature and filters,
    None where they are not known: `under` is then what the probability cannot reach, if that is known.
    """

    contestant: str
    token_id: int
    text: str | None
    probability: float | None
    rank: int | None
    under: float | None

    @property
    def quoted(self) -> str:
        """The token as people read it."""
        if not self.text:
            return "the end of its text" if self.text is None else f"token {self.token_id}"
        return quoted(self.text)

    def judged_by(self, name: str) -> str:
        """', FP16's second at 31%'; '' where nothing is known."""
        if self.probability is not None and self.rank is not None:
            whose = f"{name}'" if name.endswith("s") else f"{name}'s"
            return f", {whose} {ORDINALS[self.rank]} at {format_share(self.probability)}"
        return "" if self.under is None else f", to which {name} gave under {format_share(self.under)}"


@dataclass(frozen=True)
class Parting:
    """The choices of the `first` and the `second` contestant where their texts part."""

    first: Choice
    second: Choice

    @property
    def nearly_a_tie(self) -> bool:
        """Whether the first held both about as likely, so that rounding alone could decide."""
        chances = [choice.probability for choice in (self.first, self.second)]
        return None not in chances and min(chances) >= NEARLY * max(chances)

    def sentence(self) -> str:
        """'FP16 took “choices” at 34%, int8 “steps”, FP16's second at 31%: nearly a tie', as far as it is known."""
        name, other = (shown_name(choice.contestant) for choice in (self.first, self.second))
        drawn = f", its {ORDINALS[self.first.rank]}" if self.first.rank else ""
        return (
            f"{name} took {self.first.quoted} at {format_share(self.first.probability)}{drawn}, {other} "
            f"{self.second.quoted}{self.second.judged_by(name)}{': nearly a tie' if self.nearly_a_tie else ''}"
        )
