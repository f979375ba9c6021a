"""The language of docstrings, comments, messages and pages: plain technical English."""

import ast
import re

from tests.support.processes import REPOSITORY

FIRST_WORDS = {"What", "Whether", "Who", "Which", "How", "Where"}
AVOIDED = re.compile(
    r"\b([Ww]hoever|told|gone|[Bb]esides|for ever|is no|is none|[Mm]eanwhile"
    r"|[Ss]o (many|much|long))\b"
)
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
READ_BY_USERS = (
    *(
        "service/**/*.py",
        "training/**/*.py",
        "service/playground/*.html",
        "service/playground/*.js",
    ),
    *("README.md", "*/README.md", "service/deploy/README.md", "tests/benchmarks/README.md"),
)


def test_a_docstring_begins_with_a_verb_or_a_noun() -> None:
    wrong, found = [], 0
    for package in ("service", "training", "tests"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, Documented):
                    words = re.split(r"\W", ast.get_docstring(node) or "", maxsplit=1)
                    found += bool(words[0])
                    if words[0] in FIRST_WORDS:
                        name = getattr(node, "name", "module")
                        wrong.append(f"{path.relative_to(REPOSITORY)} {name}: {words[0]}")
    assert found > 500
    assert wrong == []


def test_texts_use_plain_words() -> None:
    paths = sorted({path for pattern in READ_BY_USERS for path in REPOSITORY.glob(pattern)})
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{number}: {found.group()}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (found := AVOIDED.search(line))
    ]
    assert len(paths) > 60
    assert wrong == []


def test_the_check_itself_finds_avoided_words() -> None:
    assert AVOIDED.search("This is no HTTP.")
    assert not AVOIDED.search("This is not HTTP.")
