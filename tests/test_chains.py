"""Chains: parsing is strict, printing and parsing are inverse, arguments and operands are bound as torch would."""

from __future__ import annotations

import copy
import math
import pickle
import re
import string

import pytest
import torch

import dualop
from dualop.errors import ChainError, DualopError, OperandError
from dualop.language import stages
from dualop.language.stages import ALIASES, STAGES, Call, call
from dualop.language.syntax import MAX_OPERANDS, MAX_STAGES

hypothesis = pytest.importorskip("hypothesis")
example, given, st = hypothesis.example, hypothesis.given, hypothesis.strategies

DEFAULT = "add | swish | tanh | gelu | hardtanh(-1, 1)"
# What a text may contain whose chain was accepted: nothing else ever reaches a compiler, not even in a comment.
CANONICAL = re.compile(r"[A-Za-z0-9_|(),.=\"+ -]*", re.ASCII)

# ---- random chains -----------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.floats(allow_nan=False),
    st.integers(-100, 100).map(float),
    st.sampled_from([0.0, -0.0, math.inf, -math.inf, 1e-45, 5e-324, 1.7976931348623157e308, 0.1, 1e6, 999999.0, 1e22]),
)
NAMES = st.from_regex(re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,6}", re.ASCII), fullmatch=True).filter(
    lambda name: name not in ("inf", "nan", "self", "backend")
)

EXAMPLES = {name: dualop.chain(stage.example).calls[-1] for name, stage in STAGES.items()}


@st.composite
def calls(draw: st.DrawFn, names: st.SearchStrategy[str] = NAMES) -> Call:
    stage = draw(st.sampled_from(list(STAGES.values())))
    if stage.operand:
        return call(stage.name, draw(st.one_of(names, st.just("x"), NUMBERS)))
    arguments = [draw(st.sampled_from(p.words)) if p.words else draw(NUMBERS) for p in stage.parameters]
    try:
        return call(stage.name, *arguments)
    except ChainError:  # bounds in the wrong order and the like
        return EXAMPLES[stage.name]


CHAINS = st.lists(calls(st.sampled_from(["a", "b_1", "_", "add", "tanh", "scale"])), min_size=1, max_size=12)


@given(CHAINS)
def test_printing_and_parsing_are_inverse(parts: list[Call]) -> None:
    op = dualop.chain(*parts)
    text = str(op)
    again = dualop.chain(text)
    assert again == op and str(again) == text
    assert again.calls == op.calls and [repr(c.arguments) for c in again.calls] == [repr(c.arguments) for c in op.calls]
    assert again.operands == op.operands
    assert CANONICAL.fullmatch(text)


@given(CHAINS, st.sampled_from(["", " ", "  ", "\t", "\n", " \r\n"]), st.data())
def test_white_space_means_nothing(parts: list[Call], space: str, data: st.DataObject) -> None:
    tokens = re.findall(r'"[a-z]*"|[|(),=]|[^\s|(),="]+', str(dualop.chain(*parts)))
    spaced = "".join(token + data.draw(st.sampled_from([space, ""])) for token in tokens)
    assert dualop.chain(spaced) == dualop.chain(*parts)


@given(NAMES)
def test_any_identifier_names_an_operand(name: str) -> None:
    assert dualop.chain(f"add({name})").operands == (() if name == "x" else (name,))


@given(NUMBERS)
def test_numbers_are_kept_exactly(number: float) -> None:
    (parsed,) = dualop.chain(str(dualop.chain(stages.mul(number)))).calls
    assert parsed.arguments[0] == number and math.copysign(1, parsed.arguments[0]) == math.copysign(1, number)


@given(st.one_of(st.text(max_size=40), st.text(alphabet=string.printable, max_size=40)))
@example("relu\x00")
@example("relu \u2028| tanh")
@example("add(\u0661)")  # a digit that is not ASCII
@example("r\u0435lu")  # a Cyrillic e
@example("relu\\\n| tanh")
def test_text_is_refused_or_understood_completely(text: str) -> None:
    try:
        op = dualop.chain(text)
    except ChainError as error:
        assert str(error)
        return
    assert CANONICAL.fullmatch(str(op)) and dualop.chain(str(op)) == op


