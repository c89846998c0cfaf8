"""Compare greedy tokens where floating-point sums may be ordered differently.

Two correct programs may choose differently where the two best scores nearly tie, and from there on
their texts have nothing in common. So tokens must be equal up to the first position where the
reference's own margin is below 2 * tau; there the comparison of that request stops, and few
requests may stop. (tau is what two orders of float32 sums may differ by.)
"""

from collections.abc import Sequence

TAU = 5e-5  # of the standard deviation of the logits
MAX_STOPPED_SHARE = 0.05


def count_equal(
    tokens: Sequence[int], expected: Sequence[int], margins: Sequence[float], stds: Sequence[float]
) -> int:
    """Return how many leading tokens had to be equal, and were; AssertionError if one was not.

    margins, stds: at each expected token, the gap between the reference's two best scores and the
    standard deviation of its scores.
    """
    assert len(expected) == len(margins) == len(stds)
    for i, (right, margin, std) in enumerate(zip(expected, margins, stds, strict=True)):
        if margin < 2 * TAU * std:
            return i
        assert i < len(tokens), f"ends after {i} of {len(expected)} tokens"
        assert tokens[i] == right, (
            f"token {i} is {tokens[i]}, expected {right}, by a margin of {margin / std:.1e} "
            f"standard deviations (a tie is one below {2 * TAU:.0e})"
        )
    assert len(tokens) == len(expected), f"{len(tokens)} tokens, expected {len(expected)}"
    return len(expected)


def assert_equal_but_for_ties(
    tokens: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    margins: Sequence[Sequence[float]],
    stds: Sequence[Sequence[float]],
) -> None:
    """Compare every request's tokens; fail if one differs or if too many met a near tie."""
    num_stopped = 0
    for request, (got, right, *rest) in enumerate(
        zip(tokens, expected, margins, stds, strict=True)
    ):
        try:
            num_stopped += count_equal(got, right, *rest) < len(right)
        except AssertionError as error:
            raise AssertionError(f"request {request}: {error}") from None
    assert num_stopped <= MAX_STOPPED_SHARE * len(expected), (
        f"the comparison of {num_stopped} of {len(expected)} requests stopped at a near tie"
    )
