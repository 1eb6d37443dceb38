"""The key of a graph's executable: equal graphs have one, graphs that differ in anything that decides the result have two, and what has no lasting text has none."""
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from tileweld.compiler import graph_key
from tileweld.compiler.graph_key import NotKept, key_of


def keys(fn, *inputs, options=None, mode=None, dynamic=None, grad=False):
    """The key, or the reason why there is none, of each graph that Dynamo makes of fn."""
    found = []

    def backend(gm, example_inputs):
        try:
            found.append(key_of(gm, example_inputs, options, mode))
        except NotKept as reason:
            found.append(f"none: {reason}")
        return gm.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(fn, backend=backend, dynamic=dynamic)(*inputs)
    return found


def key(fn, *inputs, **how):
    (found,) = keys(fn, *inputs, **how)
    return found


def x(*sizes, **kwargs):
    return torch.ones(*sizes or (4, 8), **kwargs)


def base(a):
    return F.softmax(a * 2.0 + 1.0, -1)


OTHER_GRAPHS = {
    "constant": lambda a: F.softmax(a * 2.5 + 1.0, -1), "constant's last bit": lambda a: F.softmax(a * 2.0000000000000004 + 1.0, -1), "an integer": lambda a: F.softmax(a * 2 + 1.0, -1),
    "op": lambda a: F.softmax(a * 2.0 - 1.0, -1), "order": lambda a: F.softmax(1.0 + a * 2.0, -1), "keyword": lambda a: F.softmax(a * 2.0 + 1.0, dim=-1), "dim": lambda a: F.softmax(a * 2.0 + 1.0, 0),
    "dtype": lambda a: F.softmax(a * 2.0 + 1.0, -1, dtype=torch.float64), "log": lambda a: F.log_softmax(a * 2.0 + 1.0, -1), "two results": lambda a: (F.softmax(a * 2.0 + 1.0, -1), a * 2.0),
    "attribute": lambda a: F.softmax(a.T * 2.0 + 1.0, -1), "another attribute": lambda a: F.softmax(a.mT * 2.0 + 1.0, -1), "method": lambda a: (a * 2.0 + 1.0).softmax(-1), "negative zero": lambda a: F.softmax(a * 2.0 + -0.0, -1), "zero": lambda a: F.softmax(a * 2.0 + 0.0, -1),
}
OTHER_INPUTS = {
    "shape": lambda: x(4, 9), "stride": lambda: x(8, 4).t(), "offset": lambda: x(5, 8)[1:], "dtype": lambda: x(dtype=torch.float64), "half": lambda: x(dtype=torch.bfloat16),
    "parameter": lambda: torch.nn.Parameter(x()), "frozen parameter": lambda: torch.nn.Parameter(x(), requires_grad=False), "requires grad": lambda: x(requires_grad=True),
}


def test_the_same_graph_has_the_same_key_whatever_its_names():
    def renamed(other_name):
        scaled = other_name * 2.0
        return F.softmax(scaled + 1.0, -1)

    assert len(key(base, x())) == 64
    assert key(base, x()) == key(base, torch.randn(4, 8)) == key(lambda a: F.softmax(a * 2.0 + 1.0, -1), x())
    assert graph_key.graph_text(torch.fx.symbolic_trace(base)) == graph_key.graph_text(torch.fx.symbolic_trace(renamed)) != graph_key.graph_text(torch.fx.symbolic_trace(OTHER_GRAPHS["op"]))


def test_no_two_of_these_graphs_and_inputs_share_a_key():
    found = {"base": key(base, x())} | {name: key(f, x()) for name, f in OTHER_GRAPHS.items()} | {f"input {name}": key(base, make()) for name, make in OTHER_INPUTS.items()}
    assert not any(k.startswith("none") for k in found.values())
    assert len(set(found.values())) == len(found), sorted(found.items(), key=lambda item: item[1])


SETTINGS = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype, torch.float64), "threads": (torch.get_num_threads, torch.set_num_threads, 1),
    "deterministic": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True), "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
    "flash sdp": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, False), "anomaly": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly, True),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_torchs_settings_are_part_of_the_key(name):
    get, put, other = SETTINGS[name]
    before, kept = key(base, x(dtype=torch.float32)), get()
    try:
        put(other)
        assert key(base, x(dtype=torch.float32)) != before
    finally:
        put(kept)
    assert key(base, x(dtype=torch.float32)) == before


def test_options_mode_and_grad_mode_are_part_of_the_key(monkeypatch):
    ways = [{}, {"options": {"strict": True}}, {"options": {"passes": {"attention": False}}}, {"options": {"passes": {"attention": True}}}, {"options": {"target": "reference"}}, {"options": {"fold_weights": False}},
            {"mode": "reduce-overhead"}, {"grad": True}]
    found = [key(base, x(), **way) for way in ways]
    monkeypatch.setenv("CXX", "another-compiler")
    found.append(key(base, x()))
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(graph_key, "_sources", lambda: "an edited compiler")
    found.append(key(base, x()))
    assert len(set(found)) == len(found) == 10
    with torch.inference_mode():
        assert key(base, x()) not in found


