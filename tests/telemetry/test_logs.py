"""Logs: for people, for machines, and never with a prompt in them."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from kvasir.core.errors import ConfigError
from kvasir.telemetry.logs import setup


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_json_lines_have_level_logger_and_time() -> None:
    out = io.StringIO()
    setup("info", json=True, stream=out)
    structlog.get_logger("kvasir.test").info("request", status=200)
    line = json.loads(out.getvalue())
    assert (line["event"], line["level"], line["logger"], line["status"]) == ("request", "info", "kvasir.test", 200)
    assert line["timestamp"].endswith("Z")


def test_the_standard_librarys_log_looks_the_same() -> None:
    out = io.StringIO()
    setup("info", json=True, stream=out)
    logging.getLogger("uvicorn.error").warning("odd %s", "thing")
    assert json.loads(out.getvalue())["event"] == "odd thing"


def test_levels_below_are_dropped() -> None:
    out = io.StringIO()
    setup("warning", json=False, stream=out)
    structlog.get_logger("x").info("quiet")
    logging.getLogger("x").info("quiet")
    assert out.getvalue() == ""


@pytest.mark.parametrize("as_json", [True, False])
def test_prompts_and_keys_are_never_written(as_json: bool) -> None:
    out = io.StringIO()
    setup("debug", json=as_json, stream=out)
    prompt = "SECRET"
    log = structlog.get_logger("x")
    log.info("request", prompt=prompt, messages=[prompt], api_key=prompt, status=1)
    try:
        raise ValueError("plain words")
    except ValueError:
        log.exception("failed")
    assert "SECRET" not in out.getvalue()
    assert "plain words" in out.getvalue()


def test_an_unknown_level_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="choose one of debug"):
        setup("loud", json=False)
