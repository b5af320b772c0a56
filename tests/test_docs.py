"""The pages for readers: links and paths lead somewhere, examples run, README stays short, docstrings are sentences."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import dualop

DOCS = sorted((ROOT / "docs").glob("*.md"))
TOP = [ROOT / page for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *DOCS, *sorted((ROOT / "bench").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# `make contract-table` writes these pages, one for each version of torch.
WRITTEN_BY_A_COMMAND = ROOT / "docs" / "torch_contract"


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> list[str]:
    """Return the Python examples of a page."""
    return [code for language, code in FENCE.findall(page.read_text()) if language == "python"]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if file.parent == WRITTEN_BY_A_COMMAND and not file.exists():
            continue
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_resolves(page: Path) -> None:
    assert not broken_links(page)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Two words\n[a](page.md#two-words) [b](page.md#three) [c](gone.md) [d](https://example.org)\n")
    assert broken_links(page) == ["page.md#three", "gone.md"]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name)
def test_the_files_and_modules_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    paths = re.findall(r"`((?:dualop|cuda|triton_kernels|bench|tests|docs|examples)/[\w./]*)`", text)
    missing = [path for path in paths if not (ROOT / path).exists()]
    for module in re.findall(r"`import (dualop[\w.]*)`", text):
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(module)
    assert not missing


def test_the_readme_is_short_and_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert "\n    make bench " in text and "\n    make test " in text


def test_the_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert not [name(page) for page in DOCS if f"({name(page)})" not in text]


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_a_page_opens_with_what_its_reader_can_do(page: Path) -> None:
    assert page.read_text().split("\n")[2].startswith("After reading this page you ")


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=name)
def test_every_example_compiles(page: Path) -> None:
    for code in blocks(page):
        ast.parse(code)


def test_the_examples_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    """As they stand, by `auto`, and made smaller on every backend that runs here."""
    examples = "\n".join(blocks(ROOT / "README.md"))
    assert examples
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for backend in ("auto", "cuda", "triton", "reference"):
        code = examples if backend == "auto" else examples.replace("1024", "4").replace("8192", "64")
        names: dict[str, object] = {}
        with dualop.use_backend(backend):
            exec(compile(code, "README.md", "exec"), names)
            x, bias, model, tail = (names[n] for n in ("x", "bias", "model", "tail"))
            assert isinstance(x, torch.Tensor) and isinstance(bias, torch.Tensor)
            assert x.grad is not None and x.grad.shape == x.shape
            assert bias.grad is not None and bias.grad.shape == bias.shape
            assert isinstance(model, torch.nn.Module) and isinstance(tail, torch.nn.Module)
            assert {n for n, _ in model.named_parameters()} == {"linear.weight", "linear.bias", "add_value"}
            assert {n for n, _ in tail.named_parameters()} == {"bias", "scale"}
            assert model.to(device)(torch.randn(2, 256, device=device)).shape == (2, 64)
            assert tail.to(device)(torch.randn(2, 64, 3, 3, device=device)).shape == (2, 64, 3, 3)
        assert "reference" in capsys.readouterr().out


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_the_examples_of_a_page_run(page: Path) -> None:
    """All but those of torch.export, which stand for a program of the reader's."""
    code = "\n".join(block for block in blocks(page) if "torch.export" not in block)
    exec(compile(code, page.name, "exec"), {})


# Words that open a noun phrase or half a sentence where an imperative should stand.
NO_IMPERATIVE = re.compile(
    "(A|All|Along|Also|An|As|At|By|From|How|It|None|Of|On|One|Said|So|That|The|What|Where|Whether|Who|Why|Within)$"
)
# The docstrings of these files are still to be rewritten. Take a file off this list when that is done.
TO_BE_REWRITTEN = (
    "dualop/linear.py",
)
SOURCES = [
    path
    for folder in ("dualop", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not name(path).startswith(TO_BE_REWRITTEN)
]


def faults_of_docstrings(code: str) -> list[str]:
    """Return the public docstrings of a module that do not open with one imperative sentence on one line."""
    faults = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            continue
        docstring, called = ast.get_docstring(node), getattr(node, "name", "module")
        if docstring is None or (called.startswith("_") and not called.endswith("__")):
            continue
        first = docstring.split("\n\n")[0]
        word = first.split()[0]
        if "\n" in first or first[-1] not in ".:" or not re.match("[A-Z][a-z]+$", word) or NO_IMPERATIVE.match(word):
            faults.append(f"{called}: {first}")
    return faults


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_public_docstrings_open_with_an_imperative_sentence(path: Path) -> None:
    assert not faults_of_docstrings(path.read_text())


@pytest.mark.parametrize(
    "docstring",
    ["Of a ctypes function.", "Whether it works.", "Return a number", "Return a\n    number.", "chain(x) in one."],
)
def test_half_a_sentence_is_found(docstring: str) -> None:
    assert len(faults_of_docstrings(f'def f():\n    """{docstring}"""')) == 1
    assert not faults_of_docstrings('"""Return the address.\n\nOf a function.\n"""')
