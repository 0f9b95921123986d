"""Old names that files and users still hold, and what they are called now."""

CONFIG_KEYS = {"training.precision": "speed.precision"}
