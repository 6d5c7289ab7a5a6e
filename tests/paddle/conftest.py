"""Keeps what the tests trace.

Tracing leaks Python objects that stand for values of a program. Once the program is gone, Paddle 3.3.1 takes these, by
their addresses, for values of later programs: gradients are then wrong, or the process ends. Whoever keeps a traced
function, as models do, does not see it.
"""

import paddle
import pytest


@pytest.fixture(scope="session", autouse=True)
def traced_functions():
    """What `paddle.jit.to_static` returned in this run, all of it."""
    traced = []
    trace = paddle.jit.to_static

    def trace_and_keep(*arguments, **options):
        traced.append(trace(*arguments, **options))
        return traced[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paddle.jit, "to_static", trace_and_keep)
        yield traced
