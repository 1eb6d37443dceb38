"""Errors read as one line, keep their fields, and survive a trip between processes."""

import pickle

import pytest

from tileweld.compiler.errors import (
    BuildError,
    CacheError,
    CompilerNotFound,
    OptionError,
    RefusalError,
    ScalarSyntaxError,
    TileweldError,
    UnsupportedError,
)


def test_what_where_cure_in_one_line():
    error = CompilerNotFound("g++ is not on PATH", where="model.py:41", cure="install it")
    assert str(error) == "CompilerNotFound: g++ is not on PATH (model.py:41); install it"
    assert str(CacheError("the disk is full")) == "CacheError: the disk is full"


def test_an_unknown_option_lists_what_exists_and_the_nearest():
    error = OptionError.unknown("target", "tritn", ("auto", "triton", "cpp"), where="options")
    assert str(error) == ("OptionError: unknown target 'tritn' (options); did you mean 'triton'? "
                          "choose from: auto, triton, cpp")
    assert isinstance(error, ValueError)
    assert "did you mean" not in str(OptionError.unknown("option", 7, ("auto",)))


def test_a_build_error_shows_the_first_messages_of_the_compiler():
    error = BuildError("gemv does not compile", stderr="\n".join(f"error {n}" for n in range(100)), source_path="gemv.cpp")
    first, *rest = str(error).splitlines()
    assert first == "BuildError: gemv does not compile (gemv.cpp)"
    assert rest[0] == "error 0" and rest[-1] == "... 60 more lines"


@pytest.mark.parametrize(("position", "shown"), [(2, "at '@', position 2 of 's*@'"), (3, "at the end, position 3 of 's*@'")])
def test_a_syntax_error_points_into_the_text(position, shown):
    assert shown in str(ScalarSyntaxError("expected an operand", text="s*@", position=position))


@pytest.mark.parametrize(
    "error",
    [
        TileweldError("a", where="b", cure="c"),
        OptionError.unknown("target", "x", ("cpp",)),
        CompilerNotFound("a"),
        BuildError("a", stderr="b", source_path="c"),
        CacheError("a"),
        UnsupportedError("a"),
        RefusalError("a", rewrite="attention", where="model.py:3"),
        ScalarSyntaxError("a", text="s*", position=2),
    ],
    ids=lambda error: type(error).__name__,
)
def test_pickling_keeps_everything(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)
    assert isinstance(copy, TileweldError)
