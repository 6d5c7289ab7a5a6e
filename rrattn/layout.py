"""The most common mistake: tensors of [batch, heads, length, head size] instead of [batch, length, heads, head size].

Where heads outnumber tokens, the sizes tell. With as many key heads as query heads such a call runs, and takes heads
for tokens: it gets a warning. Otherwise it ends in an error about lengths or heads: the error gets a hint.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paddle import Tensor

# A call that runs gets a warning only if it has more heads than layers of models have (128 in the largest LLaMA), and
# several times as many heads as keys: a short prompt also has fewer tokens than heads.
_MANY_HEADS = 128
_HEADS_PER_KEY = 4

_ADVICE = (
    "rrattn takes [batch, length, heads, head size], as Paddle's attention does: if these are [batch, heads, length, "
    "head size], give it tensor.transpose([0, 2, 1, 3]). (Of the functions of the published release, rrattn_prefill "
    "and rrattn_estimate, it is the other way round.)"
)

_warned = False


@contextlib.contextmanager
def watch_layout(query: Tensor, key: Tensor, startend_row_indices: Tensor | None, *, causal: bool) -> Iterator[None]:
    """Around the call of an operator: where its tensors look transposed, a warning, once in a process, or a hint.

    Parameters
    ----------
    query, key, startend_row_indices : Tensor
        What the operator is given, the last perhaps None. Sizes that a static graph leaves open (-1) tell nothing.
    causal : bool
    """
    if any(len(tensor.shape) != 4 or min(tensor.shape) < 1 for tensor in (query, key)):
        yield
        return
    (_, seqlen_q, num_heads, _), (_, seqlen_k, num_heads_k, _) = query.shape, key.shape
    bounds = None if startend_row_indices is None else startend_row_indices.shape
    fits = _fits(seqlen_q, seqlen_k, num_heads, num_heads_k, bounds, causal)
    advice = f"query has {seqlen_q} tokens of {num_heads} heads and key {seqlen_k} of {num_heads_k}; {_ADVICE}"
    if fits and num_heads == num_heads_k > _MANY_HEADS and num_heads >= _HEADS_PER_KEY * max(seqlen_q, seqlen_k):
        _warn_once(advice)
    try:
        yield
    except ValueError as error:
        fits_transposed = _fits(num_heads, num_heads_k, seqlen_q, seqlen_k, bounds, causal)
        if num_heads_k > seqlen_k and fits_transposed and not fits:
            raise ValueError(f"{str(error).rstrip()}\n{advice}") from None
        raise


def _fits(
    seqlen_q: int, seqlen_k: int, num_heads: int, num_heads_k: int, bounds: Sequence[int] | None, causal: bool
) -> bool:
    """Whether attention can have these sizes, with FlashMask's bounds of this shape."""
    if num_heads % num_heads_k or (causal and seqlen_q > seqlen_k):
        return False
    return bounds is None or (len(bounds) == 4 and bounds[1] in (1, num_heads_k, num_heads) and bounds[2] == seqlen_k)


def _warn_once(message: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(message, stacklevel=5)  # of the caller of the function that calls the operator
