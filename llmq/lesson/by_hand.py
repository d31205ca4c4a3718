"""The steps that need no model: a few numbers, rounded as anybody can do it on paper."""

from __future__ import annotations

from collections.abc import Callable

from llmq.lesson.exhibit import Exhibit


def round_by_hand() -> Exhibit:
    """Four numbers, the scale of the largest, and their codes."""
    numbers = [0.5, -1.2, 2.54, 0.074]
    scale = max(map(abs, numbers)) / 127
    codes = [round(number / scale) for number in numbers]
    values = {"scale": scale, "code": codes[0], "number": numbers[0], "largest": 2.54}
    return Exhibit({"numbers": numbers}, values, {"round": str(codes[0])}, (max(codes), codes[0]))


def absmax() -> Exhibit:
    """Eight numbers of one size, of which one becomes large; how many codes the seven others still have."""
    numbers, place, loud = [0.31, -0.82, 0.55, 1.0, -0.47, 0.12, -0.9, 0.68], 3, 60.0
    others = numbers[:place] + numbers[place + 1 :]

    def told(largest: float) -> tuple[int, float]:
        scale = largest / 127
        codes = [round(number / scale) for number in others]
        errors = [abs(code * scale - number) for code, number in zip(codes, others, strict=True)]
        return len(set(codes)), sum(errors) / len(errors)

    (quiet_codes, quiet_error), (codes, error) = told(1.0), told(loud)
    values = {"loud": loud, "codes": codes, "quiet_codes": quiet_codes, "error": error, "quiet_error": quiet_error}
    values["times"] = error / quiet_error
    data = {"numbers": numbers, "place": place, "loud": loud}
    return Exhibit(data, values, {"absmax": str(codes)}, (quiet_codes, codes))


MATRIX = (  # four tokens, six channels
    (0.42, -0.71, 0.83, 0.88, -0.35, 0.27),
    (-0.58, 0.24, 0.95, -0.16, 0.49, -0.83),
    (0.19, 0.66, -0.88, 0.31, -0.92, 0.57),
    (0.73, -0.28, 0.91, -0.54, 0.08, -0.39),
)


def vectorwise() -> Exhibit:
    """A small matrix with a loud row, or with a loud column, and a scale for all of it or for each row."""
    row, column, loud = 1, 2, 60.0

    def error(is_loud: Callable[[int, int], bool]) -> float:
        """The mean error of the other numbers where each row has a scale of its own."""
        errors = []
        for i, line in enumerate(MATRIX):
            numbers = [number * loud if is_loud(i, j) else number for j, number in enumerate(line)]
            scale = max(map(abs, numbers)) / 127
            others = (number for j, number in enumerate(numbers) if not is_loud(i, j))
            errors += [abs(round(number / scale) * scale - number) for number in others]
        return sum(errors) / len(errors)

    data = {"matrix": MATRIX, "row": row, "column": column, "loud": loud}
    pair = error(lambda i, j: i == row), error(lambda i, j: j == column)
    return Exhibit(data, {"loud": loud}, {"vectorwise": "none"}, pair)
