"""The NumPy oracle's attention in place of the one that a model runs."""

import numpy as np
import paddle

from rrattn import reference


class Oracle(paddle.autograd.PyLayer):
    """The three stages of the reference in float64, and its backward, as a function of Paddle tensors."""

    @staticmethod
    def forward(context, query, key, value, sink, rows, core, causal, softmax_scale):
        query, key, value = (tensor.numpy().astype(np.float64) for tensor in (query, key, value))
        learned_sink = sink is not None and not sink.stop_gradient
        sink = None if sink is None else sink.numpy().astype(np.float64)
        lengths = {"seqlen_q": query.shape[1], "seqlen_k": key.shape[1]}
        mask = {"startend": rows, "causal": causal}
        softmax = {"softmax_scale": softmax_scale, "sink": sink}
        scores = reference.estimate(query, key, **mask, **{**core.config.sampling(), **softmax}).astype(np.float32)
        threshold = 1.0 if lengths["seqlen_q"] == 1 < lengths["seqlen_k"] else core.threshold
        selected = reference.select(scores, threshold, **mask, **lengths, **core.config.keep_rules())
        out, _ = reference.attend(query, key, value, selected, **mask, **softmax)
        context.arguments = (query, key, value, selected), {**mask, **softmax}
        context.learned_sink = learned_sink
        return paddle.to_tensor(out.astype(np.float32))

    @staticmethod
    def backward(context, grad_out):
        tensors, options = context.arguments
        grads = reference.backward(*tensors, grad_out.numpy().astype(np.float64), **options)
        grads = [paddle.to_tensor(grad.astype(np.float32)) for grad in grads]
        return (*grads[:3], grads[3] if context.learned_sink else None)[: len(grads)]


def oracle_forward(core, query, key, value, startend_row_indices=None, *, causal=True, softmax_scale=None, sink=None):
    """RRAttention.forward by the oracle."""
    rows = None if startend_row_indices is None else startend_row_indices.numpy()
    return Oracle.apply(query, key, value, sink, rows, core, causal, softmax_scale)
