"""Training a tokenizer takes linear time, cuts words without losing anything, and ends when it is asked to."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsae.data.bpe import LONGEST_WORD, train_bpe
from sparsae.data.tokenizer import load_tokenizer, train_tokenizer

BASES = "".join(random.Random(0).choices("ACGT", k=400_000))


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer([BASES[:20_000], "größer 日本語 " * 50], 400)


def test_the_time_is_linear_in_the_length_of_a_word():
    def seconds(length):
        began = time.perf_counter()
        tokenizer = train_tokenizer([BASES[:length]], 400)
        tokenizer.encode(BASES[:length])
        return time.perf_counter() - began

    assert seconds(400_000) < 5  # minutes, where words are not cut


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="AC日ß= \n", min_size=1, max_size=6), st.integers(1, 900))
def test_a_long_word_is_cut_in_training_and_encoding_and_comes_back_whole(trained, tmp_path_factory, letters, count):
    text = letters * count
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    saved = tmp_path_factory.mktemp("saved")
    trained.save(saved)
    assert load_tokenizer(saved).encode(text) == ids


def test_no_merge_reaches_over_a_cut(trained):
    word = "A" * (3 * LONGEST_WORD)
    third = trained.encode("A" * LONGEST_WORD)
    assert trained.encode(word) == 3 * third


def test_whoever_waits_is_called_and_can_end_it():
    calls = []

    def stop():
        calls.append(time.perf_counter())
        if len(calls) == 2:
            raise KeyboardInterrupt

    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        train_bpe([BASES] * 100, 20_000, "<end>", stop)
    assert time.perf_counter() - calls[-1] < 1
    assert calls[0] - began < 3


def test_what_goes_wrong_in_the_child_is_told():
    with pytest.raises(RuntimeError, match="training the tokenizer failed: "):
        train_bpe(["text"], -1, "<end>", lambda: None)


ENDLESS = """
import signal, sys
from sparsae.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # which whoever runs the tests may have ignored
sys.exit(main(["train", "--set", "data.source={folder}", "--set", "data.cache={folder}/cache",
               "--set", "data.tokenizer_vocab=60000", "--out", "{folder}/out"]))
"""


@pytest.mark.slow
def test_ctrl_c_while_the_tokenizer_is_trained_ends_the_command_and_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text(BASES * 30)
    command = [sys.executable, "-c", ENDLESS.format(folder=tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if line.startswith("training the tokenizer"):
                    break
            time.sleep(1)
            assert process.poll() is None, said
            began = time.perf_counter()
            process.send_signal(signal.SIGINT)  # to the parent alone: the child must not outlive it
            while os.listdir(tmp_path / "cache"):
                assert time.perf_counter() - began < 20  # it would take hours; other tests may have the cores
                time.sleep(0.02)
            process.communicate(timeout=60)  # an interpreter that has torch needs a while to end
            assert process.returncode == 130
            assert sorted(os.listdir(tmp_path)) == ["a.txt", "cache"]
            with pytest.raises(ProcessLookupError):
                os.killpg(process.pid, 0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
