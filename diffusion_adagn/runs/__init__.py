"""A run is a folder: its layout, its checkpoints, what is recorded there."""
