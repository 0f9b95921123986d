"""See what the condition does: what every site is told, and what changes when it is told something else."""
