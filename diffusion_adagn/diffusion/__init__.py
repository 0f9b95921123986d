"""The process: noise schedules, targets and losses, guidance, the sampling pipeline."""