@given(st.data())
def test_a_changed_chain_is_refused_or_understood_completely(data: st.DataObject) -> None:
    """One character put into a good chain: it is another good chain or a ChainError, and nothing of it is lost."""
    good = 'add(bias) | clamp(-1, 1) | gelu(approximate="tanh") | mul(2.5e-1)'
    at = data.draw(st.integers(0, len(good)))
    character = data.draw(st.one_of(st.sampled_from("()|,=\"'.+-eE_x#/\\;\n {}[]<>&"), st.characters()))
    text = good[:at] + character + good[at:]
    try:
        op = dualop.chain(text)
    except ChainError:
        return
    assert CANONICAL.fullmatch(str(op))
    kept = [t for t in re.findall(r"[A-Za-z_]\w*", text) if t not in ("e", "E", "approximate")]
    for word in kept:
        assert word in str(op) or word in ("swish", "operand", "inf"), (text, str(op))


# ---- what is refused -----------------------------------------------------------------------------------------------

REFUSED = [
    "",
    "   ",
    "|",
    "relu |",
    "| relu",
    "relu || tanh",
    "relu tanh",
    "relu, tanh",
    "relu; tanh",
    "relu\x00",
    "relu // comment",
    "relu # comment",
    "relu /* */ | tanh",
    "((relu))",
    "relu((",
    "relu())",
    "add((b))",
    "add(b",
    "add b)",
    "add(b c)",
    "add(b, c)",
    "add(b + c)",
    "add(b.c)",
    "add(b[0])",
    "add(relu)(x)",
    "add(tanh(x))",
    "add('b)",
    "add(b')",
    "add(\"b')",
    'add("b c")',
    'add("b\\"")',
    "add(é)",
    "rélu",
    "add(١)",
    "add(１)",
    "add(nan)",
    "add(-nan)",
    "add(NaN())",
    "mul(0x10)",
    "mul(1_000)",
    "mul(1e)",
    "mul(1e+)",
    "mul(1.2.3)",
    "mul(--1)",
    "mul(- 1)",
    "mul(1 2)",
    "mul(1j)",
    "mul(1f)",
    "mul(infinity_)|",
    "hardtanh(a)",
    "hardtanh(nan, 1)",
    "hardtanh(1, -1)",
    "hardtanh(-1, 1, 2)",
    "hardtanh(-1,, 1)",
    "hardtanh(-1, 1,)",
    "hardtanh(,)",
    "hardtanh(min_val=-1, 1)",
    "hardtanh(min_val=-1, min_val=-2)",
    "hardtanh(-1, min_val=-2)",
    "hardtanh(min=-1)",
    "hardtanh(min_val=)",
    "hardtanh(=1)",
    "hardtanh(1=1)",
    "hardtanh(min_val==-1)",
    'hardtanh("none")',
    "relu(1)",
    "gelu(1)",
    'gelu("erf")',
    "gelu(approximate=1)",
    "threshold",
    "threshold(1)",
    "clamp",
    "clamp()",
    "celu(0)",
    "softplus(0)",
    "softshrink(-1)",
    "x",
    "x | relu",
    "1 | relu",
    "hardtanh.relu",
    "__import__",
    "stages",
    "add(operand)(b)",
    "relu" * 5000,
    "relu | " * 5000 + "relu",
    "add(" * 5000,
    "add(" + "1" * 10_000 + "e",
]


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text)[:40])
def test_refused(text: str) -> None:
    with pytest.raises(ChainError) as caught:
        dualop.chain(text)
    assert isinstance(caught.value, (DualopError, ValueError))


@pytest.mark.parametrize(
    ("text", "place"), [("relu |", 7), ("relu tanh", 6), ("add(b", 6), ("relu |@", 7), ("hardtanh(-1,, 1)", 13)]
)
def test_an_error_says_where(text: str, place: int) -> None:
    with pytest.raises(ChainError, match=rf"position {place}\b"):
        dualop.chain(text)


def test_an_error_of_a_very_long_text_stays_short() -> None:
    with pytest.raises(ChainError) as caught:
        dualop.chain("relu | " * 20_000 + "@")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["mul(1e400)", "mul(-1e400)", "hardtanh(-1, 1e999999999)", "mul(" + "9" * 400 + ")"])
