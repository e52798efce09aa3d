import os
import signal

import pytest

from medssl.run.signals import Stopped, StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_outside_of_training_a_signal_stops_at_once(number):
    with StopSignals(), pytest.raises(Stopped, match=number.name):
        os.kill(os.getpid(), number)


def test_in_training_a_signal_is_remembered_and_a_second_interrupt_stops(capfd):
    with StopSignals() as signals:
        signals.training = True
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested == "Ctrl-C"
        assert "finishing the step" in capfd.readouterr().err
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_of_before_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
