"""When a run freezes, and how much: as told, or from the data."""
