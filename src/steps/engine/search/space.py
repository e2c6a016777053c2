"""What a search chooses from: bits and rank of each layer, and the memory that they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
#: Bits of a layer's weights and rank of its adapters: one gene, inherited whole.
Gene = tuple[int, int]
#: One gene for each layer.
Configuration = tuple[Gene, ...]


@dataclass(frozen=True)
class Space:
    """bits, ranks: what each layer may have, ascending; one entry where there is nothing to choose.
    size:   bytes of layer l with that many bits and that rank; more of either never costs less.
    budget: bytes that a configuration may cost.
    """

    bits: Sequence[Sequence[int]]
    ranks: Sequence[Sequence[int]]
    size: Callable[[int, int, int], int]
    budget: int

    @property
    def layers(self) -> int:
        return len(self.bits)

    @cached_property
    def _sizes(self) -> list[dict[Gene, int]]:
        return [
            {(b, r): self.size(layer, b, r) for b in self.bits[layer] for r in self.ranks[layer]}
            for layer in range(self.layers)
        ]

    def bytes(self, configuration: Configuration) -> int:
        """What a configuration costs."""
        return sum(sizes[gene] for sizes, gene in zip(self._sizes, configuration, strict=True))

    @property
    def smallest(self) -> Configuration:
        """The least of everything. Over budget, nothing fits."""
        return tuple((bits[0], ranks[0]) for bits, ranks in zip(self.bits, self.ranks, strict=True))

    def uniform(self, bits: int) -> Configuration:
        """These bits in every layer that may have them (the nearest elsewhere), and the middle rank."""
        return tuple(
            (min(mine, key=lambda choice: (abs(choice - bits), choice)), ranks[len(ranks) // 2])
            for mine, ranks in zip(self.bits, self.ranks, strict=True)
        )

    def leaning(self, wanted: Floats, sensitivity: Floats) -> Configuration:
        """The configuration nearest to `wanted` [layers, 2], 0 the least choice and 1 the most; made to fit."""
        nearest = tuple(
            (self.bits[layer][_nearest(self.bits[layer], b)], self.ranks[layer][_nearest(self.ranks[layer], r)])
            for layer, (b, r) in enumerate(np.clip(wanted, 0, 1).tolist())
        )
        return self.fit(nearest, sensitivity)

    def steps(self, layer: int, gene: Gene) -> Iterator[Gene]:
        """The genes one choice away: more or fewer bits, or a higher or lower rank, never both."""
        bits, ranks = self.bits[layer], self.ranks[layer]
        b, r = bits.index(gene[0]), ranks.index(gene[1])
        yield from ((bits[other], gene[1]) for other in (b - 1, b + 1) if 0 <= other < len(bits))
        yield from ((gene[0], ranks[other]) for other in (r - 1, r + 1) if 0 <= other < len(ranks))

    def neighbours(self, configuration: Configuration) -> Iterator[Configuration]:
        """Every configuration that is one step of one layer away."""
        for layer, gene in enumerate(configuration):
            for other in self.steps(layer, gene):
                yield (*configuration[:layer], other, *configuration[layer + 1 :])

    def fit(self, configuration: Configuration, sensitivity: Floats) -> Configuration:
        """The configuration brought under the budget, by single steps down that hurt least for the bytes they save.

        What hurts is the layer's sensitivity [layers], in [0, 1], times how much noise the step adds (`_noise`); of
        equals, the lowest layer's bits go first. Comes to `smallest` where nothing fits.
        """
        genes, total = list(configuration), self.bytes(configuration)
        while total > self.budget:
            downs = []
            for layer, gene in enumerate(genes):
                for other in self.steps(layer, gene):
                    if (saved := self._sizes[layer][gene] - self._sizes[layer][other]) > 0:
                        hurt = (sensitivity[layer] + 1e-3) * (self._noise(layer, other) - self._noise(layer, gene))
                        downs.append((hurt / saved, layer, other, saved))
            if not downs:
                break
            _, layer, genes[layer], saved = min(downs, key=lambda down: down[:2])
            total -= saved
        return tuple(genes)

    def _noise(self, layer: int, gene: Gene) -> float:
        """A guess at what a gene costs in units of the fewest bits: a quarter with each bit more, as noise does, and
        for the lowest rank as much as for two bits more, falling with the rank."""
        return 4.0 ** (self.bits[layer][0] - gene[0]) + 4.0**-2 * self.ranks[layer][0] / gene[1]

    def features(self, configuration: Configuration, sensitivity: Floats) -> Floats:
        """The configuration as a point for regression [2 * layers + 2]: places of bits and of ranks among the choices,
        from 0 to 1, and the mean of each weighted with the sensitivity (arXiv 2505.03802, stage 3)."""
        places = np.array(
            [
                (_place(self.bits[layer], gene[0]), _place(self.ranks[layer], gene[1]))
                for layer, gene in enumerate(configuration)
            ]
        ).T
        return np.concatenate((places.ravel(), places @ sensitivity / len(configuration)))


def _place(choices: Sequence[int], choice: int) -> float:
    return choices.index(choice) / max(len(choices) - 1, 1)


def _nearest(choices: Sequence[int], wanted: float) -> int:
    return round(wanted * (len(choices) - 1))
