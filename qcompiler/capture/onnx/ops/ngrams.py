"""TfIdfVectorizer: how often runs of tokens occur."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompiler.capture.onnx.call import Call
from qcompiler.capture.onnx.table import op


@op("TfIdfVectorizer")
def tf_idf(call: Call, x: Tensor) -> Tensor:
    """For each stored n-gram its count in each row (TF), its weight if it occurs (IDF), or both.

    A gram may skip up to `max_skip_count` tokens between each two of its own.
    """
    if call.has("pool_strings"):
        raise call.refusal("counts strings; expected pool_int64s")
    pool, starts = call.ints("pool_int64s"), call.ints("ngram_counts")
    shortest, longest = call.int("min_gram_length"), call.int("max_gram_length")
    places = call.ints("ngram_indexes")
    rows = x if x.ndim == 2 else x.unsqueeze(0)
    parts, gram = [], 0
    for n, start in enumerate(starts, 1):
        end = starts[n] if n < len(starts) else len(pool)
        count = (end - start) // n
        if shortest <= n <= longest and count:
            grams = torch.tensor(pool[start:end], dtype=x.dtype).reshape(count, n)
            skips = call.int("max_skip_count") + 1 if n > 1 else 1
            where = torch.tensor(places[gram : gram + count])
            parts.append((where, slice(gram, gram + count), _count(rows, grams, skips)))
        gram += count
    mode, size = call.text("mode"), max(places) + 1
    weights = torch.tensor(call.floats("weights", [1.0] * gram))
    y = torch.zeros([rows.shape[0], size])
    for where, which, counts in parts:
        value = counts if mode != "IDF" else (counts > 0).float()
        y = y.index_add(1, where, value if mode == "TF" else value * weights[which])
    return y if x.ndim == 2 else y.squeeze(0)


def _count(rows: Tensor, grams: Tensor, skips: int) -> Tensor:
    """Occurrences of each gram in each row, (rows, grams), over all distances of its tokens."""
    n = grams.shape[1]
    found = torch.zeros([rows.shape[0], grams.shape[0]])
    for distance in range(1, skips + 1):
        span = (n - 1) * distance + 1
        if isinstance(rows.shape[1], int) and rows.shape[1] < span:
            break
        runs = rows.unfold(1, span, 1)[:, :, ::distance]
        same = (runs.unsqueeze(1) == grams[:, None, :]).all(-1)
        found = found + same.sum(-1)
    return found
