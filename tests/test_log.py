"""What samestep reports can be redirected, silenced, and is on stderr by default."""

import logging
from pathlib import Path

import pytest
from conftest import small_recipe
from test_cli import samestep

from samestep import Placement, train
from samestep.cli import main
from samestep.cli.renamed_flags import RENAMED, with_new_names
from samestep.errors import OldNameWarning
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


def test_old_flags_are_replaced_with_one_warning_each() -> None:
    old = ["train", "--endpoint", "h:1", "--evict-slower-than=0.1"]
    new = ["train", "--rdzv-endpoint", "h:1", "--drop-stragglers-below=0.1"]
    with pytest.warns(OldNameWarning) as warned:
        assert with_new_names(old) == new
    assert len(warned) == 2
    assert "`--endpoint` is now `--rdzv-endpoint`" in str(warned[0].message)


def test_every_new_flag_is_an_option_and_no_old_one_is() -> None:
    commands = main.cli.commands["train"], main.cli.commands["resume"]
    flags = {flag for command in commands for p in command.params for flag in p.opts}
    assert flags >= set(RENAMED.values())
    assert not flags & set(RENAMED)


def test_an_old_keyword_of_a_placement_works_with_a_warning() -> None:
    with pytest.warns(OldNameWarning, match="is now `drop_stragglers_below`"):
        placement = Placement.model_validate({"evict_slower_than": 0.5})
    assert placement.drop_stragglers_below == 0.5


def test_the_command_line_warns_of_an_old_flag_in_one_line() -> None:
    ended = samestep("compare", "--endpoint", "h:1")
    first, *rest = ended.stderr.splitlines()
    assert first == (
        "warning: `--endpoint` is now `--rdzv-endpoint`; the old name goes with the "
        "next release."
    )
    assert "No such option" in rest[-1]
