"""One table of rules, from an ATen operator's name (without overload) to what it does to gates.

A rule looks at one call with at least one gated operand, asks its interpreter to materialise what has to be, and says
which gates come out. Two interpreters use it: the converter's, on shapes, and the payload's, on data.
"""

from hatify.gates.rules import contractions, elementwise, filters, movement, norms, reductions
from hatify.gates.rules.base import Call, Gates, Interpreter, Outcome, RuleTable, unknown

RULES = RuleTable()
for _room in (movement, elementwise, reductions, contractions, filters, norms):
    _room.register(RULES)

__all__ = ["RULES", "Call", "Gates", "Interpreter", "Outcome", "RuleTable", "unknown"]
