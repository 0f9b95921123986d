"""Run folders: layout, checkpoints, recorded settings."""
