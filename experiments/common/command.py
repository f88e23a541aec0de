"""What becomes of errors on a command line."""

from collections.abc import Callable

from experiments.common.checkpoints import CheckpointError
from experiments.common.files import BrokenFileError
from experiments.common.packages import PackageUnavailableError
from experiments.common.rows import DataError
from experiments.common.training import TrainingError

RESUME = "Nothing is lost: see to that, and start it again to go on."
"""The advice of what keeps its work as it goes."""

EXPECTED = (DataError, TrainingError, CheckpointError, BrokenFileError, PackageUnavailableError)


def serve(work: Callable[[], object], advice: str = "") -> None:
    """Does what a command line asks for; what a user can mend is said without a traceback.

    Args:
        work: what is asked for.
        advice: what a user is told when a file cannot be read or written.
    """
    try:
        work()
    except EXPECTED as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise SystemExit(f"{error}. {advice}" if advice else str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("Interrupted: start it again to go on.") from None
