"""The watch for numbers that are not finite: it stops a run at the first one, and no step waits for it."""

import math
import time

import numpy as np
import torch

from support.corpus import get_tokenizer
from support.processes import autocast

NAMES = "loss {:.4g}, gradient norm {:.4g}, validation loss {:.4g}, sum of dot products {:.4g}"


class Watch:
    """
    Everything stays on the device until `check`. From the first step with a number that is not finite on, `found_inf`
    has the fused optimisers do nothing, so that this step's windows can still be asked for their losses. (With
    value_order 2 they stand still from the step behind it on.)
    """

    def __init__(self, folder, model, windows):
        self.folder, self.model, self.windows = folder, model, windows
        self.first = torch.full((5,), -1.0, device=folder.knobs.device)  # iteration and the four numbers of NAMES
        self.drawn = {}  # iteration: its windows' ids, since the last check

    def note(self, iter_num, ids, *numbers):
        """Keep the four numbers, scalars on the device, if they are the first with one that is not finite."""
        self.drawn[iter_num] = ids
        numbers = torch.stack([torch.full_like(numbers[0], iter_num), *numbers])
        not_finite = self.folder.ranks.total((~numbers.isfinite().all()).float()) > 0
        self.first = torch.where(not_finite & (self.first[0] < 0), numbers, self.first)

    def found_inf(self):
        """1 where the optimiser must stand still, else 0: a scalar on the device."""
        return (self.first[0] >= 0).float()

    def check(self):
        """
        Raises UserError where a step since the last check had a number that is not finite. Rank 0 names its windows.
        Returns the milliseconds for which it has waited until the device had ended those steps.
        """
        started = time.perf_counter()
        iter_num, *numbers = self.first.tolist()
        waited = (time.perf_counter() - started) * 1000
        if iter_num < 0:
            self.drawn.clear()
            return waited
        iter_num = int(iter_num)
        message = f"iteration {iter_num}: not every number is finite ({NAMES.format(*numbers)})"
        if self.folder.ranks.rank == 0:
            message += self._worst_windows(iter_num, validation=not math.isfinite(numbers[2]))
        self.folder.ranks.barrier()  # torchrun ends all of them soon after the first
        self.folder.stop(message)

    @torch.no_grad()
    def _worst_windows(self, iter_num, validation):
        """The end of a message: the windows that the step was made of, perhaps those of `validation` too."""
        self.model.eval()
        windows, message = self.windows, ""
        sets = [("train", windows.train, self.drawn[iter_num])]
        if validation:
            sets += [(f"val ({name})", *windows.validation(name, iter_num)) for name in windows.val_sets]
        for name, tokens, ids in sets:
            with autocast(windows.knobs):
                losses = [self.model(*windows.batch(tokens, ids[i : i + 1]))[1].item() for i in range(len(ids))]
            worst = int(np.nan_to_num(losses, nan=np.inf).argmax())
            window = tokens.windows(ids[worst : worst + 1], windows.knobs.block_size)[0].tolist()
            text = get_tokenizer(windows.meta["tokenizer"]).decode(window)
            message += f"; its {name} windows are {', '.join(map(str, ids))}; the worst of them, {ids[worst]}, "
            message += f"with a loss of {losses[worst]:.4g}, reads {text!r}"
        return message

    def check_parameters(self, iter_num, optimizer):
        """Raises UserError where a parameter is not finite, as after a step that was too large."""
        groups = optimizer.param_groups
        if not torch.isfinite(torch.nn.utils.get_total_norm([p for group in groups for p in group["params"]])):
            mend = f"lower --learning_rate={groups[0]['lr']:g}"
            self.folder.stop(f"iteration {iter_num}: the parameters are not finite; {mend}")
