"""torchrun, whom a second signal does not keep from ending; used by train.sh.

torchrun ends its ranks in what its handler of SIGTERM raises. A second signal raises again in the middle of that, and
it never ends: threads that follow the ranks' output are left waiting. Second signals are common: a parent with several
threads that is killed sends one for each (PR_SET_PDEATHSIG), Slurm signals all processes of a step, people are
impatient. Ranks that do not end are killed 30 seconds after the first one in any case.
"""

import signal
import sys
from types import FrameType

from torch.distributed.elastic.multiprocessing import api
from torch.distributed.run import main

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_raise_signal = api._terminate_process_handler


def _first_only(number: int, frame: FrameType | None) -> None:
    for each in _HANDLED:
        signal.signal(each, signal.SIG_IGN)
    _raise_signal(number, frame)


if __name__ == "__main__":
    api._terminate_process_handler = _first_only
    sys.exit(main())
