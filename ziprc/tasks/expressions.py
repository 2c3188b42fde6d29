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
import re
from dataclasses import dataclass
from fractions import Fraction

from ziprc.errors import UserError

MAX_LENGTH = 200
MAX_DEPTH = 20
MAX_DIGITS = 9
_PRIME = 2**61 - 1
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

    def value(self) -> Fraction:
        """The exact value; ZeroDivisionError where it divides by zero."""
        if self.op is None or self.left is None or self.right is None:
            return Fraction(self.number)
        left, right = self.left.value(), self.right.value()
        if self.op == "+":
            return left + right
        if self.op == "-":
            return left - right
        return left * right if self.op == "*" else left / right

    def numbers(self) -> tuple[int, ...]:
        """The operands from left to right."""
        if self.left is None or self.right is None:
            return (self.number,)
        return self.left.numbers() + self.right.numbers()

    def canonical(self) -> str:
        """Equal for equivalent expressions: the sorted operands and a fingerprint of the rational function."""
        operands = ",".join(str(number) for number in sorted(self.numbers()))
        try:
            prints = [_residue(self, salt) for salt in ("first", "second")]
        except ZeroDivisionError:
            return f"{operands}:undefined"
        return f"{operands}:" + "".join(f"{residue:016x}" for residue in prints)


def _residue(expression: Expression, salt: str) -> int:
    """Value modulo the prime, with every operand replaced by a pseudo-random number of its own."""
    if expression.left is None or expression.right is None:
        digest = hashlib.blake2b(f"{salt} {expression.number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % _PRIME
    left, right = _residue(expression.left, salt), _residue(expression.right, salt)
    if expression.op == "/" and right == 0:
        raise ZeroDivisionError
    inverse = pow(right, -1, _PRIME) if expression.op == "/" else 0
    results = {"+": left + right, "-": left - right, "*": left * right, "/": left * inverse}
    return results[expression.op or "+"] % _PRIME


def parse_expression(text: str) -> Expression:
    """The expression that the whole text is; ExpressionError (a ValueError) says where it is none."""
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"an expression of {len(text)} characters; at most {MAX_LENGTH} are read")
    reader = _Reader(_tokens(text))
    expression = reader.sum(depth=0)
    if reader.peek() is not None:
        raise ExpressionError(f"'{reader.peek()}' follows a complete expression in '{text}'")
    return expression


def _tokens(text: str) -> list[str]:
    tokens, position, text = [], 0, text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match or len(match[1]) > MAX_DIGITS:
            found = text[position : position + MAX_DIGITS + 1]
            raise ExpressionError(f"'{found}' is no integer, operator or parenthesis in '{text}'")
        tokens.append(match[1])
        position = match.end()
    return tokens


class _Reader:
    """Recursive descent over the tokens; one method per rule of the grammar."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._next = tokens, 0

    def peek(self) -> str | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def take(self) -> str:
        token = self.peek()
        if token is None:
            raise ExpressionError("the expression ends where a number or '(' should come")
        self._next += 1
        return token

    def sum(self, depth: int) -> Expression:
        left = self.product(depth)
        while self.peek() in ("+", "-"):
            left = Expression(self.take(), left=left, right=self.product(depth))
        return left

    def product(self, depth: int) -> Expression:
        left = self.atom(depth)
        while self.peek() in ("*", "/"):
            left = Expression(self.take(), left=left, right=self.atom(depth))
        return left

    def atom(self, depth: int) -> Expression:
        token = self.take()
        if token.isdigit():
            return Expression(None, number=int(token))
        if token != "(" or depth >= MAX_DEPTH:
            raise ExpressionError(f"'{token}' where a number or '(' should come, or more than {MAX_DEPTH} deep")
        inside = self.sum(depth + 1)
        if self.peek() != ")":
            raise ExpressionError("a parenthesis is not closed")
        self.take()
        return inside
