"""The report's cluster and its bill: sections 1 (table 1), 3.1 and 3.2."""

from __future__ import annotations

# 3.1, 3.2: how the 671B model was trained.
GPUS = 2048
HARDWARE = "h800"
PIPELINE_PARALLEL = 16  # "16-way PP"
EXPERT_PARALLEL = 64  # "64-way EP spanning 8 nodes"
COMM_SMS = 20  # 3.2.2: SMs given to communication, of 132

# Table 1 and section 1: H800 GPU hours.
HOURS_PER_TRILLION = 180e3
DAYS_PER_TRILLION = 3.7
PRETRAINING_HOURS = 2664e3
CONTEXT_HOURS = 119e3
POST_TRAINING_HOURS = 5e3
TOTAL_HOURS = 2788e3
DOLLARS_PER_HOUR = 2.0
