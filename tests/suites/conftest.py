"""What several suites share."""

import pytest

from tests.suites.members import ALL, Member, cases
from tests.suites.recorded import Recorded


@pytest.fixture(scope="session")
def recordings() -> dict[str, Recorded]:
    """The runs that are made already, in this process."""
    return {}


@pytest.fixture(params=cases(ALL))
def recorded(
    request: pytest.FixtureRequest,
    recordings: dict[str, Recorded],
    tmp_path_factory: pytest.TempPathFactory,
) -> Recorded:
    """A complete run of each member, the same for all tests; they only look at it."""
    member: Member = request.param
    if member.label not in recordings:
        recordings[member.label] = Recorded(member, tmp_path_factory.mktemp("recorded"))
    return recordings[member.label]
