"""The mask algebra: gates, the rules per operator, and the programs that evaluate gates for one task.

This room imports no other room of hatify. The converter runs the rules on shapes; a hand-written network runs
the same rules as it goes.
"""

from hatify.gates.locks import Use, locked
from hatify.gates.program import Program, compile_gates, evaluate
from hatify.gates.table import CONST, TOP, GateTable
from hatify.gates.value import State, Value

__all__ = ["CONST", "TOP", "GateTable", "Program", "State", "Use", "Value", "compile_gates", "evaluate", "locked"]
