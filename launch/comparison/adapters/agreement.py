"""How far two frameworks chose the same greedy tokens: information, not a check.

In float32 two correct implementations differ only where two scores are nearly tied, and after such
a place nothing can be compared. Imports no jax.
"""

from typing import Any

from launch.comparison.adapters.jobs import JobResult


def agreement(of: JobResult, reference: JobResult) -> dict[str, Any]:
    """Return the shares of requests equal to their end, and of tokens before a first difference."""
    expected = {one.id: one.output_token_ids for one in reference.requests}
    num_equal, num_before, num_tokens = 0, 0, 0
    for done in of.requests:
        pairs = list(zip(done.output_token_ids, expected[done.id], strict=True))
        same = next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
        num_equal += same == len(pairs)
        num_before += same
        num_tokens += len(pairs)
    return {
        "equal_requests": num_equal / len(of.requests),
        "tokens_before_a_difference": num_before / num_tokens,
    }
