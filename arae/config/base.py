"""What the recipe's parts are made of: radii with their norm, numbers with their range, and `Part` itself."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Norm = Literal["l2", "linf"]
Augment = Literal["flip", "shift", "crop"]


def parse_radius(value: object) -> float:
    """A radius in units of images in [0, 1]: a number, or a fraction as text (`"8/255"`).

    Raises ValueError for anything negative, not finite, or with a unit of its own.
    """
    mend = 'write a number of images in [0, 1], such as 0.5, or a fraction, such as "8/255"'
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"a radius can't be {value!r}: {mend}")
    try:
        radius = float(Fraction(value.strip())) if isinstance(value, str) else float(value)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"a radius can't be {value!r}: {mend}") from None
    except OverflowError:
        radius = math.inf
    if not math.isfinite(radius):
        raise ValueError(f"a radius must be finite, not {value!r}: {mend}")
    if radius < 0:
        raise ValueError(f"a radius must not be negative, as {value!r} is")
    return radius


Radius = Annotated[float, BeforeValidator(parse_radius)]
Positive = Annotated[float, Field(gt=0)]
Fraction01 = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


def check_radius(norm: Norm | None, eps: float, what: str = "eps", at: str = "") -> None:
    """Raise ValueError for a radius without a norm, or an l-inf radius wider than the whole range [0, 1]."""
    if eps > 0 and norm is None:
        raise ValueError(
            f"{what} = {eps:g} has no norm: add `norm: l2` or `norm: linf` {f'to {at}' if at else 'beside it'}"
        )
    if norm == "linf" and eps > 1:
        raise ValueError(
            f"{what} = {eps:g} in l-inf is wider than images in [0, 1]; for 8-bit levels write it as {eps:g}/255"
        )


_SECRET = re.compile(
    r"://[^/@\s]*:[^/@\s]+@|[?&][^=&]*(secret|password|token|access_?key|signature|credential)[^=&]*=", re.IGNORECASE
)


def check_no_secret(value: str, place: str) -> None:
    """ValueError where a URL holds a password or a key: recipes are shown, logged and sent to MLflow."""
    if _SECRET.search(value):
        raise ValueError(f"{place} holds a password or a key: leave it out, and set it in the environment of the nodes")


class Part(BaseModel):
    """Base of every part: frozen, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    later: ClassVar[frozenset[str]] = frozenset()
    """Keys that were added after runs had been made: at their default they stay out of digests, which so stay valid."""

    def digested(self) -> dict[str, Any]:
        """The part as a JSON document for a digest."""
        document = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name in self.later and value == field.get_default(call_default_factory=True):
                del document[name]
            elif isinstance(value, Part):
                document[name] = value.digested()
            elif isinstance(value, tuple):
                pairs = zip(value, document[name], strict=True)
                document[name] = [one.digested() if isinstance(one, Part) else plain for one, plain in pairs]
        return document
