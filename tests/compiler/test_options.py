"""The option table: defaults, checks, and one error that lists what exists."""

import dataclasses

import pytest
import torch

from tileweld.compiler.errors import OptionError
from tileweld.compiler.ir.int8_scheme import Int8
from tileweld.compiler.options import TABLE, Options

PASSES = ("attention", "rms_norm")


def test_every_row_has_a_field_with_the_same_default_that_its_check_takes():
    fields = {f.name: getattr(Options(), f.name) for f in dataclasses.fields(Options)}
    assert fields == {name: row.default for name, row in TABLE.items()}
    assert all(row.check(row.default) and row.meaning and row.values for row in TABLE.values())
    assert len(TABLE) <= 12, "at most a dozen options"


def test_nothing_given_is_the_default():
    assert Options.parse(None) == Options.parse({}) == Options()


def test_what_is_given_is_kept():
    made = Options.parse({"target": "cpp", "verify": True, "strict": True, "passes": {"attention": False}}, PASSES)
    assert (made.target, made.verify, made.strict, made.passes) == ("cpp", True, True, {"attention": False})


def test_int8_is_a_scheme_or_its_fields():
    assert Options.parse({"int8": "dynamic"}).int8 == Options.parse({"int8": {"scheme": "dynamic"}}).int8 == Int8("dynamic")
    made = Options.parse({"int8": {"scheme": "weight_only", "group": 64, "skip": ["a.b", "*.down"], "lm_head": False}}).int8
    assert made.group == 64 and [bool(made.left_out(name)) for name in ("a.b", "x.a.b", "a.b.c", "a.bc", "x.down", "up", "lm_head")] == [True, True, True, False, True, False, True]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"targets": "cpp"}, "unknown option 'targets' .*did you mean 'target'"),
        ({"target": "cuda"}, "option 'target' has the value 'cuda'.*auto | triton | cpp | reference"),
        ({"target": None}, "option 'target'"),
        ({"verify": 1}, "option 'verify' has the value 1.*True | False"),
        ({"strict": "yes"}, "option 'strict'"),
        ({"passes": ["attention"]}, "option 'passes'"),
        ({"passes": {"attention": "off"}}, "option 'passes'"),
        ({"passes": {"atention": False}}, "unknown pass 'atention' .*did you mean 'attention'"),
        ({"int8": "int4"}, "unknown int8 scheme 'int4'.*weight_only, dynamic, llm_int8"),
        ({"int8": 8}, "int8 is 8"),
        ({"int8": {"group": 64}}, "unknown int8 scheme None"),
        ({"int8": {"scheme": "weight_only", "groups": 64}}, "unknown field of int8 'groups'.*did you mean 'group'"),
        ({"int8": {"scheme": "weight_only", "group": -1}}, "int8 field 'group' is -1"),
        ({"int8": {"scheme": "weight_only", "skip": "lm_head"}}, "int8 field 'skip' is 'lm_head'.*expected a list"),
        ({"int8": {"scheme": "dynamic", "group": 64}}, "groups of 64 with dynamic"),
        ([("target", "cpp")], "options must be a dict, not list"),
    ],
)
def test_what_is_wrong_is_named_with_what_exists(given, said):
    with pytest.raises(OptionError, match=said):
        Options.parse(given, PASSES)


def test_torch_compile_reports_it_and_the_function_still_runs():
    compiled = torch.compile(lambda x: x + 1, backend="tileweld", options={"target": "cuda"})
    with pytest.raises(Exception, match="option 'target' has the value 'cuda'"):
        compiled(torch.ones(2))
    assert torch.compile(lambda x: x + 1, backend="tileweld", options={"target": "cpp"})(torch.ones(2)).tolist() == [2, 2]
