"""Arithmetic expressions as data: a parser by grammar, exact values, and one string for all equivalent writings.

Model text is data, so nothing here is evaluated by Python. The grammar is the whole language:

    sum     = product (("+" | "-") product)*
    product = atom (("*" | "/") atom)*
    atom    = integer | "(" sum ")"

Two expressions are equivalent when they are the same rational function of their operands: `(5*3)-2`, `3*5-2` and
`5*3-2` are; `4-2` and `4/2` are not, although their values agree. Equivalence is decided by evaluating both at the same
pseudo-random points modulo a large prime, which is exact up to a chance of about 2^-120.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from ziprc.errors import UserError

MAX_LENGTH = 200
MAX_DEPTH = 20
MAX_DIGITS = 9
_PRIME = 2**61 - 1
EXACT = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
MODULAR = EXACT | {"/": lambda left, right: left * pow(right, -1, _PRIME)}
_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])")


class ExpressionError(UserError, ValueError):
    """Text that is no expression of the grammar."""


@dataclass(frozen=True)
class Expression:
    """A number (no operator) or two expressions joined by an operator."""

    op: str | None
    number: int = 0
    left: Expression | None = None
    right: Expression | None = None

    def fold(self, number: Callable[[int], Any], operators: Mapping[str, Callable[[Any, Any], Any]]) -> Any:
        """What the tree comes to when its numbers and operators are these."""
        if self.op is None or self.left is None or self.right is None:
            return number(self.number)
        return operators[self.op](self.left.fold(number, operators), self.right.fold(number, operators))

    def value(self) -> Fraction:
        """The exact value; ZeroDivisionError where it divides by zero."""
        return self.fold(Fraction, EXACT)

    def numbers(self) -> tuple[int, ...]:
        """The operands from left to right."""
        return self.fold(lambda number: (number,), dict.fromkeys(EXACT, operator.add))

    def canonical(self) -> str:
        """Equal for equivalent expressions: the sorted operands and a fingerprint of the rational function."""

        def point(salt: str, number: int) -> int:
            return int.from_bytes(hashlib.blake2b(f"{salt} {number}".encode(), digest_size=8).digest(), "big") % _PRIME

        operands = ",".join(map(str, sorted(self.numbers())))
        try:
            prints = [self.fold(partial(point, salt), MODULAR) % _PRIME for salt in ("first", "second")]
        except ValueError:  # a divisor that has no inverse is zero
            return f"{operands}:undefined"
        return f"{operands}:" + "".join(f"{residue:016x}" for residue in prints)


def parse_expression(text: str) -> Expression:
    """The expression that the whole text is; ExpressionError (a ValueError) says where it is none."""
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"an expression of {len(text)} characters; at most {MAX_LENGTH} are read")
    tokens = _tokens(text)
    expression = _sum(tokens, depth=0)
    if tokens[-1]:
        raise ExpressionError(f"'{tokens[-1]}' follows a complete expression in '{text}'")
    return expression


def _tokens(text: str) -> list[str]:
    """The tokens, last one first, below them an empty one for the end."""
    tokens, position, text = [], 0, text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match or len(match[1]) > MAX_DIGITS:
            found = text[position : position + MAX_DIGITS + 1]
            raise ExpressionError(f"'{found}' is no integer, operator or parenthesis in '{text}'")
        tokens.append(match[1])
        position = match.end()
    return ["", *reversed(tokens)]


# Recursive descent, one function per rule of the grammar; each takes its tokens off the end of the list.


def _sum(tokens: list[str], depth: int) -> Expression:
    left = _product(tokens, depth)
    while tokens[-1] in ("+", "-"):
        left = Expression(tokens.pop(), left=left, right=_product(tokens, depth))
    return left


def _product(tokens: list[str], depth: int) -> Expression:
    left = _atom(tokens, depth)
    while tokens[-1] in ("*", "/"):
        left = Expression(tokens.pop(), left=left, right=_atom(tokens, depth))
    return left


def _atom(tokens: list[str], depth: int) -> Expression:
    token = tokens.pop()
    if not token:
        raise ExpressionError("the expression ends where a number or '(' should come")
    if token.isdigit():
        return Expression(None, number=int(token))
    if token != "(" or depth >= MAX_DEPTH:
        raise ExpressionError(f"'{token}' where a number or '(' should come, or more than {MAX_DEPTH} deep")
    inside = _sum(tokens, depth + 1)
    if tokens.pop() != ")":
        raise ExpressionError("a parenthesis is not closed")
    return inside
