"""What a pass is: a frozen dataclass with a name, a declared effect, options, and one method.

::

    @dataclass(frozen=True, kw_only=True)
    class DropIdentity(Pass):
        '''y = x * 1 is x.'''

        name: ClassVar[str] = "drop_identity"
        effect: ClassVar[Effect] = Effect.EXACT

        def run(self, edit: Edit, facts: Facts) -> None:
            for node in edit.calls(torch.ops.aten.mul.Tensor):
                if node.args[1] == 1:
                    edit.spend("multiplies by one", node)
                    edit.replace(node, node.args[0])
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qcompiler.edit import Edit
from qcompiler.history import Effect
from qcompiler.options import Optioned

if TYPE_CHECKING:
    from qcompiler.facts import Facts
    from qcompiler.program import Program


@dataclass(frozen=True, kw_only=True)
class Pass(Optioned):
    """One rewrite. It reads `facts`, changes the program through `edit`, and nothing else.

    Valid before, valid after, and valid after every single edit in between.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]
    needs: ClassVar[tuple[str, ...]] = ()
    """Facts that need data (see `facts.NEEDS`): computed by the pipeline before `run`."""

    makes: ClassVar[tuple[str, ...]] = ()
    """What the program has after the pass that later passes read or spoil (see `order.py`)."""
    reads: ClassVar[tuple[str, ...]] = ()
    """What a pass before it must have made, if one in the pipeline makes it at all."""
    destroys: ClassVar[tuple[str, ...]] = ()
    """What it makes void: a pass that makes it comes later."""
    ends: ClassVar[tuple[str, ...]] = ()
    """What there is no more behind it: a pass that reads it comes before."""

    optional: bool = False
    """A pass that changes nothing is an error, unless it is optional."""

    @abstractmethod
    def run(self, edit: Edit, facts: Facts) -> None:
        """Edit the program. Raise `BadInput` for an option that does not fit this program."""

    def needs_for(self, program: Program) -> tuple[str, ...]:
        """The facts needed for this program: `needs`, or fewer where the plan asks for none."""
        return self.needs

    def tolerance(self, facts: Facts) -> float:
        """Largest relative error that the effect's check accepts."""
        return 1e-9 if self.effect is Effect.EXACT else 1.0

    def gives(self) -> tuple[str, ...]:
        """What the pass makes with these options: `makes`, or less."""
        return self.makes
