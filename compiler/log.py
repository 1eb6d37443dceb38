"""Logging: `log = get("passes")`. Silent below warnings unless TILEWELD_LOG asks for more.

TILEWELD_LOG=info            every stage from this level on (debug, info, warning, error)
TILEWELD_LOG=capture,passes  these stages in full, the others as before
TILEWELD_LOG=info,passes     both
"""

from __future__ import annotations

import logging
import os

STAGES = ("capture", "passes", "aot", "codegen", "runtime")
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def get(stage: str) -> logging.Logger:
    """The logger of one of STAGES."""
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; the stages are {', '.join(STAGES)}")
    return logging.getLogger(f"tileweld.{stage}")


def configure(setting: str | None = None) -> None:
    """Apply TILEWELD_LOG, or `setting` in its place. Runs on import; running it again replaces the levels."""
    if setting is None:
        setting = os.environ.get("TILEWELD_LOG", "")
    root = logging.getLogger("tileweld")
    root.setLevel(logging.WARNING)
    for stage in STAGES:
        get(stage).setLevel(logging.NOTSET)
    for handler in [h for h in root.handlers if getattr(h, "_tileweld", False)]:
        root.removeHandler(handler)
    root.propagate = True
    words = [word.strip().lower() for word in setting.split(",") if word.strip()]
    if not words:
        return
    handler = logging.StreamHandler()
    handler._tileweld = True
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
    root.addHandler(handler)
    root.propagate = False  # or an application with logging of its own prints every line twice
    for word in words:
        if word in LEVELS:
            root.setLevel(LEVELS[word])
        elif word in STAGES:
            get(word).setLevel(logging.DEBUG)
        else:
            root.warning("TILEWELD_LOG: unknown word %r; it takes %s", word, ", ".join([*LEVELS, *STAGES]))


configure()
