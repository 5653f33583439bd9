"""Every example in README.md and below docs/ keeps the rules of CONTRIBUTING.md, so that it runs."""

from __future__ import annotations

import pytest

from support import documentation
from support.documentation import Commands, Suite

PAGES = documentation.pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_page_keeps_them(page):
    assert page.problems == []


def test_all_pages_are_read():
    names = {page.name for page in PAGES}
    assert {"README.md", "docs/index.md", "docs/reference/index.md"} <= names
    assert any(page.examples for page in PAGES)


def read(*lines):
    page = documentation.read("\n".join([*lines, ""]), "page.md")
    return page.examples, page.problems


def block(language, *lines):
    return [f"```{language}", *lines, "```"]


PASSING = block("python", "def test_a(): pass", "def test_b(): pass")


class TestTests:
    def test_a_block_is_a_file(self):
        (example,), problems = read("# Title", "", *PASSING)
        assert problems == []
        assert isinstance(example, Suite)
        assert (example.name, example.count, list(example.arguments)) == ("test_a", 2, [])
        assert example.files == {"test_page.py": "def test_a(): pass\ndef test_b(): pass\n"}
        assert (example.place, example.status) == ("page.md:3", 0)

    def test_those_in_classes_count(self):
        (example,), _ = read(
            *block(
                "python", "class TestIt:", "    def test_a(self): pass", "async def test_b(): pass"
            )
        )
        assert example.count == 2

    def test_arguments_of_pytest(self):
        (example,), problems = read("<!-- pytest: --in-vm -k 'a or b' -->", *PASSING)
        assert problems == []
        assert list(example.arguments) == ["--in-vm", "-k", "a or b"]

    def test_another_status(self):
        (example,), problems = read("<!-- status: 1 -->", *PASSING)
        assert problems == []
        assert example.status == 1

    def test_files_lie_beside_the_next_one_alone(self):
        (first, second), problems = read(
            *("<!-- file: conftest.py -->", *block("python", "X = 1")),
            *("Text.", "<!-- file: sub/pytest.ini -->", *block("ini", "[pytest]")),
            *PASSING,
            *PASSING,
        )
        assert problems == []
        assert set(first.files) == {"conftest.py", "sub/pytest.ini", "test_page.py"}
        assert first.files["conftest.py"] == "X = 1\n"
        assert set(second.files) == {"test_page.py"}

    def test_tests_in_files_count(self):
        (example,), _ = read(
            "<!-- file: test_more.py -->", *block("python", "def test_c(): pass"), *PASSING
        )
        assert example.count == 3

    def test_in_a_list_and_in_a_directive(self):
        (first, second), problems = read(
            *("* An item:", "", *(f"  {line}" for line in PASSING), ""),
            *("````{note}", *PASSING, "````"),
        )
        assert problems == []
        assert first.files == second.files
        assert second.place == "page.md:9"


class TestCommands:
    def test_lines_with_a_prompt(self):
        (example,), problems = read(
            *block("console", "$ pytest -q", "1 passed", "$ echo \\", "> on", "$ true")
        )
        assert problems == []
        assert isinstance(example, Commands)
        assert list(example.lines) == ["pytest -q", "echo on", "true"]

    def test_files_lie_beside_all_up_to_the_next_tests(self):
        examples, problems = read(
            *("<!-- file: test_x.py -->", *PASSING),
            *block("console", "$ pytest"),
            *block("console", "$ pytest -v"),
            *PASSING,
            *block("console", "$ true"),
        )
        assert problems == []
        assert [set(example.files) for example in examples] == [
            *({"test_x.py"}, {"test_x.py"}, {"test_x.py", "test_page.py"}),
            set(),
        ]


@pytest.mark.parametrize(
    "lines",
    [
        block("yaml", "a: 1"),
        block("text", "$ nothing"),
        block("", "$ nothing"),
        ["<!-- not run: it takes a day -->", *block("console", "$ sleep 86400")],
        ["<!-- not run: it installs software -->", *block("bash", "apt-get install x")],
        ["<!-- machine --> this one", "", *block("yaml", "a: 1")],
        ["<!-- a remark -->", "", "Text."],
    ],
)
def test_what_does_not_run(lines):
    assert read(*lines) == ([], [])


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (block("python", "x = 1"), "1: this python block has no test"),
        (block("python", "def test_a(:"), "1: its line 1 is no Python: "),
        (["<!-- file: conftest.py -->", *block("python", "def f(:")], "2: its line 1 is no Python"),
        (block("console", "pytest"), "1: this console block has no line that begins with '$ '"),
        (block("py", "def test_a(): pass"), "1: a 'py' block does not run: make it 'python'"),
        (block("bash", "pytest"), "1: a 'bash' block does not run: make it 'console'"),
        (block("{code-block} python", "x"), "1: write a fenced block with a language"),
        (["<!-- not run: -->", *PASSING], "2: 'not run' stands alone, with a reason"),
        (["<!-- not run: slow -->", *PASSING], "2: 'not run' stands alone, with a reason"),
        (
            ["<!-- not-run: it is slow -->", *PASSING],
            "2: '<!-- not-run: it is slow -->' is no comment",
        ),
        (["<!-- files: a.py -->", *PASSING], "2: '<!-- files: a.py -->' is no comment"),
        (["<!-- pytest: -q -->", *block("yaml", "a: 1")], "2: the comment 'pytest' does nothing"),
        (["<!-- pytest: -q -->", *block("console", "$ x")], "2: 'pytest' is for python blocks"),
        (["<!-- pytest: -q -->", "", "Text."], "1: the comment 'pytest' stands right before no"),
        (["<!-- pytest: -q -->"], "1: the comment 'pytest' stands right before no block"),
        (["<!-- status: one -->", *PASSING], "2: 'one' is no exit status"),
        (["<!-- file: ../x -->", *block("ini", "x"), *PASSING], "2: '../x' is no path"),
        (["<!-- file: /x -->", *block("ini", "x"), *PASSING], "2: '/x' is no path"),
        (["<!-- file: x.ini -->", *block("ini", "x")], "2: no block after this one uses the file"),
        (
            [
                "<!-- file: x -->",
                *block("ini", "x"),
                "<!-- file: x -->",
                *block("ini", "y"),
                *PASSING,
            ],
            "6: x is written again before anything has used it",
        ),
    ],
)
def test_what_breaks_them(lines, problem):
    _, (found,) = read(*lines)
    assert found.startswith(f"page.md:{problem}")
