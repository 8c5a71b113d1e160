"""What samestep reports can be redirected, silenced, and is on stderr by default."""

import logging
from pathlib import Path

import pytest
from conftest import small_recipe

from samestep import train
from samestep.messages.training import GenerationFailed
from samestep.output.console import PlainView
from samestep.supervisor.forkserver_client import ForkServer
from samestep.system.log import logger, shown_on_stderr


def hide_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep records from pytest's own handlers, as if logging were not configured.

    Only within a test: before it, pytest adds handlers to loggers like this one.
    """
    monkeypatch.setattr(logger, "propagate", False)


def test_a_python_caller_receives_records(
    server: ForkServer,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    caplog.set_level(logging.INFO, "samestep")
    train(small_recipe(), workers=1, out=tmp_path / "a", server=server)
    assert any(text.startswith("epoch 1/1  train loss") for text in caplog.messages)
    assert capfd.readouterr() == ("", "")


def test_a_python_caller_can_silence_it(
    server: ForkServer,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    hide_handlers(monkeypatch)
    logger.setLevel(logging.ERROR)
    try:
        train(small_recipe(), workers=1, out=tmp_path / "a", server=server)
    finally:
        logger.setLevel(logging.NOTSET)
    assert capfd.readouterr() == ("", "")


def test_records_are_on_stderr_where_logging_is_not_configured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_handlers(monkeypatch)
    with shown_on_stderr(), shown_on_stderr():
        view = PlainView(small_recipe())
        view.note("a line")
        view.warn("a problem with \x1b[2J%s")
        view.receive(GenerationFailed(final=False, error="x", worker=0, step=1))
    assert capsys.readouterr() == (
        "",
        "a line\nwarning: a problem with \\x1b[2J%s\nfailure: x\n",
    )
    assert not logger.handlers
