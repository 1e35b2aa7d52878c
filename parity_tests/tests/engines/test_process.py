"""Workers: what they answer, and what becomes of one that crashes, hangs or speaks out of turn."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from qtx.engines import process
from qtx.engines.process import EngineCrash, EngineRefusal, Worker, make_environment

CODE = """
import os, signal, sys, time
from qtx.engines.process import serve

def do(task, values, tell):
    if task["what"] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task["what"] == "hang":
        time.sleep(60)
    if task["what"] == "leave":
        sys.exit("no such kernel")
    if task["what"] == "raise":
        raise ValueError("scale 0:\\n  give another")
    if task["what"] == "speak":
        print("INFO: a delegate", flush=True)
        os.write(1, b'{"result": "of nobody"}\\n')
        tell(3)
    return os.getpid(), {**values, "contiguous": bool(values["x"].flags.c_contiguous) if "x" in values else None}

serve(do)
"""


@pytest.fixture(scope="module")
def worker():
    with Worker([sys.executable, "-c", CODE], make_environment()) as made:
        yield made


def test_arrays_come_back_as_they_went(worker):
    """Every dtype, no axes and no elements included; a string and a number beside them."""
    for dtype in ("float16", "float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "int64", "bool"):
        for array in (np.arange(6).reshape(2, 3).astype(dtype), np.array(1, dtype), np.zeros((0, 2), dtype)):
            _, given = worker.call({"what": "echo"}, {"x": array, "dtype": dtype, "axis": 1})
            assert given["x"].dtype == array.dtype and given["x"].shape == array.shape
            assert np.array_equal(given["x"], array) and (given["dtype"], given["axis"]) == (dtype, 1)


def test_what_is_not_contiguous_arrives_so(worker):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    for strided in (x[:, ::2], x.T, x[::-1]):
        _, given = worker.call({"what": "echo"}, {"x": strided})
        assert np.array_equal(given["x"], strided) and given["contiguous"] is False
    assert worker.call({"what": "echo"}, {"x": x})[1]["contiguous"] is True


def test_a_refusal_is_one_line_and_the_worker_goes_on(worker):
    before, _ = worker.call({"what": "echo"}, {})
    with pytest.raises(EngineRefusal, match=r"^ValueError: scale 0: give another$"):
        worker.call({"what": "raise"}, {})
    assert worker.call({"what": "echo"}, {})[0] == before


def test_a_crash_names_its_signal_and_the_next_call_starts_anew(worker):
    before, _ = worker.call({"what": "echo"}, {})
    with pytest.raises(EngineCrash, match=r"crashed \(signal 11\)") as caught:
        worker.call({"what": "crash"}, {"x": np.zeros(1_000_000)})
    assert caught.value.signal == 11 and caught.value.seconds is None
    assert worker.call({"what": "echo"}, {})[0] != before


def test_a_hang_ends_after_its_limit(worker):
    with pytest.raises(EngineCrash, match="did not end within 0.3 s") as caught:
        worker.call({"what": "hang"}, {}, limit=0.3)
    assert caught.value.seconds == 0.3 and caught.value.signal is None
    worker.call({"what": "echo"}, {})


def test_one_that_leaves_says_its_last_word(worker):
    with pytest.raises(EngineCrash, match="ended with status 1: no such kernel"):
        worker.call({"what": "leave"}, {})


def test_what_an_engine_prints_is_no_answer(worker):
    told = []
    result, _ = worker.call({"what": "speak"}, {}, tell=told.append)
    assert isinstance(result, int) and told == [3]


def test_a_worker_killed_between_calls_is_started_anew(worker):
    before, _ = worker.call({"what": "echo"}, {})
    worker.process.kill()
    worker.process.wait()
    assert worker.call({"what": "echo"}, {})[0] != before


def test_a_message_cut_short_is_the_end():
    pipe = io.BytesIO()
    process.write(pipe, {"result": 1}, {"x": np.arange(5)})
    whole = pipe.getvalue()
    message, values = process.read(io.BytesIO(b"noise\n[1]\n" + whole))
    assert message == {"result": 1} and values["x"].tolist() == [0, 1, 2, 3, 4]
    assert process.read(io.BytesIO(whole[:-1])) is None
    assert process.read(io.BytesIO(b"")) is None


def test_objects_are_never_sent():
    """Nothing is pickled on the way there, so nothing is unpickled."""
    with pytest.raises(Exception, match="(?i)dtype|object|safetensor|O"):
        process.write(io.BytesIO(), {}, {"x": np.array([object()])})
