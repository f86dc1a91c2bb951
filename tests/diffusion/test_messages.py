"""What error messages show of values and texts from outside: always on one line, and short."""

from __future__ import annotations

import pytest

from diffusion.messages import MAX_LINE, brief, brief_list, first_line, one_line


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (one_line("two\n  lines"), "two lines"),
        (one_line("\x1b[31mred \udce9"), "[31mred"),
        (one_line(OSError("no space\nleft")), "no space left"),
        (one_line(MemoryError()), "MemoryError"),
        (one_line("a\x1b[2J\ud800b"), "a [2J b"),
        (one_line("x" * 10_000), "x" * (MAX_LINE - 4) + " ..."),
        (first_line(RuntimeError("\nit failed \n\nadvice")), "it failed"),
        (first_line(KeyboardInterrupt()), "KeyboardInterrupt"),
        (brief("a\nb"), r"'a\nb'"),
        (brief_list(["a", "b" * 1000, "c", "d"], most=2), "a, " + "b" * 296 + " ..., and 2 more"),
    ],
)
def test_one_line(shown: str, text: str) -> None:
    assert shown == text


@pytest.mark.parametrize(
    "value", ["x" * 10**6, list(range(10**6)), {str(i): [i] * 100 for i in range(1000)}, [[[[[["deep"]]]]]]]
)
def test_values_are_shown_in_part(value: object) -> None:
    assert len(brief(value)) <= MAX_LINE
