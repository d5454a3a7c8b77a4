"""Import this before torch: OpenMP threads that wait asleep instead of spinning.

Where anything else runs, a spinning thread burns the time slice that its partner needs: two cores shared with one other busy
process took 4 s a training step with spinning threads, 2.2 s with sleeping ones (1.3 s undisturbed). A capture's own threads, which
prepare and write while the teacher computes, are such a neighbour too. A policy that the user has set stands.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
