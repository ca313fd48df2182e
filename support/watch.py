"""The watch for numbers that are not finite: it stops a run at the first one, and no step waits for it."""

import time

import torch

NAMES = "loss {:.4g}, gradient norm {:.4g}, validation loss {:.4g}, sum of dot products {:.4g}"


class Watch:
    """
    Everything stays on the device until `check`. From the first step with a number that is not finite on, `found_inf`
    has the fused optimisers do nothing, so that this step's windows can still be asked for their losses. (With
    value_order 2 they stand still from the step behind it on.)
    """

    def __init__(self, folder, explain):
        self.folder, self.explain = folder, explain
        self.first = torch.full((5,), -1.0, device=folder.knobs.device)  # iteration and the four numbers of NAMES
        self.windows = {}  # iteration: its windows' ids, since the last check

    def note(self, iter_num, ids, *numbers):
        """Keep the four numbers, scalars on the device, if they are the first with one that is not finite."""
        self.windows[iter_num] = ids
        numbers = torch.stack([torch.full_like(numbers[0], iter_num), *numbers])
        not_finite = self.folder.ranks.total((~numbers.isfinite().all()).float()) > 0
        self.first = torch.where(not_finite & (self.first[0] < 0), numbers, self.first)

    def found_inf(self):
        """1 where the optimiser must stand still, else 0: a scalar on the device."""
        return (self.first[0] >= 0).float()

    def check(self):
        """
        Raises UserError where a step since the last check had a number that is not finite. Rank 0 adds what
        `explain(iteration, ids of its windows, validation loss)` says. Returns the milliseconds for which it has waited
        until the device had ended those steps.
        """
        started = time.perf_counter()
        iter_num, *numbers = self.first.tolist()
        waited = (time.perf_counter() - started) * 1000
        if iter_num < 0:
            self.windows.clear()
            return waited
        iter_num = int(iter_num)
        message = f"iteration {iter_num}: not every number is finite ({NAMES.format(*numbers)})"
        if self.folder.ranks.rank == 0:
            message += self.explain(iter_num, self.windows[iter_num], numbers[2])
        self.folder.ranks.barrier()  # torchrun ends all of them soon after the first
        self.folder.stop(message)

    def check_parameters(self, iter_num, optimizer):
        """Raises UserError where a parameter is not finite, as after a step that was too large."""
        groups = optimizer.param_groups
        if not torch.isfinite(torch.nn.utils.get_total_norm([p for group in groups for p in group["params"]])):
            mend = f"lower --learning_rate={groups[0]['lr']:g}"
            self.folder.stop(f"iteration {iter_num}: the parameters are not finite; {mend}")
