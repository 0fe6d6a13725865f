"""Estimates how soon chunks are used again."""


class HalfLife:
    """Running estimate of the median interval between the first and the second use of a chunk, counted in uses of any
    chunk.

    A stochastic approximation of the median (Robbins and Monro 1951) in relative steps that shrink to 0.5%. It stores
    one number, and adapts to a changed workload within a few hundred second uses.
    """

    _FINEST_STEP = 0.005

    def __init__(self) -> None:
        self.uses = 1.0
        self._seen = 0

    def learn(self, interval_uses: int) -> None:
        self._seen += 1
        if self._seen == 1:
            self.uses = float(interval_uses)
            return
        step = 1 + max(self._FINEST_STEP, 1 / self._seen)
        if interval_uses > self.uses:
            self.uses *= step
        elif interval_uses < self.uses:
            self.uses = max(1.0, self.uses / step)
