"""The Python of the README and of the pages runs as it stands, in order, as one program each."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "audit.md"]
LANGUAGES = {"python", "py", "python3"}


def python_blocks(text: str) -> list[tuple[int, str]]:
    """(line number of the first line of code, code) of every fenced Python block."""
    blocks: list[tuple[int, str]] = []
    fence, start, wanted, code = "", 0, False, [""]
    for number, line in enumerate(text.splitlines(), 1):
        mark = line.strip()
        if not fence and mark.startswith("```"):
            fence = "`" * (len(mark) - len(mark.lstrip("`")))
            language = mark.lstrip("`").strip().partition(" ")[0].lower()
            start, wanted, code = number + 1, language in LANGUAGES, []
        elif fence and mark.startswith(fence) and not mark.strip("`"):
            if wanted:
                blocks.append((start, "\n".join(code) + "\n"))
            fence = ""
        elif fence:
            code.append(line)
    if fence:
        raise ValueError(f"the block that starts before line {start} never ends")
    return blocks


def run(text: str, filename: str) -> dict[str, object]:
    """Execute all blocks in one namespace, which is returned."""
    blocks = python_blocks(text)
    if not blocks:
        raise ValueError(f"{filename} has no Python block")
    # As a script, so that no `if __name__ == "__main__":` is silently left out.
    namespace: dict[str, object] = {"__name__": "__main__"}
    for start, code in blocks:
        # Empty lines in front make a traceback point at the line of the document.
        exec(compile("\n" * (start - 1) + code, filename, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_document_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(document.read_text(encoding="utf-8"), str(document))


def test_blocks_run_in_order_and_share_names() -> None:
    text = "a\n```python\nx = [1]\n```\n```sh\nx\n```\n```py title=b\nx.append(2)\n```\n"
    assert run(text, "example.md")["x"] == [1, 2]


def test_error_points_at_the_line_of_the_document() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run("a\n\n```python\nx = 1\n1 / 0\n```\n", "example.md")
    assert caught.traceback[-1].lineno + 1 == 5


def test_fence_within_a_longer_fence_is_text() -> None:
    assert python_blocks("````md\n```python\nx\n```\n````\n") == []


@pytest.mark.parametrize("text", ["no code", "```sh\nls\n```\n", "```python\nx = 1\n"])
def test_document_without_code_or_end_fails(text: str) -> None:
    with pytest.raises(ValueError, match=r"no Python block|never ends"):
        run(text, "example.md")
