"""`python -m steps.dispatch.executors.local DIRECTORY [AFTER…]`: the supervisor of a detached job."""

import os
import sys
from pathlib import Path

from steps.dispatch.executors.local.supervisor import supervise

sys.stdin.read()  # until whoever submits has written down who we are
sys.exit(supervise(Path(sys.argv[1]), os.environ, sys.argv[2:], watched=False))
