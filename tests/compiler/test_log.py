"""TILEWELD_LOG chooses levels and stages; without it nothing below a warning is printed."""

import logging

import pytest

from tileweld.compiler import log


@pytest.fixture(autouse=True)
def as_before():
    yield
    log.configure()


def enabled(level: int) -> set[str]:
    return {stage for stage in log.STAGES if log.get(stage).isEnabledFor(level)}


@pytest.mark.parametrize(
    ("setting", "debug", "info"),
    [
        ("", set(), set()),
        ("info", set(), set(log.STAGES)),
        ("DEBUG", set(log.STAGES), set(log.STAGES)),
        ("capture, passes", {"capture", "passes"}, {"capture", "passes"}),
        ("info,passes", {"passes"}, set(log.STAGES)),
    ],
)
def test_levels_and_stages(setting, debug, info):
    log.configure(setting)
    assert enabled(logging.DEBUG) == debug
    assert enabled(logging.INFO) == info
    assert enabled(logging.WARNING) == set(log.STAGES)


def test_lines_name_their_stage_and_come_once(capsys):
    log.configure("debug")
    log.configure("debug")
    log.get("passes").debug("fused %d", 3)
    assert capsys.readouterr().err == "tileweld.passes DEBUG: fused 3\n"


def test_an_unknown_word_is_told_with_what_exists(capsys):
    log.configure("passses")
    assert "unknown word 'passses'" in (message := capsys.readouterr().err) and "passes" in message


def test_an_unknown_stage_is_a_mistake_of_ours():
    with pytest.raises(ValueError, match="the stages are capture, passes"):
        log.get("pases")
