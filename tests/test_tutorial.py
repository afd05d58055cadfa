"""The code of the tutorial runs, in order, and what it asserts holds."""

from __future__ import annotations

import re
from pathlib import Path

TUTORIAL = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"


def test_the_tutorial_runs():
    text = TUTORIAL.read_text(encoding="utf-8")
    blocks = [(text[: m.start()].count("\n") + 2, m.group(1)) for m in re.finditer(r"```python\n(.*?)```", text, re.DOTALL)]
    assert len(blocks) == text.count("```python") > 9
    space: dict = {"__name__": "tutorial"}
    for line, code in blocks:
        exec(compile("\n" * (line - 1) + code, str(TUTORIAL), "exec"), space)
