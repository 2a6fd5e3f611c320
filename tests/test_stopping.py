"""Training that is told to stop: once it saves, a second time it ends at once."""

import functools
import signal
import subprocess

import model
from simcse.training import checkpoints, stopping, trainer

import pytest
from conftest import command
from training import saving_flags


@pytest.fixture
def flags(sample):
    return functools.partial(saving_flags, sample)


@pytest.mark.default_stack
@pytest.mark.parametrize("signals, code", [([signal.SIGTERM], 143), ([signal.SIGINT], 130),
                                           ([signal.SIGINT, signal.SIGTERM], -signal.SIGTERM)])
def test_signals_save_and_a_second_ends_at_once(flags, tmp_path, signals, code):
    """Steps of 32 texts take long enough for a second signal to come before the first is acted on."""
    long = flags("--batch_size", 32, "--max_seq_length", 32, "--epochs", 100, "--save_steps", 1000)
    process = subprocess.Popen(command("train.py", *long), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert any("global step 10," in line for line in process.stderr)
    process.send_signal(signals[0])
    assert any("saving after this step" in line for line in process.stderr)
    for number in signals[1:]:
        process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(60) == code and "Traceback" not in rest, rest
    if len(signals) == 1:
        (step,) = checkpoints.saved_steps(str(tmp_path / "checkpoints"))
        assert f"saved ./checkpoints/model_{step}" in rest
        model.load_model(str(tmp_path / "checkpoints" / f"model_{step}" / "model_state.pdparams"))
    else:
        assert "saved" not in rest and not checkpoints.saved_steps(str(tmp_path / "checkpoints"))


def test_a_signal_that_comes_while_ranks_ask_each_other_is_kept(monkeypatch):
    """It has the ranks stop the next time that they ask."""
    stop_signal = stopping.StopSignal()

    def gather_numbers(number):
        stop_signal.number = signal.SIGTERM
        return [number]

    monkeypatch.setattr(stopping, "RANKS", 2)
    monkeypatch.setattr(stopping, "gather_numbers", gather_numbers)
    assert stop_signal.agreed_signal(10) == 0
    assert stop_signal.agreed_signal(15) == 0
    assert stop_signal.agreed_signal(20) == signal.SIGTERM


def test_after_the_last_step_signals_end_the_process_at_once():
    usual = [signal.getsignal(number) for number in stopping.STOP_SIGNALS]
    run = object.__new__(trainer.Trainer)
    run.stop_signal = stopping.StopSignal()
    run.stop_signal.listen()
    assert not set(usual) & {signal.getsignal(number) for number in stopping.STOP_SIGNALS}
    run.finish_signal_handling()
    assert [signal.getsignal(number) for number in stopping.STOP_SIGNALS] == usual
    assert run.stop_signal.number == 0


def test_a_signal_that_comes_during_the_last_save_ends_the_run():
    run = object.__new__(trainer.Trainer)
    run.stop_signal = stopping.StopSignal()
    run.stop_signal.number = signal.SIGINT
    with pytest.raises(stopping.Stopped) as stopped:
        run.finish_signal_handling()
    assert stopped.value.signal == signal.SIGINT
