"""Objects on a named axis of variation: made from plain values, described by them, found again by name.

The root of an axis (`AttentionStrategy`, `History`, `BlockDesign`) derives from `AxisMember`; every class below a
root joins that axis' registry the moment it is defined. A member's attributes are exactly its constructor's
arguments, so it can be written to JSON and made again without unpickling anything.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from mvar_lightning.errors import UserError, check_types


class AxisMember:
    """Base of the roots. Members compare, hash and print by class and arguments."""

    members: ClassVar[dict[str, type[AxisMember]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if AxisMember in cls.__bases__:
            cls.members = {}
        else:
            cls.members[cls.__name__] = cls

    def config(self) -> dict[str, Any]:
        """Plain values from which `from_config` makes this object again; of a class from elsewhere, its module too."""
        cls = type(self)
        home = {} if cls.__module__.split(".")[0] == "mvar_lightning" else {"module": cls.__module__}
        return {"class": cls.__name__, **home, **vars(self)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The member that `config` described. Raises `UserError` for an unknown class or argument.

        A file never decides what is imported: a class from elsewhere has to be there already.
        """
        if not isinstance(config, dict):
            raise UserError(f"{cls.__name__}: must be a mapping with a class, not {type(config).__name__}")
        arguments = dict(config)
        name, module = arguments.pop("class", None), arguments.pop("module", None)
        if not isinstance(name, str) or name not in cls.members:
            known = ", ".join(sorted(cls.members))
            way_out = f"import it first: mvar --import {module} ..." if module else f"known: {known}"
            raise UserError(f"{cls.__name__} {name!r} is unknown here; {way_out}")
        check_types(cls.members[name].__init__, arguments)  # type: ignore[misc]
        try:
            return cls.members[name](**arguments)  # type: ignore[return-value]
        except TypeError as error:
            raise UserError(f"{cls.__name__} {name}: {error}") from error

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"
