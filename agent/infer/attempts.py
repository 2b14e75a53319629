"""One request's way through the options of its version, where a provider fails under it.

A provider that is lost is left at once, by this request and by all that follow. Where a provider other than the
processor refuses a run and nobody can tell whether it or the input is to blame, another option gives a second opinion:
when that one refuses too it was the input, when it answers it was the provider. A provider that was to blame several
times in a row counts as lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from agent.base.errors import PeerError
from agent.infer.answering import Resident, as_asked
from agent.infer.runtimes.failures import DoubtfulError, ProviderLostError
from agent.infer.shelf import Option, Served
from agent.infer.standing import Pick, Standing
from agent.infer.tensors import InferResponse

#: A provider that others had to stand in for so often in a row is lost.
_MOST_DOUBTS = 3


class Attempt:
    """``wanted``: the options that the request asks for, None where whatever stands for the version will do."""

    def __init__(self, standing: Standing, served: Served, wanted: Sequence[Option] | None) -> None:
        self._standing = standing
        self._served = served
        self._wanted = wanted
        self._tries = 0
        self._doubtful: Resident | None = None
        self._doubt: PeerError | None = None

    @property
    def pick(self) -> Pick | None:
        """Which options may answer."""
        return None if self._wanted is None and self._doubtful is None else self._options

    def failed(self, resident: Resident, error: ProviderLostError | DoubtfulError) -> None:
        """A run failed. Raises what the caller is to be told where no other option is left."""
        self._tries += 1
        if isinstance(error, ProviderLostError):
            self._standing.lose(resident.option, str(error))
        elif self._doubt is not None:
            raise self._doubt  # two of a mind: it is the input
        else:
            self._doubtful, self._doubt = resident, error
        lost = self._standing.steering.lost
        if self._tries > len(self._served.options) or all(o.provider in lost for o in self._options(self._served)):
            raise self._doubt or error

    def answered(self, resident: Resident, response: InferResponse) -> InferResponse:
        """A run has answered: what the caller is told of it."""
        first = (self._wanted or self._served.options)[0]
        if self._doubtful is not None:
            self._doubtful.doubts += 1
            if self._doubtful.doubts >= _MOST_DOUBTS:
                self._standing.lose(self._doubtful.option, str(self._doubt))
            return as_asked(response, first, str(self._doubt))
        resident.doubts = 0
        if self._wanted is None:
            return response
        return as_asked(response, first, self._standing.why_not(self._served, self._wanted, resident))

    def _options(self, served: Served) -> Sequence[Option]:
        """What may answer, in the order of the moment."""
        options: Sequence[Option] = self._standing.steering.order(served)
        if self._wanted is not None:
            candidates = {option.candidate for option in self._wanted}
            options = [option for option in options if option.candidate in candidates]
        if self._doubtful is not None:
            shunned = self._doubtful.option.provider
            options = [option for option in options if option.provider != shunned]
        return options