def test_every_source_file_of_the_compiler_is_part_of_the_key(tmp_path, monkeypatch):
    for folder in graph_key.SOURCES:
        (tmp_path / folder / "part").mkdir(parents=True)
        (tmp_path / folder / "part" / "a.py").write_text("1")
    monkeypatch.setattr(graph_key, "__file__", str(tmp_path / "compiler" / "graph_key.py"))
    seen = set()
    for folder in (None, *graph_key.SOURCES):
        for name in ("a.py", "b.h") if folder else ("",):
            if folder:
                (tmp_path / folder / "part" / name).write_text("2")
            seen.add(graph_key._sources.__wrapped__())
    assert len(seen) == 1 + 2 * len(graph_key.SOURCES)


class Tied(torch.nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, v):
        return self.b(F.relu(self.a(v)))


def test_tied_weights_and_modes_of_modules_are_part_of_the_key():
    assert key(Tied(True), x()) != key(Tied(False), x()) == key(Tied(False), x())
    dropped = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5))
    assert key(dropped.train(), x()) != key(dropped.eval(), x())
    other = torch.nn.Module()
    other.first, other.forward = torch.nn.Linear(8, 8), lambda v: other.first(v)  # the same graph under another name: labels reach passes and the report
    assert key(torch.nn.Linear(8, 8), x()) != key(other, x())


@torch._dynamo.allow_in_graph
def of_the_user(a):
    return a + 1


@torch.library.custom_op("tileweld_tests::custom", mutates_args=())
def custom(a: torch.Tensor) -> torch.Tensor:
    return a + 1


@custom.register_fake
def _(a):
    return torch.empty_like(a)


def shared():
    whole = x(2, 4, 8)
    return whole[0], whole[1]


NONE = {
    "gradients": lambda: key(base, x(requires_grad=True), grad=True),
    "a parameter's gradient": lambda: key(torch.nn.Linear(8, 8), x(), grad=True),
    "a dynamic size": lambda: key(base, x(), dynamic=True),
    "a size from data": lambda: torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)(key)(lambda a: a.nonzero() + 1, x()),
    "a function of the user's": lambda: key(lambda a: of_the_user(a) * 2, x()),
    "a custom op": lambda: key(lambda a: custom(a) * 2, x()),
    "shared memory": lambda: key(lambda a, b: a + b, *shared()),
    "a pass that reads weights": lambda: key(base, x(), options={"gqa": 2}),
    "an attribute that is no view": lambda: key(lambda a: a.data * 2, x()),
    "a conjugate": lambda: key(lambda a: a * 2, x(dtype=torch.complex64).conj()),
    "a body of a graph": lambda: key(lambda a: torch.cond(a.sum() > 0, lambda b: b + 1, lambda b: b - 1, (a,)), x()),
}


@pytest.mark.parametrize("name", NONE)
def test_there_is_no_key_for(name):
    assert NONE[name]().startswith("none: ")


def test_there_is_no_key_under_autocast():
    with torch.autocast("cpu"):
        assert key(base, x()).startswith("none: autocast")


def test_a_patched_function_of_torch_has_no_key(monkeypatch):
    gm = torch.fx.symbolic_trace(lambda a: torch.tanh(a))
    assert "torch:tanh" in graph_key.graph_text(gm)
    monkeypatch.setattr(torch, "tanh", lambda a: a)
    with pytest.raises(NotKept, match="not found under its name"):
        graph_key.graph_text(gm)


numbers = st.one_of(st.integers(-3, 3), st.floats(-2, 2, allow_nan=False), st.booleans(), st.sampled_from([0.0, -0.0, 1, 1.0, True, float("inf"), float("nan"), None, ..., "1", "None", torch.float32, "torch.float32"]))
arguments = st.recursive(numbers, lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.builds(slice, inner, inner, inner), st.dictionaries(st.sampled_from("ab"), inner, max_size=2)), max_leaves=6)


def same(a, b):
    """Is this the same argument to an op? 1, 1.0 and True are three, and so are -0.0 and 0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, slice):
        return all(same(getattr(a, n), getattr(b, n)) for n in ("start", "stop", "step"))
    return a.hex() == b.hex() if isinstance(a, float) and a == a and b == b else repr(a) == repr(b)


@settings(max_examples=300, deadline=None)
@given(arguments, arguments)
def test_arguments_have_one_text_exactly_if_they_are_the_same(a, b):
    assert (graph_key._argument(a, {}) == graph_key._argument(b, {})) == same(a, b)


def test_an_argument_of_another_kind_has_no_text():
    for odd in (object(), torch.ones(1), torch.nn.Linear(1, 1), {1, 2}, b"x"):
        with pytest.raises(NotKept):
            graph_key._argument(odd, {})
