"""Image sizes that come back from an encoder and its decoder as they went in; others are padded up to one of them."""

from __future__ import annotations

from arae.errors import InputError
from arae.models.blocks import Decoder
from arae.models.taps import Encoder


class Fit:
    """The sizes at which a decoder returns what its encoder saw; found by arithmetic on shapes, and remembered."""

    def __init__(self, encoder: Encoder, layer: str, decoder: Decoder) -> None:
        """`decoder` inverts the tap `layer` of `encoder`; at its own `image_shape` the size comes back."""
        self.encoder, self.layer, self.decoder = encoder, layer, decoder
        self._sides: dict[tuple[int, int], int] = {}
        self._known: dict[tuple[int, int], tuple[int, int] | None] = {}
        self._least: int | None = None

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The smallest (H, W) at or above height×width that comes back as it went in.

        Images under the encoder's minimum fit at the minimum, or above. Raises InputError where no size does: the
        decoder enlarges by another factor than the encoder reduces by.
        """
        trained = self.decoder.image_shape[1:]
        if (height, width) == trained:
            return trained
        size = self._side(0, height), self._side(1, width)
        if self._back(size) != size:
            raise InputError(
                f"{height}×{width} images can't be reconstructed: rows and columns do not go through encoder "
                f"{self.encoder.name} apart; use images of {trained[0]}×{trained[1]} px"
            )
        return size

    def _side(self, axis: int, wanted: int) -> int:
        """The smallest side at or above `wanted` that comes back, the other side being the trained one."""
        key = (axis, wanted)
        if key not in self._sides:
            self._sides[key] = self._search(axis, wanted)
        return self._sides[key]

    def _search(self, axis: int, wanted: int) -> int:
        trained = self.decoder.image_shape[1 + axis]
        side, most = wanted, 2 * (wanted + trained)
        if wanted < trained:
            self._least = self._least or self.encoder.min_size(self.layer) or 1
            side = max(wanted, min(self._least, trained))
        # What comes back never shrinks as the image grows, but grows in steps. So where more comes back than went in,
        # no side below that can be its own; where less does, none on the same step can.
        while side <= most:
            back = self._back_along(axis, side)
            if back == side:
                return side
            side = back if back > side else self._next_step(axis, side, back, most)
        raise InputError(
            f"images of {wanted} px a side can't be reconstructed: no side up to {most} px comes back from encoder "
            f"{self.encoder.name} ({self.layer}) and decoder {self.decoder.name} as it went in; they are made for "
            f"{trained} px: use images of at most that, or cut them into tiles of that size"
        )

    def _next_step(self, axis: int, side: int, back: int, most: int) -> int:
        """The smallest side above `side` of which more than `back` comes back; one above `most` where there is none."""
        reach = 1
        while self._back_along(axis, side + reach) <= back:
            if side + reach > most:
                return side + reach
            reach *= 2
        low, high = side + reach // 2, side + reach  # at `low` it is still `back`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._back_along(axis, middle) > back else (middle, high)
        return high

    def _back_along(self, axis: int, side: int) -> int:
        """What comes back of a side, the other one being the trained one; 0 where nothing does."""
        size = list(self.decoder.image_shape[1:])
        size[axis] = side
        back = self._back((size[0], size[1]))
        return back[axis] if back is not None else 0

    def _back(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """The size of what is decoded of images of a size; None where they can't be encoded or decoded."""
        if size not in self._known:
            self._known[size] = self._decoded(size)
        return self._known[size]

    def _decoded(self, size: tuple[int, int]) -> tuple[int, int] | None:
        try:
            _, h, w = self.encoder.feature_shape((self.decoder.image_shape[0], *size), self.layer)
            return self.decoder.output_size(h, w)
        except InputError:
            return None