def test_a_number_beyond_float64_is_refused(text: str) -> None:
    """Infinity is written inf; a number that silently becomes it is a mistake."""
    with pytest.raises(ChainError):
        dualop.chain(text)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("rellu", "relu"), ("swich", "swish"), ("leakyrelu", "leaky_relu"), ("hard_tanh", "hardtanh"), ("RELU", "relu")],
)
def test_the_nearest_names_are_told(wrong: str, right: str) -> None:
    with pytest.raises(ChainError) as caught:
        dualop.chain(f"tanh | {wrong}")
    assert repr(wrong) in str(caught.value) and re.search(rf"did you mean .*\b{right}\b", str(caught.value))


def test_an_unknown_name_with_nothing_near() -> None:
    with pytest.raises(ChainError, match="unknown stage 'zzzzzz'") as caught:
        dualop.chain("zzzzzz")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dualop.chain(),
        lambda: dualop.chain(1),
        lambda: dualop.chain(None),
        lambda: dualop.chain(["relu"]),
        lambda: dualop.chain(torch.relu),
        lambda: dualop.chain("relu", 1.0),
        lambda: dualop.chain("relu", ""),
        lambda: stages.add(torch.ones(3)),
        lambda: stages.add(math.nan),
        lambda: stages.add("b c"),
        lambda: stages.add("b\n"),
        lambda: stages.add("b) | tanh("),
        lambda: stages.add(""),
        lambda: stages.hardtanh("-1"),
        lambda: stages.hardtanh(None, 1),
        lambda: stages.hardtanh(0, 1, 2),
        lambda: stages.hardtanh(0, min_val=1),
        lambda: stages.hardtanh(lo=0),
        lambda: stages.gelu("exact"),
        lambda: stages.gelu(True),
        lambda: stages.elu(10**400),
        lambda: stages.elu(1j),
    ],
)
def test_python_arguments_are_refused_too(make: object) -> None:
    with pytest.raises(ChainError):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["é", "naïve", "ｘ", "β", "a\u0301"])
def test_a_name_that_no_text_can_hold_is_refused(name: str) -> None:
    """Every chain has a text that parses to it; names are ASCII there, so they are everywhere."""
    with pytest.raises(ChainError):
        dualop.chain(stages.add(name))


