"""What tests of several folders ask of a session."""

from __future__ import annotations

import numpy as np
import torch

from rcpo.training.session import Session


def heldout_logratios(session: Session) -> np.ndarray:
    assert session.datasets.evaluation is not None
    session.engine.eval()
    with torch.no_grad():
        scored = [session.heldout(batch) for batch in session.eval_batches(session.datasets.evaluation)]
    return torch.cat([part.pairs.chosen_logratios for part in scored]).numpy()
