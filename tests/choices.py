"""What float64 chooses, greedily or by sampling, and by what margin: the near-tie rule for both.

Logits are the reference's; the noise is the engine's own, which test_sampling holds to its recipe.
What modifies scores is written here once more, token by token, from what the parameters mean.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import near_tie
import numpy as np
import reference

from apex_jax import sampling
from apex_jax.config import LlamaConfig
from apex_jax.packing import pack_head, unpack_head
from apex_jax.plan import HeadBatch
from apex_jax.request import Request, SamplingParams


@dataclass(frozen=True)
class Choices:
    """What is right for some requests, in their order: tokens, and their margins and spreads."""

    tokens: list[list[int]]
    margins: list[list[float]]
    stds: list[np.ndarray]

    def assert_are(self, got: Sequence[Sequence[int]]) -> None:
        """Hold tokens to these, by the near-tie rule."""
        near_tie.assert_equal_but_for_ties(got, self.tokens, self.margins, self.stds)


def choices_along(
    model: LlamaConfig,
    tensors: reference.Tensors,
    requests: Sequence[Request],
    texts: Sequence[Sequence[int]],
) -> Choices:
    """Return what float64 chooses at each position of texts that continue the requests.

    Right is what leads a text up to the first difference, where its comparison ends. Texts go on to
    max_tokens, or to a token that stops them.
    """
    chosen = Choices([], [], [])
    for request, tokens in zip(requests, texts, strict=True):
        params = request.sampling
        assert len(tokens) == params.max_tokens or tokens[-1] in params.stop_token_ids
        prompt = list(request.prompt_token_ids)
        logits_tv = reference.logits(model, tensors, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        made = [
            reference_choice(
                request,
                modified(params, params.stop_token_ids, prompt, tokens[:index], logits_v),
                len(prompt) + index,
            )
            for index, logits_v in enumerate(logits_tv)
        ]
        chosen.tokens.append([int(token) for token, _ in made])
        chosen.margins.append([margin for _, margin in made])
        chosen.stds.append(logits_tv.std(-1))
    return chosen


def assert_reference_chooses(
    model: LlamaConfig,
    tensors: reference.Tensors,
    requests: Sequence[Request],
    got: Sequence[Sequence[int]],
) -> None:
    """Hold each request's tokens to the reference's choices, by the near-tie rule."""
    choices_along(model, tensors, requests, got).assert_are(got)


def modified(
    params: SamplingParams,
    stop_token_ids: Sequence[int],
    prompt: Sequence[int],
    output: Sequence[int],
    logits_v: np.ndarray,
) -> np.ndarray:
    """Return the scores of the token after some output: biased, penalised, masked."""
    scores_v = logits_v.astype(np.float64)
    for token_id, bias in params.logit_bias.items():
        scores_v[token_id] += bias
    for token_id in {*prompt, *output}:
        score, penalty = scores_v[token_id], params.repetition_penalty
        scores_v[token_id] = score / penalty if score > 0 else score * penalty
    for token_id in output:
        scores_v[token_id] -= params.frequency_penalty
    for token_id in set(output):
        scores_v[token_id] -= params.presence_penalty
    if len(output) < params.min_tokens:
        scores_v[list(stop_token_ids)] = -np.inf
    for *before, last in params.bad_words:
        if list(output[len(output) - len(before) :]) == before and len(before) <= len(output):
            scores_v[last] = -np.inf
    return scores_v


def noise(request, position, num_tokens):
    """The engine's own noise: what is tested here is where it lands, test_sampling has the rest."""
    head = HeadBatch.of([0], [0], [position], [request.sampling])
    _, rows = unpack_head(jnp.asarray(pack_head(head, rows=1)))
    ids = jnp.arange(num_tokens)[None]
    return np.asarray(sampling.token_noise(rows, ids)[0], np.float64)


def reference_choice(request, logits_v, position):
    """Return the token that float64 chooses, and by how many logits it was chosen.

    Where rounding may move a cut by a token, the choice must be the same on both sides of it.
    """
    params = request.sampling
    order = np.argsort(-logits_v, kind="stable")
    if params.temperature == 0:
        return order[0], logits_v[order[0]] - logits_v[order[1]]
    scores = logits_v[order] / params.temperature
    noisy = scores + noise(request, position, len(order))[order]
    winners, gap = [], np.inf
    for share, shift in itertools.product((1, 1 - 1e-5, 1 + 1e-5), (0, -1e-5, 1e-5)):
        num_kept = len(scores)
        if params.min_p:
            lowest = scores[0] + np.log(min(params.min_p * share, 1))
            num_kept = int((scores >= lowest).sum())
        if params.top_k:
            num_kept = min(num_kept, params.top_k)
        mass = np.cumsum(np.exp(scores[:num_kept] - scores[0]))
        if params.top_p < 1:
            num_kept = int((mass / mass[-1] < params.top_p + shift).sum()) + 1
        best = np.argsort(-noisy[:num_kept])[:2]
        winners.append(order[best[0]])
        if len(best) > 1:
            gap = min(gap, noisy[best[0]] - noisy[best[1]])
    return winners[0], gap * params.temperature * (len(set(winners)) == 1)