@pytest.mark.parametrize("name", ["backend", "self"])
def test_a_name_that_no_call_can_pass_is_refused(name: str) -> None:
    """`op(x, backend=t)` is the choice of a backend: an operand of that name could not be passed by keyword."""
    with pytest.raises(ChainError):
        dualop.chain(f"add({name})")


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (DEFAULT, "add | silu | tanh | gelu | hardtanh"),
        ("add(add)", "add"),
        ("add(operand=bias)", "add(bias)"),
        ("add('bias')", "add(bias)"),
        ("mul(2.0)", "mul(2)"),
        ("mul(+2)", "mul(2)"),
        ("mul(.5)", "mul(0.5)"),
        ("mul(5.)", "mul(5)"),
        ("mul(-0.0)", "mul(-0.0)"),
        ("mul(1E-3)", "mul(0.001)"),
        ("mul(inf)", "mul(inf)"),
        ("clamp(max=2)", "clamp(-inf, 2)"),
        ("clamp(0)", "clamp(0)"),
        ("clamp(max=2, min=1)", "clamp(1, 2)"),
        ("hardtanh()", "hardtanh"),
        ("hardtanh(-1)", "hardtanh"),
        ("hardtanh(max_val=2)", "hardtanh(-1, 2)"),
        ("hardtanh(max_val=2, min_val=0)", "hardtanh(0, 2)"),
        ("gelu(approximate='none')", "gelu"),
        ("gelu('tanh')", 'gelu(approximate="tanh")'),
        ("gelu(approximate=tanh)", 'gelu(approximate="tanh")'),
        ("leaky_relu(negative_slope=0.2)", "leaky_relu(0.2)"),
        ("sigmoid|mul(x)", "sigmoid | mul(x)"),
        ("relu\n|\ttanh", "relu | tanh"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    assert str(dualop.chain(text)) == canonical
    assert str(dualop.chain(canonical)) == canonical


def test_defaults_are_those_of_torch() -> None:
    """The table's parameters and defaults against the signatures of torch.nn.functional's own functions."""
    import inspect

    compared = set()
    for name, stage in STAGES.items():
        function = getattr(torch.nn.functional, name, None)
        if stage.operand or function is None:
            continue
        try:
            signature = inspect.signature(function)
        except ValueError:  # built in: its signature is in the first line of its help
            shown = re.match(r"\w+\(([^)]*)\)", (function.__doc__ or "").strip())
            assert shown, name
            given = dict(part.partition("=")[::2] for part in shown[1].replace("*, ", "").split(",")[1:])
            expected = {k.strip(): (v.strip(" '") or None) for k, v in given.items()}
        else:
            expected = {
                k: None if p.default is inspect.Parameter.empty else p.default
                for k, p in list(signature.parameters.items())[1:]
            }
        expected.pop("inplace", None)
        expected.pop("_stacklevel", None)
        found = {p.name: p.default for p in stage.parameters}
        assert list(found) == list(expected), name
        for key, default in expected.items():
            if default is not None:
                assert found[key] == (default if found[key] == default else float(default)), (name, key)
        compared.add(name)
    assert {"hardtanh", "leaky_relu", "elu", "celu", "softplus", "gelu", "threshold", "hardshrink"} <= compared


@pytest.mark.parametrize("name", [*STAGES, *ALIASES])
def test_every_stage_has_a_constructor(name: str) -> None:
    stage = STAGES[ALIASES.get(name, name)]
    example_call = EXAMPLES[stage.name]
    made = getattr(stages, name)(*example_call.arguments)
    assert made == example_call and made.stage is stage
    assert str(dualop.chain(made)) == str(made)
    assert stage.signature.startswith(stage.name) and dualop.chain(stage.example).calls[-1].stage is stage


def test_constructors_take_keywords_and_numbers_of_any_kind() -> None:
    import numpy as np

    expected = dualop.chain("hardtanh(-2, 1.5)")
    assert dualop.chain(stages.hardtanh(min_val=-2, max_val=1.5)) == expected
    assert dualop.chain(stages.hardtanh(np.float32(-2), np.float64(1.5))) == expected
    assert dualop.chain(stages.hardtanh(torch.tensor(-2), 1.5)) == expected
    assert dualop.chain(stages.add()) == dualop.chain("add")
    assert dualop.chain(stages.gelu(approximate="tanh")) == dualop.chain('gelu(approximate="tanh")')
    assert not hasattr(stages, "no_such_stage")


def test_chains_are_put_together() -> None:
    parts = dualop.chain("add", stages.swish(), dualop.chain("tanh | gelu"), "hardtanh(-1, 1)")
    assert parts == dualop.chain(DEFAULT)
    assert [c.stage.name for c in parts.calls] == ["add", "silu", "tanh", "gelu", "hardtanh"]
    # One operand name in two parts is one operand.
    assert dualop.chain("add(b)", "mul(s) | add(b)").operands == ("b", "s")


def test_limits() -> None:
    assert len(dualop.chain(" | ".join(["relu"] * MAX_STAGES)).calls) == MAX_STAGES
    with pytest.raises(ChainError, match=str(MAX_STAGES)):
        dualop.chain(" | ".join(["relu"] * (MAX_STAGES + 1)))
    many = [f"add(b{i})" for i in range(MAX_OPERANDS + 1)]
    assert len(dualop.chain(" | ".join(many[:-1])).operands) == MAX_OPERANDS
    with pytest.raises(ChainError, match=str(MAX_OPERANDS)):
        dualop.chain(" | ".join(many))


# ---- equality, copies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [DEFAULT, "add(b) | mul(-0.0) | clamp(max=2)", 'gelu(approximate="tanh") | mul(x)'])
@pytest.mark.parametrize(
    "copied",
    [lambda op: pickle.loads(pickle.dumps(op)), copy.copy, copy.deepcopy, lambda op: eval(repr(op))],
    ids=["pickle", "copy", "deepcopy", "repr"],
)
def test_copies_are_equal(text: str, copied: object) -> None:
    op = dualop.chain(text)
    other = copied(op)  # type: ignore[operator]
    assert other == op and hash(other) == hash(op) and other.operands == op.operands and str(other) == str(op)


def test_equality_is_of_meaning() -> None:
    assert dualop.chain("swish") == dualop.chain("silu()") != dualop.chain("mish")
    assert dualop.chain("mul(0)") != dualop.chain("mul(-0.0)")
    assert dualop.chain("mul(1)") == dualop.chain("mul(1.0)") != dualop.chain("mul(x)")
    assert dualop.chain("add(a)") != dualop.chain("add(b)")
    assert dualop.chain("relu") != "relu"
    assert len({dualop.chain("swish"), dualop.chain("silu"), dualop.chain("relu")}) == 2


def test_a_chain_cannot_be_changed() -> None:
    """The same text gives the same object: who changed one would change every other user's."""
    op = dualop.chain("relu | tanh")
    for name, value in (("text", "relu"), ("operands", ("b",)), ("calls", ()), ("new", 1)):
        with pytest.raises(AttributeError):
            setattr(op, name, value)


def test_a_chain_in_a_module_is_saved_with_it() -> None:
    class Tail(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = dualop.chain("add | relu")

    assert copy.deepcopy(Tail()).op == dualop.chain("add | relu")


# ---- operands ------------------------------------------------------------------------------------------------------


def test_operands_come_in_the_order_of_their_first_appearance() -> None:
    op = dualop.chain("mul(s) | add(b) | add(x) | mul(s) | maximum(floor) | add(1)")
    assert op.operands == ("s", "b", "floor")


X, B, S = torch.full((2, 3), 2.0), torch.full((3,), 3.0), torch.full((2, 1), 5.0)


@pytest.mark.parametrize(
    "passed",
    [
        lambda op: op(X, B, S, backend="reference"),
        lambda op: op(X, B, scale=S, backend="reference"),
        lambda op: op(X, bias=B, scale=S, backend="reference"),
        lambda op: op(X, scale=S, bias=B, backend="reference"),
        lambda op: op(x=X, scale=S, bias=B, backend="reference"),
    ],
    ids=["positional", "mixed", "keywords", "keywords the other way", "all keywords"],
)
def test_operands_by_place_and_by_name(passed: object) -> None:
    torch.testing.assert_close(passed(dualop.chain("add(bias) | mul(scale)")), torch.full((2, 3), 25.0))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("passed", "says"),
    [
        (lambda op: op(X), "missing bias, scale"),
        (lambda op: op(X, B), "missing scale"),
        (lambda op: op(X, scale=S), "missing bias"),
        (lambda op: op(X, B, S, B), "3 operands given"),
        (lambda op: op(X, B, S, bias=B), "bias"),
        (lambda op: op(X, B, bias=B), "bias"),
        (lambda op: op(X, B, other=S), "missing scale; unknown other"),
        (lambda op: op(X, bias=B, scal=S), "takes (x, bias, scale); missing scale; unknown scal"),
        (lambda op: op(X, B, bias=B, scal=S), "missing scale; unknown scal; given twice bias"),
        (lambda op: op(X, B, S, B, scal=S), "3 operands given; unknown scal"),
        (lambda op: op(X, B, S, other=S), "other"),
        (lambda op: op(X, B, 2.0), "scale must be a tensor, not float"),
        (lambda op: op(X, B, None), "scale must be a tensor, not NoneType"),
        (lambda op: op([1.0], B, S), "x must be a tensor, not list"),
        (lambda op: op(X, B, [1.0]), "scale must be a tensor, not list"),
    ],
)
def test_wrong_operands(passed: object, says: str) -> None:
    with pytest.raises(OperandError, match=re.escape(says)) as caught:
        passed(dualop.chain("add(bias) | mul(scale)"))  # type: ignore[operator]
    assert isinstance(caught.value, TypeError)


def test_x_may_be_passed_as_an_operand_too() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    op = dualop.chain("mul(a) | mul(x)")
    (g,) = torch.autograd.grad(op(x, x, backend="reference").sum(), x)
    torch.testing.assert_close(g, 3 * x.detach() ** 2)
